"""Slices sized in proportion to load: the paper's proportional policy, over what binds each expert.

Wins where hot experts carry a stable share of the time and the partition grid has a split near it. Loses where the
share wanders between splits, where no split fits, and wherever idle SMs of one slice could have helped the other.

Shape letters: L MoE layers, E routed experts, S slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..traces.schema import F64, I16, Bools, Floats
from .allocator import place_longest_first
from .candidates import auto_tiles, exclusive_slice, snap_sms
from .contract import Observation, Pinned, Plan, Setup, SliceLayout
from .layouts import fallback_plan
from .static import round_robin

TOKENS = (0, *(1 << power for power in range(15)))
"""Counts at which experts are weighed; between them the weight is linear, beyond them in proportion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weight of an expert by its tokens: at `TOKENS`, for one of mean width."""

    weights: tuple[float, ...]
    width_E: tuple[float, ...]
    """Each expert's width as a multiple of the mean."""

    def of(self, counts_LE: Floats) -> F64:
        """Return the weight of every expert; 0 without tokens."""
        beyond_LE = np.maximum(counts_LE - TOKENS[-1], 0.0) * (self.weights[-1] / TOKENS[-1])
        return (np.interp(counts_LE, TOKENS, self.weights) + beyond_LE) * np.asarray(self.width_E)


def weights_of(setup: Setup) -> Weights:
    """Return weights by the belief, in ns of the whole device with all experts alike busy; without one, tokens."""
    widths = np.asarray([setup.model.d_ff_of(e) for e in range(setup.model.num_experts)], dtype=np.float64)
    costs: Sequence[float] = TOKENS
    if setup.belief is not None:
        plan, alike_E = fallback_plan(setup), np.ones(len(widths), dtype=np.int32)
        costs = [setup.belief.layer_ns(plan, 0, alike_E * np.int32(count)) / len(widths) for count in TOKENS]
    # More tokens never weigh less, whatever a belief's waves do.
    rising = np.maximum.accumulate(np.asarray(costs, dtype=np.float64) - costs[0])
    return Weights(weights=tuple(rising.tolist()), width_E=tuple((widths / widths.mean()).tolist()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProportionalState:
    """The plan in force and when it was made; `splits` are the layouts to choose from, by the hot slice's share."""

    weights: Weights
    splits: tuple[tuple[float, SliceLayout], ...]
    plan: Plan
    decided_step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Proportional:
    """A hot slice beside `num_slices` - 1 equal cold ones, on SMs of their own, from a few captured splits.

    Experts above `hot_factor` times the mean weight are hot. The split nearest to their share of the weight is taken;
    hot experts are pinned to the hot slice, and the others, heaviest first, to the slice that finishes first.
    """

    foresees: ClassVar[bool] = False
    reads_clock: ClassVar[bool] = False

    num_slices: int = 2
    hot_factor: float = 2.0
    shares: tuple[float, ...] = (0.25, 0.375, 0.5, 0.625, 0.75)
    """Shares of the SMs that the hot slice may have."""
    plan_every: int = 16

    def init(self, setup: Setup) -> ProportionalState:
        splits = self._splits(setup)
        placement = Pinned(slice_of_expert_LE=round_robin(setup, self.num_slices))
        middle = splits[len(splits) // 2][1]
        return ProportionalState(
            weights=weights_of(setup), splits=splits, plan=Plan(layout=middle, placement=placement)
        )

    def layouts(self, setup: Setup) -> tuple[SliceLayout, ...]:
        return tuple(layout for _, layout in self._splits(setup))

    def plan(self, obs: Observation, state: ProportionalState) -> tuple[Plan, ProportionalState]:
        decided = state.decided_step
        if (decided is not None and 0 <= obs.step - decided < self.plan_every) or not obs.counts_HLE.any():
            return state.plan, state
        weight_LE = state.weights.of(obs.counts_HLE.mean(axis=0))
        hot_LE = weight_LE > self.hot_factor * weight_LE.mean(axis=1, keepdims=True)
        share = float((weight_LE * hot_LE).sum() / weight_LE.sum())
        layout = min(state.splits, key=lambda split: (abs(split[0] - share), split[0]))[1]
        plan = Plan(layout=layout, placement=Pinned(slice_of_expert_LE=_pin(weight_LE, hot_LE, layout)))
        return plan, replace(state, plan=plan, decided_step=obs.step)

    def _splits(self, setup: Setup) -> tuple[tuple[float, SliceLayout], ...]:
        if self.num_slices < 2:
            raise ValueError(f"proportional with {self.num_slices} slices; give at least 2")
        device, tiles = setup.device, auto_tiles(setup)
        splits: dict[float, SliceLayout] = {}
        for share in self.shares:
            hot_sms = snap_sms(share * device.sm_count, device)
            step = device.sm_partition_step
            cold_sms = (device.sm_count - hot_sms) // (self.num_slices - 1) // step * step
            if cold_sms >= device.sm_partition_min:
                slices = (exclusive_slice(device, tiles[-1], hot_sms),)
                slices += (exclusive_slice(device, tiles[0], cold_sms),) * (self.num_slices - 1)
                splits[hot_sms / device.sm_count] = SliceLayout(slices=slices)
        if not splits:
            raise ValueError(f"{device.name} has no room for {self.num_slices} slices of its SMs; take fewer")
        return tuple(sorted(splits.items()))


def _pin(weight_LE: F64, hot_LE: Bools, layout: SliceLayout) -> I16:
    speed_S = np.asarray([one.sm_count for one in layout.slices], dtype=np.float64)
    busy_LS = np.zeros((len(weight_LE), layout.num_slices))
    busy_LS[:, 0] = (weight_LE * hot_LE).sum(axis=1) / speed_S[0]
    ids_LE = place_longest_first(np.where(hot_LE, 0.0, weight_LE), speed_S, busy_LS=busy_LS)
    return np.where(hot_LE, 0, ids_LE).astype(np.int16)
