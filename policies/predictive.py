"""The paper's adaptive policy: plans for the load that a predictor expects once the plan takes effect.

Meant for loads that drift within the control lag under a belief that tells plans apart; no trace has shown it winning
yet. Where the belief errs by more than slicing gains, the guard keeps it unsliced.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from .candidates import layouts_of, sharing_plans, splitting_plans, unsliced_plans
from .choice import Choice, choose, is_due
from .contract import Observation, Plan, Setup, SliceLayout
from .predictors import Predictor, drawn_counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PredictiveState:
    """The choice in place, and what was learned of the load up to a step."""

    choice: Choice
    predictor: Predictor
    learned_step: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictive:
    """Prices every candidate on draws from the predicted load; unsliced where there is no belief."""

    foresees: ClassVar[bool] = False
    reads_clock: ClassVar[bool] = False

    belief_error: float = 0.02
    """Fraction of the unsliced time that slicing must save: what the belief may be wrong by between plans."""
    plan_every: int = 32
    """Steps between choices."""
    num_samples: int = 2
    """Draws of the predicted load that a choice is priced on."""
    stickiness: float = 0.005
    """Fraction by which another plan must be cheaper than the one in place."""

    def init(self, setup: Setup) -> PredictiveState:
        plans, control = _plans(setup), setup.control
        choice = Choice(setup=setup, plans=plans, num_unsliced=len(unsliced_plans(setup)))
        return PredictiveState(
            choice=choice, predictor=Predictor(horizon=max(1, control.count_lag_steps + control.delay_steps))
        )

    def layouts(self, setup: Setup) -> tuple[SliceLayout, ...]:
        return layouts_of(_plans(setup))

    def plan(self, obs: Observation, state: PredictiveState) -> tuple[Plan, PredictiveState]:
        if not obs.counts_HLE.shape[0] or state.choice.setup.belief is None:
            return state.choice.plan, state
        fresh = obs.counts_HLE[-max(1, obs.step - state.learned_step) :]
        predictor = state.predictor
        for counts_LE in fresh:
            predictor = predictor.learn(counts_LE)
        choice = state.choice
        if is_due(choice, obs, self.plan_every) and obs.counts_HLE[-1].any():
            rows_L, seed = obs.counts_HLE[-1].sum(axis=1), choice.setup.seed
            draws = [drawn_counts(predictor.share_LE(), rows_L, (seed, obs.step, i)) for i in range(self.num_samples)]
            expected = replace(obs, counts_HLE=np.stack(draws).astype(np.int32))
            choice = choose(
                choice,
                expected,
                num_samples=self.num_samples,
                min_gain=self.belief_error,
                stickiness=self.stickiness,
            )
        return choice.plan, replace(state, choice=choice, predictor=predictor, learned_step=obs.step)


def _plans(setup: Setup) -> tuple[Plan, ...]:
    if setup.belief is None:
        return unsliced_plans(setup)[:1]
    return unsliced_plans(setup) + sharing_plans(setup) + splitting_plans(setup)
