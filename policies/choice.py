"""Choosing among plans by belief: what each would cost on recent steps, when to ask again, how sure to be.

Shape letters: H steps of history, L MoE layers, E routed experts, S slices of a layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .contract import ByTokens, Observation, Pinned, Plan, Setup, SliceLayout

CLOSE = 0.03
"""Plans this close to the best on one step are priced on others as well."""


def sampled_steps(counts_HLE: NDArray[np.int32], num_samples: int) -> list[NDArray[np.int32]]:
    """Return up to `num_samples` steps of the history, newest first and evenly back.

    Whole steps rather than their mean: the mean of sparse counts makes every expert look active.
    """
    newest = counts_HLE.shape[0] - 1
    picks = np.linspace(newest, 0, min(num_samples, newest + 1)).round().astype(int)
    return [counts_HLE[pick] for pick in dict.fromkeys(picks.tolist()) if counts_HLE[pick].any()]


def plan_costs_ns(setup: Setup, plans: Sequence[Plan], counts_LE: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return what the belief says each plan takes for one step; infinity for those not worth asking about.

    Plans of one layout that place the step's experts alike are priced once. Not asked about: a plan that leaves a slice
    without work, since a plan with fewer slices does the same; and, for rules by tokens, tiles whose rows do not suit
    the load.
    """
    assert setup.belief is not None
    rows_of = {v.name: v.block_m for v in setup.variants}
    work: dict[bytes, list[float] | None] = {}
    priced: dict[tuple[SliceLayout, bytes], float] = {}
    for plan in plans:
        ids_LE = _placed_ids(plan, counts_LE)
        placed = bytes([plan.layout.num_slices]) + ids_LE.tobytes()
        key = (plan.layout, placed)
        if key in priced:
            continue
        if placed not in work:
            work[placed] = _typical_rows(ids_LE, counts_LE, plan.layout.num_slices)
        typical = work[placed]
        suits = typical is not None and (
            isinstance(plan.placement, Pinned)
            or all(_rows_suit(rows_of[one.up], rows) for one, rows in zip(plan.layout.slices, typical, strict=True))
        )
        priced[key] = float(setup.belief.step_ns(plan, counts_LE)) if suits else float("inf")
    keys = [(plan.layout, bytes([plan.layout.num_slices]) + _placed_ids(plan, counts_LE).tobytes()) for plan in plans]
    return np.asarray([priced[key] for key in keys])


def suitable_tile(setup: Setup, names: Sequence[str], counts_LE: NDArray[np.int32]) -> str:
    """Return the first of the tiles whose rows suit a load on one slice; the last when none does."""
    rows = _typical_rows(np.zeros(counts_LE.shape, dtype=np.int16), counts_LE, 1) or [0.0]
    return next((name for name in names if _rows_suit(setup.variant(name).block_m, rows[0])), names[-1])


def _typical_rows(ids_LE: NDArray[np.int16], counts_LE: NDArray[np.int32], num_slices: int) -> list[float] | None:
    """Return the rows of an expert on each slice as its average row sees them; None when a slice has none."""
    weights = counts_LE.ravel().astype(np.float64)
    rows_S = np.bincount(ids_LE.ravel(), weights, num_slices)
    squares_S = np.bincount(ids_LE.ravel(), weights * weights, num_slices)
    return (squares_S / rows_S).tolist() if rows_S.all() else None


def _rows_suit(block_m: int, typical_rows: float) -> bool:
    """Return whether a tile has rows for its experts: too few read the weights again and again, too many are padding.

    A roofline does not know how often a tile reads what it multiplies.
    """
    return min(typical_rows / 2, 128) <= block_m <= max(4 * typical_rows, 64)


def _placed_ids(plan: Plan, counts_LE: NDArray[np.int32]) -> NDArray[np.int16]:
    if isinstance(plan.placement, ByTokens):
        return plan.placement.slice_of_expert_E(0, counts_LE)
    return plan.placement.slice_of_expert_LE


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Plans to choose among and the one chosen; the first num_unsliced of them are unsliced."""

    setup: Setup
    plans: tuple[Plan, ...]
    num_unsliced: int
    index: int = 0
    decided_step: int | None = None
    tokens: int = 0

    @property
    def plan(self) -> Plan:
        """Return the chosen plan."""
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


def choose(choice: Choice, obs: Observation, *, num_samples: int, min_gain: float, stickiness: float) -> Choice:
    """Return the choice that the belief finds cheapest on recent steps; ties go to the earlier plan.

    A sliced plan must be cheaper than the best unsliced one by the fraction `min_gain`, and any plan cheaper than
    the one in place by `stickiness`.
    """
    samples = sampled_steps(obs.counts_HLE, num_samples)
    if not samples or choice.setup.belief is None:
        return choice
    costs = plan_costs_ns(choice.setup, choice.plans, samples[0])
    if len(samples) > 1:
        costs = _costs_of_close(choice, costs, samples[1:])
    costs[: choice.num_unsliced] *= 1.0 - min_gain
    costs[choice.index] *= 1.0 - stickiness
    index = int(costs.argmin()) if np.isfinite(costs).any() else choice.index
    return replace(choice, index=index, decided_step=obs.step, tokens=int(obs.counts_HLE[-1].sum()))


def _costs_of_close(
    choice: Choice, first: NDArray[np.float64], rest: Sequence[NDArray[np.int32]]
) -> NDArray[np.float64]:
    """Return costs over all samples of the plans that the first found close to the best of their kind."""
    split = choice.num_unsliced
    best = np.concatenate([np.full(part.size, part.min(initial=np.inf)) for part in (first[:split], first[split:])])
    close = np.flatnonzero(np.isfinite(first) & (first <= best * (1.0 + CLOSE)))
    costs = np.full_like(first, np.inf)
    plans = [choice.plans[index] for index in close]
    costs[close] = first[close] + sum(plan_costs_ns(choice.setup, plans, counts_LE) for counts_LE in rest)
    # What the first sample likes may have no price in the others; then the first alone decides.
    return costs if np.isfinite(costs).any() else first
