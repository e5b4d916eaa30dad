"""Legal sets of MIG instances, picked by belief and kept for a dwell time: changing them drains the device.

Wins where instances serve loads that would disturb each other. Loses where one model runs alone: experts on other
instances are reached through the host, and no instance may use another's idle SMs.

Shape letters: L MoE layers, E routed experts, S slices.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..traces.schema import I32
from .allocator import place_longest_first
from .candidates import auto_tiles
from .contract import Observation, Pinned, Plan, Setup, SliceLayout
from .layouts import switch_ns
from .mig import maximal_layouts, mig_layout


@dataclass(frozen=True, slots=True, kw_only=True)
class MigState:
    """The plan in force and when its instances were made."""

    setup: Setup
    plan: Plan
    since_step: int | None = None
    """None: before any load was seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigLayout:
    """Starts on the fewest instances; experts, heaviest first, go to the instance that finishes first."""

    foresees: ClassVar[bool] = False
    reads_clock: ClassVar[bool] = False

    dwell_steps: int = 512
    """Least steps between changes of instances, and those over which a change must pay for itself."""
    most_instances: int = 4
    """Sets of more instances are not considered."""

    def init(self, setup: Setup) -> MigState:
        layout = self.layouts(setup)[0]
        ids_LE = np.zeros((setup.model.num_layers, setup.model.num_experts), dtype=np.int16)
        return MigState(setup=setup, plan=Plan(layout=layout, placement=Pinned(slice_of_expert_LE=ids_LE)))

    def layouts(self, setup: Setup) -> tuple[SliceLayout, ...]:
        """Return a layout of each set of profiles, the fewest instances first.

        Raises:
            ValueError: MIG is not allowed or the device has no such set.
        """
        if "mig" not in setup.mechanisms:
            raise ValueError("mig_layout needs the mechanism mig; allow it or leave the policy out")
        tile, found = auto_tiles(setup)[0].name, dict[tuple[str, ...], SliceLayout]()
        for placements in sorted(maximal_layouts(setup.device), key=len):
            if len(placements) <= self.most_instances:
                profiles = tuple(sorted(place.profile for place in placements))
                found.setdefault(profiles, mig_layout(setup.device, placements, (tile,) * len(placements)))
        if not found:
            raise ValueError(f"{setup.device.name} has no MIG layout of at most {self.most_instances} instances")
        return tuple(found.values())

    def plan(self, obs: Observation, state: MigState) -> tuple[Plan, MigState]:
        waits = state.since_step is not None and 0 <= obs.step - state.since_step < self.dwell_steps
        if waits or state.setup.belief is None or not obs.counts_HLE.any() or not obs.counts_HLE[-1].any():
            return state.plan, state
        newest_LE = obs.counts_HLE[-1]
        plans = [_placed(layout, obs.counts_HLE) for layout in self.layouts(state.setup)]
        here = next(plan for plan in plans if plan.layout == state.plan.layout)
        # Making the first instances costs the same whatever they are.
        first, device = state.since_step is None, state.setup.device
        costs = [
            self.dwell_steps * state.setup.belief.step_ns(plan, newest_LE)
            + (0 if first else switch_ns(here.layout, plan.layout, device))
            for plan in plans
        ]
        plan = plans[int(np.argmin(costs))]
        return plan, replace(state, plan=plan, since_step=obs.step)


def _placed(layout: SliceLayout, counts_HLE: I32) -> Plan:
    speed_S = np.asarray([one.sm_count for one in layout.slices], dtype=np.float64)
    ids_LE = place_longest_first(counts_HLE.mean(axis=0), speed_S)
    return Plan(layout=layout, placement=Pinned(slice_of_expert_LE=ids_LE))
