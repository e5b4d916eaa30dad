"""Searches layouts, splits, bounds and tile orders by belief, and tries what it likes for a few steps before it stays.

Meant for loads under which one plan is better for long and the belief errs by more than the gain: what a trial took
decides. It pays for its trials where nothing is gained, and does not find a plan that suits only some steps; no
committed run shows it winning yet.

Shape letters: A arms: the tuned unsliced launch first, then every sliced plan.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..traces.schema import F64
from .candidates import layouts_of, sharing_plans, unsliced_plans
from .choice import Choice, choose, is_due, plan_costs_ns
from .contract import Observation, Plan, Setup, SliceLayout
from .oracle import candidate_plans

TRIAL_STEPS = 3
"""The first pays for the switch, the last may still run: the one between is measured."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannerState:
    """What is believed and was measured of every arm, as a multiple of what the belief gives the unsliced launch."""

    choice: Choice
    """Among the unsliced plans."""
    sliced: tuple[Plan, ...]
    believed_A: F64
    """NaN until an arm was priced."""
    measured_A: F64
    """NaN until an arm was measured."""
    arm: int = 0
    """The one in place."""
    spread: float = 0.0
    """Smoothed absolute error of the measures of the arm in place."""
    next_price: int = 0
    start_step: int = 0
    """When the running trial started, or from when the next one may."""
    trial: int | None = None
    tries: int = 0
    ran: tuple[int, ...] = ()
    """The arms decided last, newest last."""

    def __post_init__(self) -> None:
        self.believed_A.flags.writeable = False
        self.measured_A.flags.writeable = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Unsliced until a trial was faster than the arm in place by more than its measures scatter."""

    foresees: ClassVar[bool] = False
    reads_clock: ClassVar[bool] = True

    price_ns: int = 10_000
    """Charged for pricing one plan: a decision prices as many as the control's plan_ns pays for, at least one."""
    optimism: float = 0.05
    """Fraction by which the belief may make a plan look slower than the one in place and have it tried still."""
    min_gain: float = 0.002
    """Least fraction by which a trial must be faster."""
    trial_every: int = 8
    """Steps from one trial to the next."""
    max_trials: int = 16
    smoothing: float = 0.1
    """Weight of the newest measure of the arm in place."""
    plan_every: int = 32
    """Steps between choices of the unsliced tile."""

    def init(self, setup: Setup) -> PlannerState:
        unsliced, sliced = _plans(setup)
        choice = Choice(setup=setup, plans=unsliced, num_unsliced=len(unsliced))
        unknown_A = np.full(len(sliced) + 1, np.nan)
        return PlannerState(choice=choice, sliced=sliced, believed_A=unknown_A, measured_A=unknown_A.copy())

    def layouts(self, setup: Setup) -> tuple[SliceLayout, ...]:
        unsliced, sliced = _plans(setup)
        return layouts_of((*unsliced, *sliced))

    def plan(self, obs: Observation, state: PlannerState) -> tuple[Plan, PlannerState]:
        setup = state.choice.setup
        if setup.belief is not None and obs.counts_HLE.any() and obs.counts_HLE[-1].any():
            base_ns = float(plan_costs_ns(setup, [state.choice.plan], obs.counts_HLE[-1])[0])
            state = self._decided(obs, self._measured(obs, self._priced(obs, state, base_ns), base_ns))
            if is_due(state.choice, obs, self.plan_every):
                choice = choose(state.choice, obs, num_samples=2, min_gain=0.0, stickiness=0.005)
                state = replace(state, choice=choice)
        arm = state.arm if state.trial is None else state.trial
        state = replace(state, ran=(*state.ran, arm)[-(TRIAL_STEPS + _lag(setup)) :])
        return (state.sliced[arm - 1] if arm else state.choice.plan), state

    def _priced(self, obs: Observation, state: PlannerState, base_ns: float) -> PlannerState:
        """Price the next sliced plans in turn, as many as the decision pays for beside the unsliced one."""
        setup, count = state.choice.setup, len(state.sliced)
        num = min(count, max(1, setup.control.plan_ns // max(1, self.price_ns) - 1))
        at = (state.next_price + np.arange(num)) % max(1, count)
        believed_A = state.believed_A.copy()
        believed_A[0] = 1.0
        believed_A[1 + at] = plan_costs_ns(setup, [state.sliced[i] for i in at], obs.counts_HLE[-1]) / base_ns
        return replace(state, believed_A=believed_A, next_price=(state.next_price + num) % max(1, count))

    def _measured(self, obs: Observation, state: PlannerState, base_ns: float) -> PlannerState:
        """Take in what the newest completed step took, if the arms around it are one and the same."""
        lag = _lag(state.choice.setup)
        around = state.ran[len(state.ran) - lag - 1 : len(state.ran) - lag + 2]
        if not obs.step_ns or len(state.ran) < TRIAL_STEPS + lag or len(set(around)) != 1:
            return state
        arm, measured_A, spread = around[0], state.measured_A.copy(), state.spread
        taken, before = obs.step_ns / base_ns, float(measured_A[arm])
        measured_A[arm] = taken if np.isnan(before) else before + self.smoothing * (taken - before)
        if arm == state.arm and not np.isnan(before):
            spread += self.smoothing * (abs(taken / before - 1.0) - spread)
        return replace(state, measured_A=measured_A, spread=spread)

    def _decided(self, obs: Observation, state: PlannerState) -> PlannerState:
        """Stay with the fastest arm measured, and start or end a trial."""
        here = float(state.measured_A[state.arm])
        if state.trial is not None:
            over = obs.step >= state.start_step + TRIAL_STEPS
            return replace(state, trial=None, start_step=obs.step + self.trial_every) if over else state
        if np.isnan(here) or obs.step < state.start_step:
            return state
        if np.nanmin(state.measured_A) < here * (1.0 - max(self.min_gain, state.spread)):
            return replace(state, arm=int(np.nanargmin(state.measured_A)), start_step=obs.step + self.trial_every)
        hoped_A = np.where(np.isnan(state.measured_A) & np.isfinite(state.believed_A), state.believed_A, np.inf)
        hoped = int(hoped_A.argmin())
        hopeless = hoped_A[hoped] > (1.0 + self.optimism) * state.believed_A[state.arm]
        if hopeless or state.tries >= self.max_trials:
            return state
        return replace(state, trial=hoped, tries=state.tries + 1, start_step=obs.step)


def _lag(setup: Setup) -> int:
    return setup.control.count_lag_steps + setup.control.delay_steps


def _plans(setup: Setup) -> tuple[tuple[Plan, ...], tuple[Plan, ...]]:
    """Return unsliced plans, and sliced ones: none without a belief."""
    unsliced = unsliced_plans(setup)
    if setup.belief is None:
        return unsliced[:1], ()
    heavy = tuple(replace(plan, tile_order="heavy") for plan in sharing_plans(setup))
    return unsliced, candidate_plans(setup)[len(unsliced) :] + heavy
