"""From passes that a recorder kept to a trace: ids in order, rows, names, times, and what there is to say of the model.

Shape letters: T tokens, S passes, L MoE layers, K top-k.
"""

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels.spec import TORCH_DTYPE
from ..traces.requests import phases_of
from ..traces.schema import I64, Ints, Provenance
from ..traces.trace import UNKNOWN, RoutingTrace, StepTable, id_dtype
from .doctor import installed
from .marks import Marks
from .ring import IdRing
from .rows import PassRows, SequencePass

LIBRARIES = ("expertslice", "torch", "transformers")
Chosen = tuple[Tensor, Tensor | None]
"""Expert ids [T, K] of a layer, and their weights where the ids may not stand by falling weight."""


@dataclass(slots=True, kw_only=True)
class RecordedPass:
    """One pass, still on the device."""

    rows: PassRows | SequencePass
    start_ns: int
    chosen_L: list[Chosen] | None
    """None: a replay's, in the ring."""
    marks: Marks | None
    domain: int
    segment: int


def chosen_of(passes: Sequence[list[Chosen]]) -> Tensor:
    """Return the ids of passes one after another [T, L, K], on their device, by falling weight."""
    layers = range(len(passes[0]))
    ids_TLK = torch.stack([torch.cat([one[layer][0] for one in passes]) for layer in layers], dim=1)
    if passes[0][0][1] is None:
        return ids_TLK
    weights_L = [[one[layer][1] for one in passes] for layer in layers]
    weights_TLK = torch.stack([torch.cat([w for w in of_layer if w is not None]) for of_layer in weights_L], dim=1)
    # Some routers leave the chosen experts in no order.
    return ids_TLK.gather(-1, weights_TLK.argsort(dim=-1, descending=True, stable=True))


@dataclass(frozen=True, slots=True)
class IdsOnTheWay:
    """Ids of passes [T, L, K], which the device brings to the host."""

    ids_TLK: Tensor
    arrived: torch.cuda.Event | None

    def wait(self) -> Ints:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.ids_TLK.numpy()


def ids_of(passes: Sequence[RecordedPass], ring: IdRing | None) -> IdsOnTheWay:
    """Ask for the ids of all passes in order; nothing waits."""
    kept = [one.chosen_L for one in passes if one.chosen_L is not None]
    kept_TLK = chosen_of(kept).int() if kept else None
    num_replayed = sum(one.rows.num_rows for one in passes if one.chosen_L is None)
    if not num_replayed or ring is None:
        assert kept_TLK is not None
        return _sent(kept_TLK)
    ring_TLK, pieces, at = ring.fetch(num_replayed), list[Tensor](), [0, 0]
    for one in passes:
        replayed = one.chosen_L is None
        source = ring_TLK if replayed or kept_TLK is None else kept_TLK
        begin = at[replayed]
        at[replayed] += one.rows.num_rows
        pieces.append(source[begin : at[replayed]])
    return _sent(torch.cat(pieces))


def _sent(ids_TLK: Tensor) -> IdsOnTheWay:
    if not ids_TLK.is_cuda:
        return IdsOnTheWay(ids_TLK, None)
    host_TLK = torch.empty(ids_TLK.shape, dtype=ids_TLK.dtype, pin_memory=True)
    host_TLK.copy_(ids_TLK, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return IdsOnTheWay(host_TLK, arrived)


def trace_of(
    passes: Sequence[RecordedPass],
    ids_TLK: Ints,
    *,
    num_experts: int,
    domains: Iterable[str],
    segments: Iterable[str],
    provenance: Provenance,
    times: bool,
) -> RoutingTrace:
    """Return passes as a trace, padding left out."""
    rows_S = [one.rows.rows() for one in passes]
    keep_T = np.concatenate([rows.keep_T for rows in rows_S])
    tokens_S = [int(rows.keep_T.sum()) for rows in rows_S]
    step_T = np.repeat(np.arange(len(passes)), tokens_S)
    columns: dict[str, Ints] = {
        name: np.concatenate([getattr(rows, name) for rows in rows_S])[keep_T]
        for name in ("request_id_T", "position_T", "phase_T")
    }
    phase_T = columns["phase_T"].astype(np.uint8)
    return RoutingTrace(
        num_experts=num_experts,
        provenance=provenance,
        request_id_T=columns["request_id_T"].astype(np.int64),
        position_T=columns["position_T"].astype(np.int32),
        phase_T=phase_T,
        step_T=step_T,
        domain_T=np.repeat([one.domain for one in passes], tokens_S).astype(np.int16),
        domains=tuple(domains),
        expert_ids_TLK=ids_TLK[keep_T].astype(id_dtype(num_experts)),
        step_table=StepTable(
            phase_S=phases_of(phase_T, step_T, len(passes)),
            segment_S=np.array([one.segment for one in passes], dtype=np.uint8),
            segments=tuple(segments),
            start_ns_S=np.array([one.start_ns for one in passes]),
            **(_measured(passes, ids_TLK.shape[1]) if times else {}),
        ),
    )


def _measured(passes: Sequence[RecordedPass], num_layers: int) -> dict[str, I64]:
    unknown_L2 = np.full((num_layers, 2), UNKNOWN)
    spans_SL2 = np.stack([unknown_L2 if one.marks is None else one.marks.spans_ns() for one in passes])
    return {"other_ns_SL": spans_SL2[..., 0], "moe_ns_SL": spans_SL2[..., 1]}


def is_ours(module: nn.Module) -> bool:
    """Return whether a module tells its ids itself, as a `MoeLayer` does: it has `on_ids` and a `spec`."""
    return hasattr(module, "on_ids")


def name_of(model: nn.Module | None) -> str:
    """Return what a model's config calls it, else the name of its class."""
    config = getattr(model, "config", None)
    return getattr(config, "name_or_path", None) or getattr(config, "model_type", None) or type(model).__name__


def provenance_of(model: str, device: torch.device, notes: Sequence[str]) -> Provenance:
    """Return what is known of a recording."""
    return Provenance(
        source="recorded by expertslice",
        model=model,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        versions={name: found for name in LIBRARIES if (found := installed(name))},
        notes="; ".join(notes),
    )


def config_of(model: nn.Module | None, layers: Sequence[Any]) -> dict[str, Any] | None:
    """Return a model's own config, or its layers' shape where that can be said in one; else None."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if to_dict is not None:
        return to_dict()
    spec = getattr(layers[0], "spec", None)
    if spec is None or spec.kind != "swiglu":
        return None
    dtype = str(TORCH_DTYPE[spec.dtype]).removeprefix("torch.")
    sizes = {"num_hidden_layers": len(layers), "num_experts": spec.num_experts, "hidden_size": spec.d_model}
    own = {"num_experts_per_tok": spec.top_k, "moe_intermediate_size": spec.d_ff_of(0), "dtype": dtype}
    return {**sizes, **own, "norm_topk_prob": spec.renormalise, "scoring_func": spec.score}
