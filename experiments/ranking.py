"""From outcomes to a ranking: effects against unsliced, their uncertainty from workload and model, ties.

Shape letters: P policies, N steps, B bootstrap draws, M draws of the model's parameters, C compositions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..policies.contract import Slice
from ..traces.schema import PHASES
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

    def names(self) -> list[str]:
        """Return the policies, the reference first."""
        return sorted(self.main, key=lambda name: name != REFERENCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Effects in percent of the reference's mean step time, negative is faster; P in the order of `names`."""

    names: tuple[str, ...]
    effect_P: NDArray[np.float64]
    workload_half_P: NDArray[np.float64]
    model_half_P: NDArray[np.float64]
    half_P: NDArray[np.float64]
    comparison: paired.Comparison
    ranks: tuple[paired.Rank | None, ...]
    """None for policies that foresee: a bound takes no place."""
    composition_CP: NDArray[np.float64]
    draw_MP: NDArray[np.float64]
    """Effect on the sampled steps under each draw."""
    block_steps: int


def _effects(outcomes: Mapping[str, Outcome], names: Sequence[str]) -> NDArray[np.float64]:
    return paired.effect_percent(_times(outcomes, names), 0)


def _times(outcomes: Mapping[str, Outcome], names: Sequence[str]) -> NDArray[np.float64]:
    return np.stack([outcomes[name].times_N for name in names])


def rank(evidence: Evidence, foresees: Mapping[str, bool], *, seed: int) -> Ranking:
    """Rank the policies by mean step time on the trace's own steps."""
    names = evidence.names()
    times_PN = _times(evidence.main, names)
    effect_P = paired.effect_percent(times_PN, 0)
    block = paired.common_block_length(times_PN, 0)
    blocks_BP = paired.block_bootstrap(times_PN, 0, seed=seed, length=block)
    composition_CP = np.array([_effects(one, names) for one in evidence.compositions]).reshape(-1, len(names))
    between_CP = paired.between_compositions(composition_CP, _within_sd(evidence.compositions, names, seed))
    workload_BP = blocks_BP + paired.t_draws(between_CP, seed=seed + 1)
    draw_MP = np.array([_effects(one, names) for one in evidence.draws]).reshape(-1, len(names))
    nominal_P = _effects(evidence.nominal, names) if evidence.nominal else np.zeros(len(names))
    model_BP = paired.t_draws(draw_MP - nominal_P, seed=seed + 2)
    both_BP = workload_BP + model_BP
    return Ranking(
        names=tuple(names),
        effect_P=effect_P,
        workload_half_P=paired.half_width(workload_BP),
        model_half_P=paired.half_width(model_BP),
        half_P=paired.half_width(both_BP),
        comparison=paired.compare_all(effect_P, both_BP),
        ranks=_ranks(names, effect_P, both_BP, foresees),
        composition_CP=composition_CP,
        draw_MP=draw_MP,
        block_steps=block,
    )


def _within_sd(compositions: Sequence[Mapping[str, Outcome]], names: Sequence[str], seed: int) -> NDArray[np.float64]:
    sd = [paired.block_bootstrap(_times(one, names), 0, seed=seed, num_draws=200).std(axis=0) for one in compositions]
    return np.array(sd).reshape(-1, len(names))


def _ranks(
    names: Sequence[str], effect_P: NDArray[np.float64], both_BP: NDArray[np.float64], foresees: Mapping[str, bool]
) -> tuple[paired.Rank | None, ...]:
    """Rank what can be deployed; only those comparisons are corrected for, so bounds cost no power."""
    placed = [p for p, name in enumerate(names) if not foresees[name]]
    comparison = paired.compare_all(effect_P[placed], both_BP[:, placed])
    ranks = paired.ranks_with_ties(effect_P[placed], comparison.differ_PP)
    of = dict(zip(placed, ranks, strict=True))
    return tuple(of.get(p) for p in range(len(names)))


