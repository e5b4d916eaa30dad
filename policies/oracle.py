"""A bound, not deployable: the cheapest of an enumerated set of plans for the true counts of the coming step.

It sees what no policy can and decides free of charge, under the simulator's own costs. It bounds the plans in its set,
not what slicing could do at best. Where switching layouts is charged it looks one step ahead and leaves one only for
more than the switch costs; `drive` gives it free switches.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from .candidates import helping_plans, layouts_of, sharing_plans, splitting_plans, unsliced_plans
from .choice import Choice, plan_costs_ns
from .contract import Mechanism, Observation, Pinned, Plan, Setup, SliceLayout
from .layouts import switch_ns
from .static import equal_layouts, round_robin

STATIC_MECHANISMS: tuple[Mechanism, ...] = ("green_context", "sm_budget", "shared")
STATIC_SLICES = 4


def candidate_plans(setup: Setup) -> tuple[Plan, ...]:
    """Return every plan that the shipped policies may choose from: unsliced, hot beside cold, and static slices."""
    static = tuple(
        Plan(layout=layout, placement=Pinned(slice_of_expert_LE=round_robin(setup, STATIC_SLICES)))
        for mechanism in STATIC_MECHANISMS
        if mechanism in setup.mechanisms
        for layout in equal_layouts(setup, STATIC_SLICES, mechanism, "auto")
    )
    shared = sharing_plans(setup) + helping_plans(setup)
    return unsliced_plans(setup) + shared + splitting_plans(setup) + static


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle:
    """Takes the cheapest of `candidate_plans` for the coming step; ties go to the earlier one."""

    foresees: ClassVar[bool] = True
    reads_clock: ClassVar[bool] = False

    def init(self, setup: Setup) -> Choice:
        return Choice(setup=setup, plans=candidate_plans(setup))

    def layouts(self, setup: Setup) -> tuple[SliceLayout, ...]:
        return layouts_of(candidate_plans(setup))

    def plan(self, obs: Observation, state: Choice) -> tuple[Plan, Choice]:
        if obs.coming_LE is not None and obs.coming_LE.any() and state.setup.belief is not None:
            costs = plan_costs_ns(state.setup, state.plans, obs.coming_LE)
            if not state.setup.control.free_switches:
                costs += [switch_ns(state.plan.layout, plan.layout, state.setup.device) for plan in state.plans]
            if np.isfinite(costs).any():
                state = replace(state, index=int(costs.argmin()))
        return state.plan, state
