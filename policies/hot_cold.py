"""Hot experts beside cold ones: few rows of many experts are bound by memory, many rows of few by arithmetic.

Wins where both kinds carry comparable time in the same layer: large weights, skewed loads, hundreds of tokens. Loses
where loads are even, and where every expert has so few rows that all are bound by memory: the guard then keeps the
unsliced launch.
"""

from dataclasses import dataclass
from typing import ClassVar

from .candidates import layouts_of, sharing_plans, splitting_plans, unsliced_plans
from .choice import Choice, choose, is_due
from .contract import Observation, Plan, Setup, SliceLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class HotCold:
    """Two slices and a rule by true token counts, the pair of tiles and the bound chosen by belief on recent steps.

    Guarded, it runs unsliced until the belief expects a gain above `min_gain`, so without a belief it never slices.
    Unguarded, it always slices where the device has a way to; without a belief by its first candidate.
    """

    foresees: ClassVar[bool] = False
    reads_clock: ClassVar[bool] = False

    guarded: bool = True
    min_gain: float = 0.02
    """Fraction of the unsliced time that slicing must save."""
    plan_every: int = 32
    """Steps between choices."""
    num_samples: int = 2
    """Recent steps that a choice is priced on."""
    stickiness: float = 0.005
    """Fraction by which another plan must be cheaper than the one in place."""

    def init(self, setup: Setup) -> Choice:
        unsliced, sliced = self._plans(setup)
        return Choice(setup=setup, plans=(*unsliced, *sliced), num_unsliced=len(unsliced))

    def layouts(self, setup: Setup) -> tuple[SliceLayout, ...]:
        unsliced, sliced = self._plans(setup)
        return layouts_of((*unsliced, *sliced))

    def plan(self, obs: Observation, state: Choice) -> tuple[Plan, Choice]:
        if obs.counts_HLE.shape[0] and is_due(state, obs, self.plan_every):
            state = choose(state, obs, num_samples=self.num_samples, min_gain=self.min_gain, stickiness=self.stickiness)
        return state.plan, state

    def _plans(self, setup: Setup) -> tuple[tuple[Plan, ...], tuple[Plan, ...]]:
        if self.guarded and setup.belief is None:
            return unsliced_plans(setup)[:1], ()
        sliced = sharing_plans(setup) + splitting_plans(setup)
        if not self.guarded and sliced:
            return (), sliced
        return unsliced_plans(setup), sliced
