"""The paper's adaptive policy: hot beside cold, chosen by belief for the load that an online predictor expects.

Wins where the belief is right about who gains and loads drift slowly under the noise of steps. Loses nothing but the
gain where the belief is wrong in size: it measures no step, and stays unsliced when it expects too little.

Shape letters: L MoE layers, E routed experts.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..traces.schema import F64, I32, Ints
from .candidates import helping_plans, layouts_of, unsliced_plans
from .choice import Choice, choose, is_due
from .contract import Observation, Plan, Setup, SliceLayout
from .predictor import Predictor, untrained


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PredictiveState:
    """The choice in force and what was learned about loads."""

    choice: Choice
    predictor: Predictor


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictive:
    """Prices plans whose slices help each other on draws from the expected load; unsliced without enough gain."""

    foresees: ClassVar[bool] = False
    reads_clock: ClassVar[bool] = False

    plan_every: int = 32
    """Steps between choices."""
    num_samples: int = 2
    """Draws that a choice is priced on."""
    stickiness: float = 0.005
    """Fraction by which another plan must be cheaper than the one in place."""
    min_gain: float = 0.005
    """Fraction of the unsliced time that slicing must save."""

    def init(self, setup: Setup) -> PredictiveState:
        unsliced, sliced = _plans(setup)
        choice = Choice(setup=setup, plans=(*unsliced, *sliced), num_unsliced=len(unsliced), min_gain=self.min_gain)
        horizon = max(1, setup.control.count_lag_steps + setup.control.delay_steps)
        predictor = untrained(setup.model.num_layers, setup.model.num_experts, horizon)
        return PredictiveState(choice=choice, predictor=predictor)

    def layouts(self, setup: Setup) -> tuple[SliceLayout, ...]:
        unsliced, sliced = _plans(setup)
        return layouts_of((*unsliced, *sliced))

    def plan(self, obs: Observation, state: PredictiveState) -> tuple[Plan, PredictiveState]:
        if not obs.counts_HLE.any():
            return state.choice.plan, state
        state = replace(state, predictor=state.predictor.learned(obs.counts_HLE))
        rows_L = obs.counts_HLE[-1].sum(axis=1)
        if rows_L.any() and is_due(state.choice, obs, self.plan_every):
            share_LE = state.predictor.predicted(obs.counts_HLE)
            seeds = [(state.choice.setup.seed, obs.step, i) for i in range(self.num_samples)]
            samples = [drawn_counts(share_LE, rows_L, seed) for seed in seeds]
            state = replace(state, choice=choose(state.choice, obs, samples, self.stickiness))
        return state.choice.plan, state


def _plans(setup: Setup) -> tuple[tuple[Plan, ...], tuple[Plan, ...]]:
    if setup.belief is None:
        return unsliced_plans(setup)[:1], ()
    return unsliced_plans(setup), helping_plans(setup)


def drawn_counts(load_LE: F64, rows_L: Ints, seed: tuple[int, ...]) -> I32:
    """Return so many rows drawn in proportion to a load: its mean would make every rare expert look active.

    Experts are drawn in order of their load, so that renaming them renames the draw.
    """
    order_LE = np.argsort(-load_LE, axis=1, kind="stable")
    sorted_LE = np.take_along_axis(load_LE, order_LE, axis=1)
    share_LE = sorted_LE / np.maximum(sorted_LE.sum(axis=1, keepdims=True), 1e-12)
    # An idle layer has no load; it draws no row either.
    share_LE[:, -1] += 1.0 - share_LE.sum(axis=1)
    drawn_LE = np.random.default_rng(seed).multinomial(rows_L, np.clip(share_LE, 0.0, 1.0))
    counts_LE = np.zeros(load_LE.shape, dtype=np.int32)
    np.put_along_axis(counts_LE, order_LE, drawn_LE.astype(np.int32), axis=1)
    return counts_LE
