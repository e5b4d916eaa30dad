"""One launch over all SMs, its tile tuned: the control that every sliced policy must beat.

Wins where loads are even, or all experts are bound by the same thing: one persistent launch then comes within a few
percent of the floor. Loses where a few experts are bound by arithmetic beside many that are bound by memory.
"""

from dataclasses import dataclass

from .candidates import unsliced_plans
from .choice import Choice, Chooser
from .contract import Setup
from .layouts import one_slice_plan, unsliced_layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsliced(Chooser):
    """One shared slice; `tile` "auto" takes the tile that the belief finds cheapest on recent steps.

    Without a belief "auto" is the default tile.
    """

    tile: str = "auto"

    def init(self, setup: Setup) -> Choice:
        if self.tile == "auto":
            plans = unsliced_plans(setup)[: None if setup.belief is not None else 1]
        else:
            plans = (one_slice_plan(unsliced_layout(setup, setup.variant(self.tile).name)),)
        return Choice(setup=setup, plans=plans, num_unsliced=len(plans))
