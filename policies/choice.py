"""Choosing among plans by belief: what each would cost on recent steps, when to ask again, how sure to be.

Shape letters: H steps of history, L MoE layers, E routed experts, S slices of a layout.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..traces.schema import F64, I32
from .candidates import layouts_of
from .contract import Observation, Plan, Setup, SliceLayout

Costs = Callable[[Setup, Sequence[Plan], I32], F64]
"""What plans cost for one step, in any unit; infinity for one that may not run."""
CLOSE = 0.03
"""Plans this close to the best on one step are priced on others as well."""


def sampled_steps(counts_HLE: I32, num_samples: int) -> list[I32]:
    """Return up to `num_samples` steps of the history, newest first and evenly back.

    Whole steps rather than their mean: the mean of sparse counts makes every expert look active.
    """
    newest = counts_HLE.shape[0] - 1
    picks = np.linspace(newest, 0, min(num_samples, newest + 1)).round().astype(int)
    return [counts_HLE[pick] for pick in dict.fromkeys(picks.tolist()) if counts_HLE[pick].any()]


def plan_costs_ns(setup: Setup, plans: Sequence[Plan], counts_LE: I32) -> F64:
    """Return what the belief says each plan takes for one step; infinity for a plan that leaves a slice without work.

    A plan with fewer slices does the same, unless idle slices help the others. Plans of one layout that place the
    step's experts alike are priced once.
    """
    assert setup.belief is not None
    costs: list[float] = []
    priced: dict[tuple[SliceLayout, bool, bytes], float] = {}
    for plan in plans:
        ids_LE = plan.placement.owner_LE(counts_LE)
        key = (plan.layout, plan.steal, ids_LE.tobytes())
        if key not in priced:
            busy = plan.steal or np.bincount(ids_LE.ravel(), counts_LE.ravel(), plan.layout.num_slices).all()
            priced[key] = float(setup.belief.step_ns(plan, counts_LE)) if busy else float("inf")
        costs.append(priced[key])
    return np.asarray(costs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Plans to choose among and the one chosen; the first num_unsliced of them are unsliced."""

    setup: Setup
    plans: tuple[Plan, ...]
    num_unsliced: int = 0
    min_gain: float = 0.0
    """Fraction of the best unsliced plan's time that a sliced one must save."""
    index: int = 0
    decided_step: int | None = None
    tokens: int = 0

    @property
    def plan(self) -> Plan:
        return self.plans[self.index]


def is_due(choice: Choice, obs: Observation, every_steps: int) -> bool:
    """Return whether to choose again: every `every_steps`, or after a quarter of that when the load has doubled.

    A step may come in a burst, so the total of the newest counts is compared with that of the last decision.
    """
    if choice.decided_step is None or obs.step < choice.decided_step:
        return True
    age = obs.step - choice.decided_step
    if age >= every_steps:
        return True
    if age * 4 < every_steps:
        return False
    tokens = int(obs.counts_HLE[-1].sum())
    return not choice.tokens <= 2 * tokens <= 4 * choice.tokens


def choose(
    choice: Choice, obs: Observation, samples: Sequence[I32], stickiness: float, costs_of: Costs = plan_costs_ns
) -> Choice:
    """Return the choice that the belief finds cheapest on sampled steps; ties go to the earlier plan.

    A sliced plan must be cheaper than the best unsliced one by the fraction `choice.min_gain`, and any plan cheaper
    than the one in place by `stickiness`.
    """
    if not samples or choice.setup.belief is None:
        return choice
    costs = costs_of(choice.setup, choice.plans, samples[0])
    if len(samples) > 1:
        costs = _costs_of_close(choice, costs, samples[1:], costs_of)
    costs[: choice.num_unsliced] *= 1.0 - choice.min_gain
    costs[choice.index] *= 1.0 - stickiness
    index = int(costs.argmin()) if np.isfinite(costs).any() else choice.index
    return replace(choice, index=index, decided_step=obs.step, tokens=int(obs.counts_HLE[-1].sum()))


def _costs_of_close(choice: Choice, first: F64, rest: Sequence[I32], costs_of: Costs) -> F64:
    """Return costs over all samples of the plans that the first found close to the best of their kind."""
    split = choice.num_unsliced
    best = np.concatenate([np.full(part.size, part.min(initial=np.inf)) for part in (first[:split], first[split:])])
    close = np.flatnonzero(np.isfinite(first) & (first <= best * (1.0 + CLOSE)))
    costs = np.full_like(first, np.inf)
    plans = [choice.plans[index] for index in close]
    costs[close] = first[close] + sum(costs_of(choice.setup, plans, counts_LE) for counts_LE in rest)
    # What the first sample likes may have no price in the others; then the first alone decides.
    return costs if np.isfinite(costs).any() else first


@dataclass(frozen=True, slots=True, kw_only=True)
class Chooser(ABC):
    """A policy that now and then takes the plan that the belief finds cheapest; subclasses say among which."""

    foresees: ClassVar[bool] = False
    reads_clock: ClassVar[bool] = False

    plan_every: int = 32
    """Steps between choices."""
    num_samples: int = 2
    """Steps that a choice is priced on."""
    stickiness: float = 0.005
    """Fraction by which another plan must be cheaper than the one in place."""

    @abstractmethod
    def init(self, setup: Setup) -> Choice:
        """Return the plans to choose among."""

    def layouts(self, setup: Setup) -> tuple[SliceLayout, ...]:
        return layouts_of(self.init(setup).plans)

    def plan(self, obs: Observation, state: Choice) -> tuple[Plan, Choice]:
        if obs.counts_HLE.shape[0] and is_due(state, obs, self.plan_every):
            state = choose(state, obs, sampled_steps(obs.counts_HLE, self.num_samples), self.stickiness, self.costs)
        return state.plan, state

    def costs(self, setup: Setup, plans: Sequence[Plan], counts_LE: I32) -> F64:
        """Return what plans cost for one step: their time."""
        return plan_costs_ns(setup, plans, counts_LE)
