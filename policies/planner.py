"""Searches tiles, splits and rules: prices them by belief, tries what the belief likes, keeps what was fastest.

Wins where one plan is better for a while and the belief errs by more than the gain: what its trials took decides, for
loads of each size on their own. Loses its trials, a bounded part of the time, where nothing is gained.

Shape letters: A arms: the control first, then other plans; B buckets: powers of two of a step's tokens.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..traces.schema import F64, I32
from .candidates import helping_plans, layouts_of, splitting_plans
from .choice import Choice, choose, is_due, sampled_steps
from .contract import Observation, Plan, Setup, SliceLayout
from .layouts import switch_ns
from .unsliced import Unsliced

BUCKETS = 16
CONTROL = Unsliced()
"""What arm 0 is, and what must be beaten."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannerState:
    """What is believed and was measured of every arm, as a multiple of what the belief gives one unsliced launch."""

    control: Choice
    plans: tuple[Plan, ...]
    """Of the arms beyond the control."""
    believed_A: F64
    """NaN until an arm was priced."""
    measured_BA: F64
    """NaN until an arm was tried on loads of that size."""
    arm: int = 0
    """The one in place."""
    trial: int | None = None
    trial_ends: int = 0
    """The step at which the newest trial was or is over."""
    ran: tuple[int, ...] = ()
    """The arms decided last, newest last."""
    credit_ns: int = 0
    """Decision time that was charged and not yet spent."""
    next_price: int = 0
    priced_last: bool = False
    """Pricing and measuring take turns, but for trials, which are measured."""
    lost_ns: float = 0.0
    """Time beyond the control's, as far as measured, and switches for trials; what is gained pays it back."""
    seen_ns: int = 0
    """Time of all steps."""
    measured_step: int = 0

    def __post_init__(self) -> None:
        self.believed_A.flags.writeable = False
        self.measured_BA.flags.writeable = False

    def plan_of(self, arm: int) -> Plan:
        return self.plans[arm - 1] if arm else self.control.plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Stays with the arm that was measured fastest on steps of the coming size, and tries others now and then.

    Guarded: while trials and wrong choices have cost more than `max_loss` of the time, the control runs.
    """

    foresees: ClassVar[bool] = False
    reads_clock: ClassVar[bool] = True

    price_ns: int = 150_000
    """Decision time that pricing one arm takes; it is saved up from what the control plane charges each decision."""
    optimism: float = 0.015
    """Fraction by which the belief may make an arm look slower than the best and have it tried still."""
    min_gain: float = 0.002
    """Fraction by which an arm must have been faster than the control, and another arm than the one in place."""
    max_loss: float = 0.002
    """Part of the time that trials and wrong choices may cost."""
    rest_steps: int = 2
    """Steps between trials."""
    smoothing: float = 0.2
    """Weight of the newest measure of an arm."""

    def init(self, setup: Setup) -> PlannerState:
        control, plans = CONTROL.init(setup), _plans(setup)
        unknown_A = np.full(1 + len(plans), np.nan)
        return PlannerState(
            control=control, plans=plans, believed_A=unknown_A, measured_BA=np.tile(unknown_A, (BUCKETS, 1))
        )

    def layouts(self, setup: Setup) -> tuple[SliceLayout, ...]:
        return layouts_of((*CONTROL.init(setup).plans, *_plans(setup)))

    def plan(self, obs: Observation, state: PlannerState) -> tuple[Plan, PlannerState]:
        setup = state.control.setup
        if setup.belief is not None and obs.counts_HLE.any() and obs.counts_HLE[-1].any():
            if is_due(state.control, obs, CONTROL.plan_every):
                samples = sampled_steps(obs.counts_HLE, CONTROL.num_samples)
                state = replace(state, control=choose(state.control, obs, samples, CONTROL.stickiness))
            credit_ns, seen_ns = state.credit_ns + setup.control.plan_ns, state.seen_ns + obs.step_ns
            state = self._learned(obs, replace(state, credit_ns=credit_ns, seen_ns=seen_ns))
            state = self._chosen(obs, state)
        arm = state.arm if state.trial is None else state.trial
        state = replace(state, ran=(*state.ran, arm)[-2 - _lag(setup) :])
        return state.plan_of(arm), state

    def _learned(self, obs: Observation, state: PlannerState) -> PlannerState:
        """Measure what ran, or price the next arm, as far as the credit goes."""
        counts_LE, arm = obs.counts_HLE[-1], _settled(state)
        measures = arm is not None and obs.step_ns > 0 and (state.trial is not None or state.priced_last)
        cost_ns = self.price_ns * (1 if measures else 2)
        if state.credit_ns < cost_ns:
            return state
        state = replace(state, credit_ns=state.credit_ns - cost_ns, priced_last=not measures)
        base_ns = _believed_ns(state, state.control.plans[0], counts_LE)
        if arm is not None and measures:
            return self._measured(obs, state, arm, base_ns)
        believed_A, at = state.believed_A.copy(), state.next_price
        believed_A[at] = _believed_ns(state, state.plan_of(at), counts_LE) / base_ns
        return replace(state, believed_A=believed_A, next_price=(at + 1) % len(believed_A))

    def _measured(self, obs: Observation, state: PlannerState, arm: int, base_ns: float) -> PlannerState:
        bucket = _bucket(state, obs.counts_HLE[-1])
        measured_BA, taken = state.measured_BA.copy(), obs.step_ns / base_ns
        before, control = measured_BA[bucket, arm], measured_BA[bucket, 0]
        measured_BA[bucket, arm] = taken if np.isnan(before) else before + self.smoothing * (taken - before)
        # Of the control itself only the noise would be counted. A measure stands for the steps since the last one.
        steps = 1 if arm == state.trial else obs.step - state.measured_step
        more_ns = (taken - control) * base_ns * steps if arm and not np.isnan(control) else 0.0
        return replace(
            state,
            measured_BA=measured_BA,
            lost_ns=max(0.0, state.lost_ns + more_ns),
            measured_step=obs.step,
            trial=None if arm == state.trial else state.trial,
        )

    def _chosen(self, obs: Observation, state: PlannerState) -> PlannerState:
        """Take the fastest arm that was measured on such steps, and start or end a trial."""
        bucket, dwell = _bucket(state, obs.counts_HLE[-1]), _dwell(state, obs.counts_HLE)
        if state.trial is not None and obs.step < state.trial_ends and dwell > 1:
            return state
        measured_A, may_lose_ns = state.measured_BA[bucket], self.max_loss * state.seen_ns
        arm = self._fastest(obs, state, measured_A, dwell) if state.lost_ns <= may_lose_ns else 0
        state = replace(state, trial=None, arm=arm)
        tries = dwell >= TRIAL_DWELL and obs.step >= state.trial_ends + self.rest_steps and not np.isnan(measured_A[0])
        hoped = self._hoped(state, bucket) if tries else None
        if hoped is None:
            return state
        lost_ns = state.lost_ns + _change_ns(state, arm, hoped) + _change_ns(state, hoped, arm)
        if lost_ns > may_lose_ns:
            return state
        # Time to take effect, to be seen, and to be paid for.
        setup = state.control.setup
        longest = 2 + _lag(setup) + -(-self.price_ns // max(1, setup.control.plan_ns))
        return replace(state, trial=hoped, trial_ends=obs.step + longest, lost_ns=lost_ns)

    def _fastest(self, obs: Observation, state: PlannerState, measured_A: F64, dwell: int) -> int:
        """Return the arm to run: another than that in place only for more than the switch costs meanwhile."""
        if np.isnan(measured_A[0]) or np.isnan(measured_A[state.arm]):
            return state.arm
        arm = int(np.nanargmin(measured_A))
        if measured_A[arm] > (1.0 - self.min_gain) * measured_A[0]:
            arm = 0
        if arm == state.arm:
            return arm
        least = self.min_gain + _change_ns(state, state.arm, arm) / (dwell * max(1, obs.step_ns))
        return arm if measured_A[arm] < (1.0 - least) * measured_A[state.arm] else state.arm

    def _hoped(self, state: PlannerState, bucket: int) -> int | None:
        """Return the arm most worth a trial: not measured on such steps, and believed not much slower.

        What was slower on steps of about that size needs no trial.
        """
        near_BA = state.measured_BA[max(0, bucket - 1) : bucket + 2]
        slow_A = (near_BA > (1.0 + self.optimism / 3) * near_BA[:, :1]).any(axis=0)
        open_A = np.isnan(state.measured_BA[bucket]) & np.isfinite(state.believed_A) & ~slow_A
        untried_A = np.where(open_A, state.believed_A, np.inf)
        hoped = int(untried_A.argmin())
        known_A = state.believed_A[np.isfinite(state.believed_A)]
        return hoped if untried_A[hoped] <= (1.0 + self.optimism) * known_A.min(initial=np.inf) else None


TRIAL_DWELL = 4
"""Trials wait until so many steps of one size have come in a row."""


def _believed_ns(state: PlannerState, plan: Plan, counts_LE: I32) -> float:
    """Return what the belief says a plan takes, the model's other work included, as what is measured includes it."""
    setup = state.control.setup
    assert setup.belief is not None
    other = setup.model.other_work(int(counts_LE[0].sum()) // setup.model.top_k)
    return float(setup.belief.step_ns(plan, counts_LE, (other,) * len(counts_LE) if other else ()))


def _change_ns(state: PlannerState, arm: int, to: int) -> int:
    device = state.control.setup.device
    return device.upload_ns + switch_ns(state.plan_of(arm).layout, state.plan_of(to).layout, device)


def _bucket(state: PlannerState, counts_LE: I32) -> int:
    tokens = int(counts_LE[0].sum()) // state.control.setup.model.top_k
    return min(tokens.bit_length(), BUCKETS - 1)


def _dwell(state: PlannerState, counts_HLE: I32) -> int:
    """Return for how many steps the size has been what it is; as long again is how long it is expected to stay."""
    buckets = [_bucket(state, counts_LE) for counts_LE in counts_HLE[::-1]]
    return next((age for age, bucket in enumerate(buckets) if bucket != buckets[0]), len(buckets))


def _lag(setup: Setup) -> int:
    return setup.control.count_lag_steps + setup.control.delay_steps


def _settled(state: PlannerState) -> int | None:
    """Return the arm that ran the newest completed step; None when the one before it was another."""
    lag = _lag(state.control.setup)
    around = state.ran[len(state.ran) - lag - 1 : len(state.ran) - lag + 1] if len(state.ran) > lag else ()
    return around[0] if around and len(set(around)) == 1 else None


def _plans(setup: Setup) -> tuple[Plan, ...]:
    """Return the plans to try beside the control: other tiles, and hot beside cold; none without a belief."""
    if setup.belief is None:
        return ()
    return CONTROL.init(setup).plans + helping_plans(setup) + splitting_plans(setup)
