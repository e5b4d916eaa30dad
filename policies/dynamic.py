"""Feedback on how busy slices were: experts move from the busiest slice to the least utilised one.

Wins where the time of an expert is not what its tokens say and loads drift slower than it moves. Loses on loads that
change every step: it chases the step before, and on exclusive slices a wrong guess idles SMs.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..traces.schema import F64, I16, I64, Bools
from .allocator import place_longest_first
from .contract import Mechanism, Observation, Pinned, Plan, Setup, SliceLayout
from .static import equal_layouts, round_robin, suited_layout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DynamicState:
    """The plan in force and what the feedback remembers of each layer; arrays are read-only."""

    setup: Setup
    plan: Plan
    placed: bool
    busy_ns_LS: F64
    """Smoothed; 0 until a layer was seen under its present placement."""
    moving_L: Bools
    """Whether a layer's imbalance has passed `enter` and not yet fallen below `leave`."""
    held_until_L: I64
    """Step before which a layer stays as it is."""

    def __post_init__(self) -> None:
        for array in (self.busy_ns_LS, self.moving_L, self.held_until_L):
            array.flags.writeable = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic:
    """Equal slices; placed by load on the first counts, then corrected by busy times, few moves at a time."""

    foresees: ClassVar[bool] = False
    reads_clock: ClassVar[bool] = True

    num_slices: int = 4
    mechanism: Mechanism = "green_context"
    tile: str = "auto"
    enter: float = 0.2
    """A layer starts moving experts when its busiest slice is busier than the idlest by this fraction of itself."""
    leave: float = 0.1
    """And stops below this one."""
    hold_steps: int = 8
    """Steps that a layer rests after a move: until its effect has come back, and longer."""
    max_moves: int = 8
    """Experts moved in one decision, over all layers."""
    smoothing: float = 0.5
    """Weight of the newest busy time."""

    def init(self, setup: Setup) -> DynamicState:
        num_layers = setup.model.num_layers
        ids_LE = round_robin(setup, self.num_slices)
        return DynamicState(
            setup=setup,
            plan=Plan(layout=self.layouts(setup)[0], placement=Pinned(slice_of_expert_LE=ids_LE)),
            placed=False,
            busy_ns_LS=np.zeros((num_layers, self.num_slices)),
            moving_L=np.zeros(num_layers, dtype=np.bool_),
            held_until_L=np.zeros(num_layers, dtype=np.int64),
        )

    def layouts(self, setup: Setup) -> tuple[SliceLayout, ...]:
        return equal_layouts(setup, self.num_slices, self.mechanism, self.tile)

    def plan(self, obs: Observation, state: DynamicState) -> tuple[Plan, DynamicState]:
        if not state.placed:
            if obs.counts_HLE.any():
                state = self._place(obs, state)
        elif obs.busy_ns_LS.shape == state.busy_ns_LS.shape and obs.busy_ns_LS.any():
            state = self._correct(obs, state)
        return state.plan, state

    def _place(self, obs: Observation, state: DynamicState) -> DynamicState:
        layout = suited_layout(state.setup, self.layouts(state.setup), obs.counts_HLE[-1])
        speed_S = np.asarray([one.sm_count for one in layout.slices], dtype=np.float64)
        ids_LE = place_longest_first(obs.counts_HLE.mean(axis=0), speed_S)
        plan = replace(state.plan, layout=layout, placement=Pinned(slice_of_expert_LE=ids_LE))
        held_L = np.full_like(state.held_until_L, obs.step + self.hold_steps)
        return replace(state, plan=plan, placed=True, held_until_L=held_L)

    def _correct(self, obs: Observation, state: DynamicState) -> DynamicState:
        rests_L = obs.step < state.held_until_L
        fresh_LS = np.where(state.busy_ns_LS > 0, state.busy_ns_LS, obs.busy_ns_LS)
        busy_LS: F64 = np.asarray(fresh_LS + self.smoothing * (obs.busy_ns_LS - fresh_LS), np.float64)
        # While a layer rests its times may still be those of the placement before.
        busy_LS[rests_L] = 0.0
        most_L, gap_L = busy_LS.max(axis=1), np.ptp(busy_LS, axis=1)
        moving_L = ~rests_L & (gap_L > np.where(state.moving_L, self.leave, self.enter) * most_L)
        candidates = np.flatnonzero(moving_L)
        chosen = candidates[np.argsort(-gap_L[candidates], kind="stable")][: self.max_moves]
        state = replace(state, busy_ns_LS=busy_LS, moving_L=moving_L)
        assert isinstance(state.plan.placement, Pinned)
        ids_LE = state.plan.placement.slice_of_expert_LE.copy()
        held_L = state.held_until_L.copy()
        load_LE = obs.counts_HLE.mean(axis=0)
        for layer in chosen.tolist():
            if move := _move(load_LE[layer], busy_LS[layer], ids_LE[layer]):
                expert_id, slice_id = move
                ids_LE[layer, expert_id] = slice_id
                held_L[layer] = obs.step + self.hold_steps
        if (held_L == state.held_until_L).all():
            return state
        plan = replace(state.plan, placement=Pinned(slice_of_expert_LE=ids_LE))
        return replace(state, plan=plan, held_until_L=held_L)


def _move(load_E: F64, busy_S: F64, ids_E: I16) -> tuple[int, int] | None:
    """Return the expert of the busiest slice whose move evens it best, and the idlest slice, which gets it.

    None when every move hurts. A slice's time is shared among its experts by load. Ties: the heavier expert, then the
    lower id.
    """
    busiest, idlest, gap = int(busy_S.argmax()), int(busy_S.argmin()), float(np.ptp(busy_S))
    there_E = np.where(ids_E == busiest, load_E, 0.0)
    time_E = busy_S[busiest] * there_E / (there_E.sum() or 1.0)
    helps_E = (time_E > 0) & (time_E < gap)
    if not helps_E.any():
        return None
    off_E = np.where(helps_E, np.abs(time_E - gap / 2), np.inf)
    return int(np.lexsort((-there_E, off_E))[0]), idlest
