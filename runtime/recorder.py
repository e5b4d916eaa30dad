"""Records how a model routes while it runs: Hugging Face models and our own layers, to a trace that survives a crash.

Hooks hand ids to a ring on the model's device; every so often they come to the host and to disk. What fails in here
stops the recording, never the model: one warning, and everything flushed stays.

Shape letters: T tokens of a pass, S passes, L MoE layers, K top-k.
"""

import json
import platform
import time
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels.spec import TORCH_DTYPE
from ..traces.append import TraceAppender
from ..traces.check import TraceError
from ..traces.models import CONFIG_SUFFIX
from ..traces.requests import phases_of
from ..traces.schema import I64, Ints, Provenance
from ..traces.store import PARTS
from ..traces.trace import UNKNOWN, RoutingTrace, StepTable, id_dtype
from .hf import experts_of
from .marks import Marks
from .ring import IdRing
from .rows import PassRows, SequenceRows

NOBODY_SAID = "requests and positions are not known: each pass stands as one request"
LIBRARIES = ("expertslice", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """A pass in the ring that has not come to the host."""

    rows: PassRows
    start_ns: int
    marks: Marks | None
    domain: int
    segment: int


class Recorder:
    """Records one model's passes to `path`; use as a context manager, and `attach` the model inside it."""

    def __init__(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        times: bool = False,
        flush_s: float = 5.0,
        ring_rows: int = 65536,
    ) -> None:
        """Take the path.

        Args:
            path: of the trace; nothing may stand there.
            name: of the model; default: what its config says.
            times: measure experts and what lies between them, layer by layer, with events. Not in graph replay.
            flush_s: a crash costs passes of so many seconds, or of half a ring.
            ring_rows: tokens that the ring on the device holds.

        Raises:
            TraceError: something stands at the path, or another recorder is at work.
        """
        self.domain: str | None = None
        """Of the requests in the passes to come; names are remembered as they come."""
        self.segment = "all"
        """Likewise, of the passes: a checkpoint, a run."""
        self.failure: str | None = None
        """Why the recording stopped, or None."""
        self._appender = TraceAppender(path)
        self._name, self._times, self._flush_s, self._ring_rows = name, times, flush_s, ring_rows
        self._names: dict[str, list[str]] = {"domain": [], "segment": []}
        self._handles: list[Any] = []
        self._passes: list[_Pass] = []
        self._ids_L: list[Tensor | None] = []
        self._notes: dict[str, None] = {}
        self._rows: PassRows | None = None
        self._sequences = SequenceRows()
        self._model: nn.Module | None = None
        self._ring: IdRing | None = None
        self._told_config = False
        self._pending = self._next_request = 0
        self._zero_ns = self._flushed_ns = time.perf_counter_ns()

    @property
    def model(self) -> str:
        """The model's name."""
        config = getattr(self._model, "config", None)
        named = self._name or getattr(config, "name_or_path", None) or getattr(config, "model_type", None)
        return named or type(self._model).__name__

    @property
    def num_steps(self) -> int:
        """Passes that came to the host."""
        return self._appender.num_steps

    def attach(self, model: nn.Module) -> None:
        """Record the passes of a model from now on.

        Raises:
            ValueError: it has no experts, experts on several devices, or another model is attached.
        """
        if self._model is not None:
            raise ValueError("a recorder takes one model; make another recorder for the next")
        self._layers: list[Any] = [m for m in model.modules() if _is_ours(m)] or experts_of(model)
        self._device, self._model = next(self._layers[0].parameters()).device, model
        self._ids_L = [None] * len(self._layers)
        self._marks = None
        for layer, module in enumerate(self._layers):
            if _is_ours(module):
                module.on_ids = partial(self._own_layer, layer)
            else:
                self._handles.append(
                    module.register_forward_pre_hook(partial(self._guarded, self._layer, layer), with_kwargs=True)
                )
            if self._times:
                self._handles.append(module.register_forward_pre_hook(partial(self._mark, 2 * layer)))
                self._handles.append(module.register_forward_hook(partial(self._mark, 2 * layer + 1)))
        self._handles.append(model.register_forward_pre_hook(self._called, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._end))

    @contextmanager
    def attached(self, model: nn.Module) -> Generator[None]:
        """Record the passes of a model while the context lasts; it may be attached again."""
        self._model = None
        self.attach(model)
        try:
            yield
        finally:
            self._detach()

    def describe(self, rows: PassRows) -> None:
        """Say which request and position each row of the next pass is."""
        self._rows = rows

    def replayed(self, rows: PassRows) -> None:
        """Take note of one pass that a replayed graph ran: hooks do not fire there, and its ids are in the ring."""
        self._guarded(self._counted, rows, time.perf_counter_ns())

    @contextmanager
    def step(self, rows: PassRows) -> Generator[None]:
        """Record what runs inside as one pass of these rows: for models whose layers are called one by one."""
        self._begin(rows)
        yield
        self._end()

    def _called(self, _model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._begin(self._rows or self._sequences.of(args, kwargs))

    def _begin(self, rows: PassRows | None) -> None:
        self._ids_L = [None] * len(self._layers)
        self._start_ns = time.perf_counter_ns()
        self._marks = Marks(self._device, len(self._layers)) if self._times else None
        self._given, self._rows = rows, None

    def _mark(self, place: int, *_: object) -> None:
        if self._marks is not None:
            self._marks.mark(place)

    def _layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids, weights = [*args, *kwargs.values()][1:3]
        if getattr(ids, "ndim", 0) != 2 or ids.shape != getattr(weights, "shape", None):
            raise TraceError(
                f"{type(module).__name__} is not called with expert ids [tokens, k]; it cannot be recorded"
            )
        # Some routers leave the chosen experts in no order.
        order = weights.argsort(dim=-1, descending=True, stable=True)
        self._ids_L[layer] = ids.gather(-1, order)

    def _own_layer(self, layer: int, ids_TK: Tensor) -> None:
        self._ids_L[layer] = ids_TK.clone()

    def _end(self, *_: object) -> None:
        self._guarded(self._take)

    def _guarded(self, act: Any, *args: Any) -> None:
        """Do something; where it fails the recording stops, and the model goes on."""
        if self.failure is not None:
            return
        try:
            act(*args)
        except (TraceError, OSError) as error:
            self.stop(str(error))

    def stop(self, why: str) -> None:
        """Stop recording with a warning; the model goes on."""
        self.failure = why
        self._detach()
        warnings.warn(f"recording stopped after {self.num_steps} steps: {why}", stacklevel=4)

    def _take(self) -> None:
        """Put a pass into the ring."""
        missing = [layer for layer, ids in enumerate(self._ids_L) if ids is None]
        if missing:
            raise TraceError(f"layers {missing} did not run in a pass; record a model that runs all its MoE layers")
        ids_TLK = torch.stack([ids for ids in self._ids_L if ids is not None], dim=1)
        captures = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self._ring is None:
            if captures:
                raise TraceError("the first pass of a recording is captured in a graph; run one before capturing")
            rows = max(self._ring_rows, 2 * len(ids_TLK))
            self._ring = IdRing(*ids_TLK.shape[1:], num_rows=rows, device=self._device)
        if captures:
            self._ring.put(ids_TLK)
            return
        if self._pending + len(ids_TLK) > self._ring.num_rows:
            self._drain()
        if len(ids_TLK) > self._ring.num_rows:
            raise TraceError(f"a pass of {len(ids_TLK)} tokens; the ring holds {self._ring.num_rows}, give ring_rows")
        self._ring.put(ids_TLK)
        rows = self._given
        if rows is None or len(rows.keep_T) != len(ids_TLK):
            self._notes[NOBODY_SAID] = None
            rows = PassRows.of_one_request(self._next_request, len(ids_TLK))
            self._next_request += 1
        self._counted(rows, self._start_ns)

    def _counted(self, rows: PassRows, start_ns: int) -> None:
        domain = UNKNOWN if self.domain is None else self._place("domain", self.domain)
        segment = self._place("segment", self.segment)
        self._passes.append(
            _Pass(rows=rows, start_ns=start_ns - self._zero_ns, marks=self._marks, domain=domain, segment=segment)
        )
        self._marks = None
        self._pending += len(rows.keep_T)
        assert self._ring is not None
        late = time.perf_counter_ns() - self._flushed_ns > self._flush_s * 1e9
        if late or self._pending > self._ring.num_rows // 2:
            self._drain()
        if late:
            self._appender.flush()
            self._flushed_ns = time.perf_counter_ns()

    def _place(self, kind: str, name: str) -> int:
        known = self._names[kind]
        if name not in known:
            known.append(name)
        return known.index(name)

    def _drain(self) -> None:
        """Bring what is in the ring to the host."""
        if self._passes and self._ring is not None:
            passes, self._passes = self._passes, []
            pending, self._pending = self._pending, 0
            self._appender.append(self._trace(passes, self._ring.fetch(pending)))
            self._write_config()

    def _trace(self, passes: list[_Pass], ids_TLK: Ints) -> RoutingTrace:
        keep_T = np.concatenate([one.rows.keep_T for one in passes])
        tokens_S = [int(one.rows.keep_T.sum()) for one in passes]
        step_T = np.repeat(np.arange(len(passes)), tokens_S)
        rows: dict[str, Ints] = {
            name: np.concatenate([getattr(one.rows, name) for one in passes])[keep_T]
            for name in ("request_id_T", "position_T", "phase_T")
        }
        num_experts = self._num_experts()
        domains = tuple(self._names["domain"])
        return RoutingTrace(
            num_experts=num_experts,
            provenance=self._provenance(),
            request_id_T=rows["request_id_T"].astype(np.int64),
            position_T=rows["position_T"].astype(np.int32),
            phase_T=rows["phase_T"].astype(np.uint8),
            step_T=step_T,
            domain_T=np.repeat([one.domain for one in passes], tokens_S).astype(np.int16),
            domains=domains,
            expert_ids_TLK=ids_TLK[keep_T].astype(id_dtype(num_experts)),
            step_table=StepTable(
                phase_S=phases_of(rows["phase_T"].astype(np.uint8), step_T, len(passes)),
                segment_S=np.array([one.segment for one in passes], dtype=np.uint8),
                segments=tuple(self._names["segment"]),
                start_ns_S=np.array([one.start_ns for one in passes]),
                **self._measured(passes),
            ),
        )

    def _measured(self, passes: list[_Pass]) -> dict[str, I64]:
        if not self._times:
            return {}
        unknown_L2 = np.full((len(self._layers), 2), UNKNOWN)
        spans_SL2 = np.stack([unknown_L2 if one.marks is None else one.marks.spans_ns() for one in passes])
        return {"other_ns_SL": spans_SL2[..., 0], "moe_ns_SL": spans_SL2[..., 1]}

    def _num_experts(self) -> int:
        first = self._layers[0]
        return first.spec.num_experts if _is_ours(first) else first.num_experts

    def _provenance(self) -> Provenance:
        cuda = self._device.type == "cuda"
        times = "times are of the model as it ran, launches included" if self._times else ""
        return Provenance(
            source="recorded by expertslice",
            model=self.model,
            device=torch.cuda.get_device_name(self._device) if cuda else platform.machine(),
            versions={name: found for name in LIBRARIES if (found := _installed(name))},
            notes="; ".join(note for note in (*self._notes, times) if note),
        )

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in getattr(self, "_layers", ()):
            if _is_ours(module):
                module.on_ids = None

    def close(self, *, notes: str | None = None) -> None:
        """Write the trace.

        Raises:
            TraceError: the recording had stopped, or cannot be written; what was flushed is kept.
        """
        self._detach()
        if self.failure is None:
            self._drain()
            self._appender.close(notes=notes)
            return
        kept = self._appender.path
        try:
            self._appender.close(notes=f"partial: {self.failure}")
        except TraceError:
            kept = f"{kept}{PARTS}"
        raise TraceError(f"recording stopped: {self.failure}{f'; {kept} keeps the rest' if self.num_steps else ''}")

    def _write_config(self) -> None:
        """Write the model's config beside the trace, once."""
        config = None if self._told_config else self._config()
        self._told_config = True
        if config:
            text = json.dumps(config, indent=1, default=str)
            self._appender.path.with_suffix(CONFIG_SUFFIX).write_text(text + "\n", encoding="utf-8")

    def _config(self) -> dict[str, Any] | None:
        """Return the model's own config, or one of its layers' shape where that can be said in one."""
        to_dict = getattr(getattr(self._model, "config", None), "to_dict", None)
        if to_dict is not None:
            return to_dict()
        spec = self._layers[0].spec
        if spec.kind != "swiglu":
            return None
        dtype = str(TORCH_DTYPE[spec.dtype]).removeprefix("torch.")
        sizes = {"num_hidden_layers": len(self._layers), "num_experts": spec.num_experts, "hidden_size": spec.d_model}
        own = {"num_experts_per_tok": spec.top_k, "moe_intermediate_size": spec.d_ff_of(0), "dtype": dtype}
        return {**sizes, **own, "norm_topk_prob": spec.renormalise, "scoring_func": spec.score}

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(notes=f"partial: the run broke off ({kind.__name__})" if kind else None)


def _is_ours(module: nn.Module) -> bool:
    """Return whether a module tells its ids itself, as a `MoeLayer` does: it has `on_ids` and a `spec`."""
    return hasattr(module, "on_ids")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
