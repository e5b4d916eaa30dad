"""One launch over all SMs, its tile tuned: the control that every sliced policy must beat.

Wins where loads are even, or all experts are bound by the same thing: one persistent launch then comes within a few
percent of the floor. Loses where a few experts are bound by arithmetic beside many that are bound by memory.
"""

from dataclasses import dataclass
from typing import ClassVar

from .candidates import layouts_of, unsliced_plans
from .choice import Choice, choose, is_due
from .contract import Observation, Plan, Setup, SliceLayout
from .layouts import one_slice_plan, unsliced_layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsliced:
    """One shared slice; `tile` "auto" takes the tile that the belief finds cheapest on recent steps.

    Without a belief "auto" is the default tile.
    """

    foresees: ClassVar[bool] = False
    reads_clock: ClassVar[bool] = False

    tile: str = "auto"
    plan_every: int = 32
    """Steps between choices of the tile."""
    num_samples: int = 2
    """Recent steps that a choice is priced on."""
    stickiness: float = 0.005
    """Fraction by which another tile must be cheaper."""

    def init(self, setup: Setup) -> Choice:
        plans = self._plans(setup)
        return Choice(setup=setup, plans=plans, num_unsliced=len(plans))

    def layouts(self, setup: Setup) -> tuple[SliceLayout, ...]:
        return layouts_of(self._plans(setup))

    def plan(self, obs: Observation, state: Choice) -> tuple[Plan, Choice]:
        if len(state.plans) > 1 and obs.counts_HLE.shape[0] and is_due(state, obs, self.plan_every):
            state = choose(state, obs, num_samples=self.num_samples, min_gain=0.0, stickiness=self.stickiness)
        return state.plan, state

    def _plans(self, setup: Setup) -> tuple[Plan, ...]:
        if self.tile == "auto":
            return unsliced_plans(setup) if setup.belief is not None else unsliced_plans(setup)[:1]
        return (one_slice_plan(unsliced_layout(setup, setup.variant(self.tile).name)),)
