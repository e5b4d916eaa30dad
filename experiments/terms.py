"""What binds each layer's experts under an unsliced launch, in figures; `why` puts them into words.

An expert is *cold* where its bytes take longer than its padded arithmetic on the whole device, else *hot*. Shares are
of the unsliced step's time under the simulator's truth.

Shape letters: L MoE layers, E experts, P products.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..policies.contract import Plan
from ..policies.cost import CostModel, floor_ns
from ..traces.schema import DTYPE_BYTES, RoutedStep
from .simulate import other_work_of

Floats = NDArray[np.float64]
MOSTLY = 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTerms:
    """One layer's mean over the sampled steps; shares are of its own time."""

    layer: int
    ns: float
    cold_experts: float
    hot_experts: float
    cold_tokens: float
    """Tokens of a cold expert."""
    hot_tokens: float
    cold_share: float
    hot_share: float
    waste_share: float
    """Waves that are not full, padded rows, and bandwidth that too few CTAs ask for."""
    launch_share: float
    """Routing, scheduling, combining and the gaps between kernels."""
    other_share: float
    overlap_share: float
    """The most that running memory and arithmetic side by side could save."""
    floor_share: float
    """The physical floor of its bytes and FLOP over its time."""
    max_over_mean: float

    @property
    def bound(self) -> str:
        experts = self.cold_share + self.hot_share
        if self.waste_share > experts:
            return "waves and padding"
        if self.launch_share > 0.5:
            return "launches"
        if self.other_share > 0.5:
            return "other work"
        if self.cold_share >= MOSTLY * experts:
            return "memory"
        return "arithmetic" if self.hot_share >= MOSTLY * experts else "memory beside arithmetic"


def layer_terms(truth: CostModel, plan: Plan, steps: Iterable[RoutedStep]) -> list[LayerTerms]:
    rows = [_step_terms(truth, plan, step) for step in steps if step.counts_LE.any()]
    mean_L = {name: np.mean([row[name] for row in rows], axis=0) for name in rows[0]}
    mean_L |= {name: values_L / mean_L["ns"] for name, values_L in mean_L.items() if name.endswith("_share")}
    for kind in ("cold", "hot"):
        experts_L, tokens_L = mean_L[f"{kind}_experts"], mean_L[f"{kind}_tokens"]
        mean_L[f"{kind}_tokens"] = np.divide(tokens_L, experts_L, out=np.zeros_like(tokens_L), where=experts_L > 0)
    layers = range(len(mean_L["ns"]))
    return [LayerTerms(layer=i, **{name: float(values_L[i]) for name, values_L in mean_L.items()}) for i in layers]


def _step_terms(truth: CostModel, plan: Plan, step: RoutedStep) -> dict[str, Floats]:
    """Return the terms of one step by layer: shares are still ns, tokens still sums."""
    other_L = other_work_of(step, truth.model)
    work, bare = truth.work(plan, step.counts_LE, other_L), truth.work(plan, step.counts_LE)
    layers = range(len(step.counts_LE))
    ns_L = np.array([work.layer_times(layer).ns for layer in layers], dtype=float)
    launch_L = np.array([bare.head_ns(layer) + bare.tail_ns(layer) for layer in layers], dtype=float)
    other_ns_L = np.array([work.head_ns(layer) - bare.head_ns(layer) for layer in layers], dtype=float)
    memory_LE, pipe_LE, bytes_L, flops_L = _expert_ns(truth, plan, step.counts_LE)
    cold_LE = (memory_LE > pipe_LE) & (step.counts_LE > 0)
    hot_LE = (step.counts_LE > 0) & ~cold_LE
    longer_LE = np.maximum(memory_LE, pipe_LE)
    ideal_L = np.maximum(longer_LE.sum(axis=1), 1.0)
    experts_L = np.maximum(ns_L - launch_L - other_ns_L, 0.0)
    # Where neighbouring waves overlap, experts take less than the sum of what binds each of them.
    used_L = np.minimum(1.0, experts_L / ideal_L)
    saved_L = 1 - np.maximum(memory_LE.sum(axis=1), pipe_LE.sum(axis=1)) / ideal_L
    floors = zip(bytes_L, flops_L, strict=True)
    dtype, device = truth.model.dtype, truth.device
    return {
        "ns": ns_L,
        "launch_share": launch_L,
        "other_share": other_ns_L,
        "cold_share": used_L * (longer_LE * cold_LE).sum(axis=1),
        "hot_share": used_L * (longer_LE * hot_LE).sum(axis=1),
        "waste_share": np.maximum(experts_L - ideal_L, 0.0),
        "overlap_share": used_L * ideal_L * saved_L,
        "floor_share": np.array([floor_ns(hbm_bytes=b, flops=f, device=device, dtype=dtype) for b, f in floors]),
        "cold_experts": cold_LE.sum(axis=1),
        "hot_experts": hot_LE.sum(axis=1),
        "cold_tokens": (step.counts_LE * cold_LE).sum(axis=1),
        "hot_tokens": (step.counts_LE * hot_LE).sum(axis=1),
        "max_over_mean": step.counts_LE.max(axis=1) / np.maximum(step.counts_LE.mean(axis=1), 1e-9),
    }


def _expert_ns(truth: CostModel, plan: Plan, counts_LE: NDArray[np.int32]) -> tuple[Floats, ...]:
    """Return each expert's memory and arithmetic time on the whole device, and each layer's bytes and FLOP."""
    device, model = truth.device, truth.model
    num_experts = model.num_experts
    _, asked_CPLE = truth.shares(plan.layout).demands(counts_LE, np.zeros_like(counts_LE), np.arange(num_experts)[None])
    pipe_LE, _, _, _, bytes_LE = asked_CPLE.sum(axis=1)
    flops_E = np.array([2.0 * model.expert_bytes(e) / DTYPE_BYTES[model.dtype] for e in range(num_experts)])
    memory_LE = bytes_LE / max(device.read_curve_bytes_per_s) * 1e9
    return memory_LE, pipe_LE / device.sm_count, bytes_LE.sum(axis=1), counts_LE @ flops_E


def weighted(terms: Sequence[LayerTerms], name: str) -> float:
    """Return a share of the whole step from shares of its layers."""
    return sum(t.ns * getattr(t, name) for t in terms) / sum(t.ns for t in terms)


def mean(terms: Sequence[LayerTerms], name: str) -> float:
    return sum(getattr(t, name) for t in terms) / len(terms)