def slice_words(one: Slice) -> str:
    """Return a slice in words."""
    tiles = one.up if one.up == one.down else f"{one.up} and {one.down}"
    return f"{one.mechanism} {one.sm_count} SMs, {one.num_ctas} CTAs, {tiles}"


def row_of(name: str, ranking: Ranking, outcome: Outcome, foresees: bool) -> dict[str, Any]:
    """Return one policy's row of the ranking, plain enough for JSON."""
    p = ranking.names.index(name)
    place = ranking.ranks[p]
    return {
        "policy": name,
        "deployable": not foresees,
        "rank": place.rank if place else None,
        "tied": place.tied if place else False,
        "effect_percent": float(ranking.effect_P[p]),
        "effect_half_percent": float(ranking.half_P[p]),
        "workload_half_percent": float(ranking.workload_half_P[p]),
        "model_half_percent": float(ranking.model_half_P[p]),
        **metrics(outcome),
    }


def metrics(outcome: Outcome) -> dict[str, Any]:
    """Return what one run cost and reached."""
    times_N = outcome.times_N
    energy = [window.energy_uj for window in outcome.energy]
    known = bool(energy) and all(uj is not None for uj in energy)
    energy_uj = sum(uj or 0 for uj in energy) if known else None
    seconds = outcome.makespan_ns / 1e9
    return {
        "steps": len(times_N),
        "step_mean_ns": float(times_N.mean()),
        "step_p50_ns": float(np.quantile(times_N, 0.50)),
        "step_p95_ns": float(np.quantile(times_N, 0.95)),
        "step_p99_ns": float(np.quantile(times_N, 0.99)),
        "tokens_per_s": outcome.tokens / seconds,
        "energy_j_per_1k_tokens": None if energy_uj is None else energy_uj / 1e6 / outcome.tokens * 1000,
        "hbm_bytes_per_step": outcome.hbm_bytes / len(times_N),
        "reconfigurations": outcome.reconfigurations,
        "reconfigure_share": outcome.reconfigure_ns / outcome.makespan_ns,
        "captures": outcome.captures,
        "capture_ns": outcome.capture_ns,
        "control_stall_share": outcome.stall_ns / outcome.makespan_ns,
        "unsliced_share": outcome.unsliced_steps / len(times_N),
        "fallback_steps": outcome.fallback_steps,
        "layouts": layouts_of(outcome),
    }


def layouts_of(outcome: Outcome) -> list[dict[str, Any]]:
    """Return the layouts by use, each slice with the share of its time that it was busy."""
    used = sorted(outcome.layouts.items(), key=lambda item: (-item[1].steps, repr(item[0])))
    return [
        {
            "steps": use.steps,
            "slices": [
                {"slice": slice_words(one), "busy_share": float(busy / use.step_ns)}
                for one, busy in zip(layout.slices, use.busy_ns_S, strict=True)
            ],
        }
        for layout, use in used
    ]


def phase_effects(evidence: Evidence, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Return each phase's effects and their workload half-widths, for phases of at least 8 steps."""
    times_PN = _times(evidence.main, names)
    phase_N = evidence.main[names[0]].phase_N
    rows: list[dict[str, Any]] = []
    for index, phase in enumerate(PHASES):
        part_PN = times_PN[:, phase_N == index]
        if part_PN.shape[1] < 8:
            continue
        effect_P = paired.effect_percent(part_PN, 0)
        half_P = paired.half_width(paired.block_bootstrap(part_PN, 0, seed=seed, num_draws=500))
        effects = [
            {"policy": n, "effect_percent": float(e), "workload_half_percent": float(h)}
            for n, e, h in zip(names, effect_P, half_P, strict=True)
        ]
        share = float(part_PN[0].sum() / times_PN[0].sum())
        rows.append({"phase": phase, "steps": part_PN.shape[1], "time_share": share, "effects": effects})
    return rows
