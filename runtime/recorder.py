"""Records how a model routes while it runs: Hugging Face models and our own layers, to a trace that survives a crash.

Hooks keep what the routers chose on the model's device: tensors as they are, or in a graph's capture a ring that each
replay fills. Every so often they come to the host and to disk. What fails in here stops the recording, never the
model: one warning, and everything flushed stays.

Shape letters: T tokens of a pass, L MoE layers, K top-k.
"""

import json
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..traces.append import TraceAppender
from ..traces.check import TraceError
from ..traces.models import CONFIG_SUFFIX
from ..traces.store import PARTS
from ..traces.trace import UNKNOWN
from .hf import experts_of
from .marks import Marks
from .recorded import (
    Chosen,
    IdsOnTheWay,
    RecordedPass,
    chosen_of,
    config_of,
    ids_of,
    is_ours,
    name_of,
    provenance_of,
    trace_of,
)
from .ring import IdRing
from .rows import PassRows, SequencePass, SequenceRows

NOBODY_SAID = "requests and positions are not known: each pass stands as one request"
TIMES_SAID = "times are of the model as it ran, launches included"


class Recorder:
    """Records one model's passes to `path`; use as a context manager, and `attach` the model inside it."""

    def __init__(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        times: bool = False,
        flush_s: float = 5.0,
        ring_rows: int = 16384,
    ) -> None:
        """Take the path.

        Args:
            path: of the trace; nothing may stand there.
            name: of the model; default: what its config says.
            times: measure experts and what lies between them, layer by layer, with events. Not in graph replay.
            flush_s: a crash costs passes of so many seconds, or of half a ring.
            ring_rows: tokens that the ring on the device holds, twice those of the largest captured pass or more.

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
        self._domains: dict[str, int] = {}
        self._segments: dict[str, int] = {}
        self._handles: list[Any] = []
        self._forwards: dict[int, Any] = {}
        """What others had put in the place of layers' own `forward`, or None."""
        self._passes: list[RecordedPass] = []
        self._chosen_L: list[tuple[Any, ...] | None] = []
        self._notes: dict[str, None] = {}
        self._rows: PassRows | None = None
        self._sequences = SequenceRows()
        self._model: nn.Module | None = None
        self._ring: IdRing | None = None
        self._told_config = False
        # One thread, so that what is written comes in order; the model goes on meanwhile.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="recorder")
        self._written: Future[None] | None = None
        self._pending = self._next_request = 0
        self._zero_ns = self._flushed_ns = time.perf_counter_ns()

    @property
    def model(self) -> str:
        """The model's name."""
        return self._name or name_of(self._model)

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
        self._layers: list[Any] = [m for m in model.modules() if is_ours(m)] or experts_of(model)
        self._device, self._model = next(self._layers[0].parameters()).device, model
        self._chosen_L = [None] * len(self._layers)
        self._marks = None
        for layer, module in enumerate(self._layers):
            if is_ours(module):
                module.on_ids = partial(self._own_layer, layer)
            else:
                # A hook on every layer would take a good part of what recording may cost.
                self._forwards[layer] = module.__dict__.get("forward")
                module.forward = self._tapped(layer, module.forward)
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
        self._guarded(self._counted, rows, time.perf_counter_ns(), None)

    @contextmanager
    def step(self, rows: PassRows) -> Generator[None]:
        """Record what runs inside as one pass of these rows: for models whose layers are called one by one."""
        self._begin(rows)
        yield
        self._end()

    def _called(self, _model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        rows: PassRows | SequencePass | None = self._rows
        if rows is None and not self._captures():
            rows = self._sequences.of(args, kwargs)
        self._begin(rows)

    def _begin(self, rows: PassRows | SequencePass | None) -> None:
        self._chosen_L = [None] * len(self._layers)
        self._start_ns = time.perf_counter_ns()
        self._captured = self._captures()
        self._marks = Marks(self._device, len(self._layers)) if self._times and not self._captured else None
        self._given, self._rows = rows, None

    def _mark(self, place: int, *_: object) -> None:
        if self._marks is not None:
            self._marks.mark(place)

    def _tapped(self, layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a layer's call that keeps the ids and weights that it is given; they are looked at after many passes.

        A pass is launched by Python that has left the caches when the next comes, so a line here costs microseconds.
        """

        def tapped(*args: Any, **kwargs: Any) -> Any:
            self._chosen_L[layer] = (args if not kwargs else (*args, *kwargs.values()))[1:3]
            return forward(*args, **kwargs)

        return tapped

    def _own_layer(self, layer: int, ids_TK: Tensor) -> None:
        # The next layer writes its ids there.
        self._chosen_L[layer] = ids_TK.clone(), None

    def _captures(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _end(self, *_: object) -> None:
        self._guarded(self._take)

    def _guarded(self, act: Callable[..., None], *args: Any) -> None:
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
        self._writer.shutdown()
        warnings.warn(f"recording stopped after {self.num_steps} steps: {why}", stacklevel=4)

    def _take(self) -> None:
        if None in self._chosen_L:
            missing = [layer for layer, chosen in enumerate(self._chosen_L) if chosen is None]
            raise TraceError(f"layers {missing} did not run in a pass; record a model that runs all its MoE layers")
        chosen_L: list[Any] = self._chosen_L
        # All of them when they are written: it takes as long as all the rest here.
        self._check(chosen_L if self._ring is None or self._captured else chosen_L[:1])
        num_tokens, top_k = chosen_L[0][0].shape
        if self._captured:
            self._put(chosen_L, num_tokens)
            return
        if self._ring is None:
            self._ring = IdRing(len(chosen_L), top_k, num_rows=self._ring_rows, device=self._device)
        rows = self._given
        if rows is None or rows.num_rows != num_tokens:
            self._notes[NOBODY_SAID] = None
            rows = PassRows.of_one_request(self._next_request, num_tokens)
            self._next_request += 1
        self._counted(rows, self._start_ns, chosen_L)

    def _check(self, chosen_L: Sequence[Any]) -> None:
        for layer, chosen in zip(self._layers, chosen_L, strict=False):
            ids, weights = chosen if len(chosen) == 2 else (None, None)
            if getattr(ids, "ndim", 0) != 2 or (weights is not None and ids.shape != getattr(weights, "shape", None)):
                name = type(layer).__name__
                raise TraceError(f"{name} is not called with expert ids [tokens, k]; it cannot be recorded")

    def _put(self, chosen_L: list[Chosen], num_tokens: int) -> None:
        """Let each replay put what it chooses into the ring."""
        if self._ring is None:
            raise TraceError("the first pass of a recording is captured in a graph; run one before capturing")
        if 2 * num_tokens > self._ring.num_rows:
            raise TraceError(
                f"a captured pass of {num_tokens} tokens; the ring holds {self._ring.num_rows}, give ring_rows of at "
                "least twice the pass"
            )
        self._ring.put(chosen_of([chosen_L]))

    def _counted(self, rows: PassRows | SequencePass, start_ns: int, chosen_L: list[Chosen] | None) -> None:
        """Take note of a pass; of a replay, whose ids are in the ring, without them."""
        self._passes.append(
            RecordedPass(
                rows=rows,
                start_ns=start_ns - self._zero_ns,
                chosen_L=chosen_L,
                marks=self._marks,
                domain=UNKNOWN if self.domain is None else _number(self._domains, self.domain),
                segment=_number(self._segments, self.segment),
            )
        )
        self._marks = None
        self._pending += rows.num_rows
        if self._written is not None and self._written.done():
            self._settle()
        late = time.perf_counter_ns() - self._flushed_ns > self._flush_s * 1e9
        if late or self._pending > self._ring_rows // 2:
            self._drain(flush=late)
        if late:
            self._flushed_ns = time.perf_counter_ns()

    def flush(self) -> None:
        """Write what was recorded so far and wait for it: a crash after this call costs nothing from before it."""
        self._guarded(self._flush)

    def _flush(self) -> None:
        self._drain(flush=True)
        self._settle()

    def _settle(self) -> None:
        """Wait for what is being written, and raise what befell it."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def _drain(self, *, flush: bool) -> None:
        """Hand over what passes have chosen, after the drain before: memory holds two at most."""
        self._settle()
        if not self._passes:
            return
        passes, self._passes, self._pending = self._passes, [], 0
        for one in passes:
            if one.chosen_L is not None:
                self._check(one.chosen_L)
        num_experts = self._layers[0].spec.num_experts if is_ours(self._layers[0]) else self._layers[0].num_experts
        notes = (*self._notes, *([TIMES_SAID] if self._times else []))
        facts = {
            "num_experts": num_experts,
            "domains": tuple(self._domains),
            "segments": tuple(self._segments),
            "provenance": provenance_of(self.model, self._device, notes),
            "times": self._times,
        }
        self._written = self._writer.submit(self._write, passes, ids_of(passes, self._ring), facts, flush)

    def _write(self, passes: list[RecordedPass], ids: IdsOnTheWay, facts: dict[str, Any], flush: bool) -> None:
        self._appender.append(trace_of(passes, ids.wait(), **facts))
        if not self._told_config:
            self._told_config = True
            self._write_config()
        if flush:
            self._appender.flush()

    def _write_config(self) -> None:
        if config := config_of(self._model, self._layers):
            text = json.dumps(config, indent=1, default=str)
            self._appender.path.with_suffix(CONFIG_SUFFIX).write_text(text + "\n", encoding="utf-8")

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in getattr(self, "_layers", ()):
            if is_ours(module):
                module.on_ids = None
        for layer, before in self._forwards.items():
            del self._layers[layer].forward
            if before is not None:
                self._layers[layer].forward = before
        self._forwards.clear()

    def close(self, *, notes: str | None = None) -> None:
        """Write the trace.

        Raises:
            TraceError: the recording had stopped, or cannot be written; what was flushed is kept.
        """
        self._detach()
        try:
            if self.failure is None:
                self._drain(flush=False)
                self._settle()
        except (TraceError, OSError) as error:
            self.failure = str(error)
        finally:
            self._writer.shutdown()
        if self.failure is None:
            self._appender.close(notes=notes)
            return
        kept = self._appender.path
        try:
            self._appender.close(notes=f"partial: {self.failure}")
        except TraceError:
            kept = f"{kept}{PARTS}"
        raise TraceError(f"recording stopped: {self.failure}{f'; {kept} keeps the rest' if self.num_steps else ''}")

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(notes=f"partial: the run broke off ({kind.__name__})" if kind else None)


def _number(names: dict[str, int], name: str) -> int:
    """Return a name's number; a new name gets the next one."""
    return names.setdefault(name, len(names))
