"""From outcomes to a ranking: effects against unsliced, their uncertainty from workload and model, ties.

Shape letters: P policies, N steps, B bootstrap draws, M draws of the model's parameters, C compositions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import paired
from .simulate import Outcome

Floats = NDArray[np.float64]
REFERENCE = "unsliced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Outcomes by policy name: of the trace's own steps, of re-batched ones, and of draws of the model's errors."""

    main: Mapping[str, Outcome]
    compositions: Sequence[Mapping[str, Outcome]]
    nominal: Mapping[str, Outcome]
    """The sampled steps under the nominal model: what draws are compared with."""
    draws: Sequence[Mapping[str, Outcome]]
    """Bounds, which are slow, are left out of the later draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Effects in percent of the reference's mean step time, negative is faster; P in the order of `names`."""

    names: tuple[str, ...]
    """The reference first."""
    effect_P: Floats
    workload_2P: Floats
    """Low and high ends of the interval of the workload alone."""
    model_2P: Floats
    both_2P: Floats
    comparison: paired.Comparison
    ranks: tuple[paired.Rank | None, ...]
    """None for policies that foresee: a bound takes no place."""
    told_P: NDArray[np.bool_]
    """Whether a deployable policy can be told from the reference."""
    composition_CP: Floats
    nominal_P: Floats
    """Effect on the sampled steps under the nominal model."""
    draw_MP: Floats
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


def _effects(outcomes: Mapping[str, Outcome], names: Sequence[str]) -> Floats:
    there = [p for p, name in enumerate(names) if name in outcomes]
    effect_P = np.full(len(names), np.nan)
    effect_P[there] = paired.effect_percent(times_of(outcomes, [names[p] for p in there]), 0)
    return effect_P


def times_of(outcomes: Mapping[str, Outcome], names: Sequence[str]) -> Floats:
    """Return step times [P, N], ns."""
    return np.stack([outcomes[name].times() for name in names])


def rank(evidence: Evidence, foresees: Mapping[str, bool], *, seed: int) -> Ranking:
    """Rank the policies by mean step time on the trace's own steps."""
    names = sorted(evidence.main, key=lambda name: name != REFERENCE)
    times_PN = times_of(evidence.main, names)
    effect_P = paired.effect_percent(times_PN, 0)
    block = paired.common_block_length(times_PN, 0)
    blocks_BP = paired.block_bootstrap(times_PN, 0, seed=seed, length=block)
    others = [times_of(one, names) for one in evidence.compositions]
    within = [paired.block_bootstrap(one_PN, 0, seed=seed, num_draws=200).std(axis=0) for one_PN in others]
    composition_CP = np.array([paired.effect_percent(one_PN, 0) for one_PN in others]).reshape(-1, len(names))
    between_CP = paired.between_compositions(composition_CP, np.array(within).reshape(-1, len(names)))
    workload_BP = blocks_BP + paired.t_draws(between_CP, seed=seed + 1)
    draw_MP = np.array([_effects(one, names) for one in evidence.draws])
    nominal_P = _effects(evidence.nominal, names)
    model_BP = paired.t_draws(draw_MP - nominal_P, seed=seed + 2, about_mean=True)
    both_BP = workload_BP + model_BP
    # Only what can be deployed is ranked and corrected for, so bounds cost no power. The reference is first of both.
    placed = [p for p, name in enumerate(names) if not foresees[name]]
    differ_PP = paired.compare_all(effect_P[placed], both_BP[:, placed]).differ_PP
    place_of = dict(zip(placed, paired.ranks_with_ties(effect_P[placed], differ_PP), strict=True))
    told_P = np.zeros(len(names), dtype=bool)
    told_P[placed] = differ_PP[:, 0]
    return Ranking(
        names=tuple(names),
        effect_P=effect_P,
        workload_2P=paired.interval(effect_P, workload_BP),
        model_2P=paired.interval(effect_P, model_BP),
        both_2P=paired.interval(effect_P, both_BP),
        comparison=paired.compare_all(effect_P, both_BP),
        ranks=tuple(place_of.get(p) for p in range(len(names))),
        told_P=told_P,
        composition_CP=composition_CP,
        nominal_P=nominal_P,
        draw_MP=draw_MP,
        block_steps=block,
    )
