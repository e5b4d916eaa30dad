"""From outcomes to a ranking: effects against unsliced, their uncertainty from workload and model, ties.

Shape letters: P policies, N steps, B bootstrap draws, M draws of the model's parameters, C compositions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import paired
from .simulate import Outcome

REFERENCE = "unsliced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Outcomes by policy name: of the trace's own steps, of re-batched ones, and of draws of the model's errors."""

    main: Mapping[str, Outcome]
    compositions: Sequence[Mapping[str, Outcome]]
    nominal: Mapping[str, Outcome] | None
    """The sampled steps under the nominal model: what draws are compared with."""
    draws: Sequence[Mapping[str, Outcome]]
    """Bounds, which are slow, are left out of the later draws."""

    def names(self) -> list[str]:
        """Return the policies, the reference first."""
        return sorted(self.main, key=lambda name: name != REFERENCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Effects in percent of the reference's mean step time, negative is faster; P in the order of `names`."""

    names: tuple[str, ...]
    effect_P: NDArray[np.float64]
    workload_2P: NDArray[np.float64]
    """Low and high ends of the interval of the workload alone."""
    model_2P: NDArray[np.float64]
    both_2P: NDArray[np.float64]
    comparison: paired.Comparison
    ranks: tuple[paired.Rank | None, ...]
    """None for policies that foresee: a bound takes no place."""
    told_P: NDArray[np.bool_]
    """Whether a deployable policy can be told from the reference."""
    composition_CP: NDArray[np.float64]
    nominal_P: NDArray[np.float64]
    """Effect on the sampled steps under the nominal model."""
    draw_MP: NDArray[np.float64]
    """The same under each draw of its errors; NaN where a policy was left out."""
    block_steps: int

    @property
    def surely_faster(self) -> NDArray[np.bool_]:
        """Return whether each deployable policy is faster than the reference by more than noise."""
        return self.told_P & (self.effect_P < 0)

    def best_first(self) -> list[str]:
        """Return the policies by effect, bounds behind what can be deployed."""
        order = sorted(range(len(self.names)), key=lambda p: (self.ranks[p] is None, self.effect_P[p]))
        return [self.names[p] for p in order]


def _effects(outcomes: Mapping[str, Outcome], names: Sequence[str]) -> NDArray[np.float64]:
    there = [p for p, name in enumerate(names) if name in outcomes]
    effect_P = np.full(len(names), np.nan)
    effect_P[there] = paired.effect_percent(times_of(outcomes, [names[p] for p in there]), 0)
    return effect_P


def times_of(outcomes: Mapping[str, Outcome], names: Sequence[str]) -> NDArray[np.float64]:
    """Return step times [P, N], ns."""
    return np.stack([outcomes[name].times() for name in names])


def rank(evidence: Evidence, foresees: Mapping[str, bool], *, seed: int) -> Ranking:
    """Rank the policies by mean step time on the trace's own steps."""
    names = evidence.names()
    times_PN = times_of(evidence.main, names)
    effect_P = paired.effect_percent(times_PN, 0)
    block = paired.common_block_length(times_PN, 0)
    blocks_BP = paired.block_bootstrap(times_PN, 0, seed=seed, length=block)
    composition_CP = np.array([_effects(one, names) for one in evidence.compositions]).reshape(-1, len(names))
    between_CP = paired.between_compositions(composition_CP, _within_sd(evidence.compositions, names, seed))
    workload_BP = blocks_BP + paired.t_draws(between_CP, seed=seed + 1)
    draw_MP = np.array([_effects(one, names) for one in evidence.draws]).reshape(-1, len(names))
    nominal_P = _effects(evidence.nominal, names) if evidence.nominal else np.zeros(len(names))
    model_BP = paired.t_draws(draw_MP - nominal_P, seed=seed + 2, about_mean=True)
    both_BP = workload_BP + model_BP
    ranks, told_P = _ranks(names, effect_P, both_BP, foresees)
    return Ranking(
        names=tuple(names),
        effect_P=effect_P,
        workload_2P=paired.interval(effect_P, workload_BP),
        model_2P=paired.interval(effect_P, model_BP),
        both_2P=paired.interval(effect_P, both_BP),
        comparison=paired.compare_all(effect_P, both_BP),
        ranks=ranks,
        told_P=told_P,
        composition_CP=composition_CP,
        nominal_P=nominal_P,
        draw_MP=draw_MP,
        block_steps=block,
    )


def _within_sd(compositions: Sequence[Mapping[str, Outcome]], names: Sequence[str], seed: int) -> NDArray[np.float64]:
    sd = [paired.block_bootstrap(times_of(one, names), 0, seed=seed, num_draws=200).std(axis=0) for one in compositions]
    return np.array(sd).reshape(-1, len(names))


def _ranks(
    names: Sequence[str], effect_P: NDArray[np.float64], both_BP: NDArray[np.float64], foresees: Mapping[str, bool]
) -> tuple[tuple[paired.Rank | None, ...], NDArray[np.bool_]]:
    """Rank what can be deployed; only those comparisons are corrected for, so bounds cost no power."""
    placed = [p for p, name in enumerate(names) if not foresees[name]]
    comparison = paired.compare_all(effect_P[placed], both_BP[:, placed])
    ranks = paired.ranks_with_ties(effect_P[placed], comparison.differ_PP)
    of = dict(zip(placed, ranks, strict=True))
    told_P = np.zeros(len(names), dtype=bool)
    # The reference is the first of the names, and so of those placed.
    told_P[placed] = comparison.differ_PP[:, 0]
    return tuple(of.get(p) for p in range(len(names))), told_P
