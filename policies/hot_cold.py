"""Hot experts beside cold ones: few rows of many experts are bound by memory, many rows of few by arithmetic.

Wins where both kinds carry comparable time in the same layer: large weights, skewed loads, hundreds of tokens. Loses
where loads are even, and where every expert has so few rows that all are bound by memory: the guard then keeps the
unsliced launch.
"""

from dataclasses import dataclass

from .candidates import sharing_plans, splitting_plans, unsliced_plans
from .choice import Choice, Chooser
from .contract import Plan, Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class HotCold(Chooser):
    """Two slices and a rule by true token counts, the pair of tiles and the bound chosen by belief on recent steps.

    Guarded, it runs unsliced until the belief expects a gain above `min_gain`, so without a belief it never slices.
    Unguarded, it always slices where the device has a way to; without a belief by its first candidate.
    """

    guarded: bool = True
    min_gain: float = 0.02
    """Fraction of the unsliced time that slicing must save."""

    def init(self, setup: Setup) -> Choice:
        unsliced, sliced = self._plans(setup)
        plans = (*unsliced, *sliced)
        return Choice(setup=setup, plans=plans, num_unsliced=len(unsliced), min_gain=self.min_gain)

    def _plans(self, setup: Setup) -> tuple[tuple[Plan, ...], tuple[Plan, ...]]:
        if self.guarded and setup.belief is None:
            return unsliced_plans(setup)[:1], ()
        sliced = sharing_plans(setup) + splitting_plans(setup)
        if not self.guarded and sliced:
            return (), sliced
        return unsliced_plans(setup), sliced
