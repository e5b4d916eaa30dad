"""From outcomes to a ranking: effects against unsliced, their uncertainty from workload and model, ties.

What it gives is plain: `--json` prints it, `summary.json` holds it, the report shows it.

Shape letters: P policies, the reference first, N steps, B bootstrap draws, M draws of the model, C compositions.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..policies.contract import Slice
from ..traces.schema import PHASES
from . import paired
from .simulate import Outcome

Floats = NDArray[np.float64]
REFERENCE = "unsliced"


Outcomes = Mapping[str, Outcome]
"""What every policy made of the same steps, by name."""


def rank(
    main: Outcomes,
    compositions: Sequence[Outcomes],
    nominal: Outcomes,
    draws: Sequence[Outcomes],
    *,
    bounds: Collection[str],
    seed: int,
) -> dict[str, Any]:
    """Rank the policies by mean step time on the trace's own steps (`main`), as plain values.

    Effects are in percent of the reference's mean step time, negative is faster. `compositions` are other batches of
    the same requests; `draws`, of the model's errors, are compared with `nominal`, the same sampled steps without
    one, and the later ones may lack bounds, which are slow. Bounds take no place.
    """
    names = sorted(main, key=lambda name: (name != REFERENCE, name in bounds))
    times_PN = times_of(main, names)
    block = paired.common_block_length(times_PN, 0)
    effect_P = paired.effect_percent(times_PN, 0)
    composition_CP, between_BP = _between(compositions, names, seed)
    workload_BP = paired.block_bootstrap(times_PN, 0, seed=seed, length=block) + between_BP
    nominal_P = _effects(nominal, names)
    draw_MP = np.array([_effects(one, names) for one in draws])
    model_BP = paired.t_draws(draw_MP - nominal_P, seed=seed + 2, about_mean=True)
    deviations = {"effect": workload_BP + model_BP, "workload": workload_BP, "model": model_BP}
    return {
        "statistics": {
            "effect": "mean step time against unsliced on the same steps, percent; negative is faster",
            "level": paired.LEVEL,
            "block_steps": block,
            "compositions": len(composition_CP),
            "model_draws": len(draw_MP),
            "sampled_steps": len(nominal[REFERENCE].step_ns),
        },
        "ranking": _rows(main, names, bounds, effect_P, deviations),
        "phases": phase_effects(main, names, seed),
        "compositions": [_by_name(names, effects_P) for effects_P in composition_CP],
        "sampled": _by_name(names, nominal_P),
        "draws": [_by_name(names, effects_P) for effects_P in draw_MP],
        "pairs": _pairs(names, paired.compare_all(effect_P, deviations["effect"])),
    }


def _between(compositions: Sequence[Outcomes], names: Sequence[str], seed: int) -> tuple[Floats, Floats]:
    """Return the effects on other batches, and draws of how far they lie from each other."""
    times = [times_of(one, names) for one in compositions]
    effect_CP = np.array([paired.effect_percent(one_PN, 0) for one_PN in times]).reshape(-1, len(names))
    within = [paired.block_bootstrap(one_PN, 0, seed=seed, num_draws=200).std(axis=0) for one_PN in times]
    between_CP = paired.between_compositions(effect_CP, np.array(within).reshape(-1, len(names)))
    return effect_CP, paired.t_draws(between_CP, seed=seed + 1)


def _rows(
    main: Outcomes, names: Sequence[str], bounds: Collection[str], effect_P: Floats, deviations: Mapping[str, Floats]
) -> list[dict[str, Any]]:
    """Return a row for each policy, bounds last.

    Only comparisons of what can be deployed are corrected for, so bounds cost no power.
    """
    placed = [p for p, name in enumerate(names) if name not in bounds]
    differ_PP = paired.compare_all(effect_P[placed], deviations["effect"][:, placed]).differ_PP
    place_of = dict(zip(placed, paired.ranks_with_ties(effect_P[placed], differ_PP), strict=True))
    told = {p for p, differs in zip(placed, differ_PP[:, 0], strict=True) if differs}
    intervals = {f"{part}_interval_percent": paired.interval(effect_P, d_BP).T for part, d_BP in deviations.items()}
    return [
        {
            "policy": names[p],
            "deployable": p in place_of,
            "rank": place_of[p].rank if p in place_of else None,
            "tied": p in place_of and place_of[p].tied,
            "surely_faster": p in told and bool(effect_P[p] < 0),
            "surely_slower": p in told and bool(effect_P[p] > 0),
            "effect_percent": float(effect_P[p]),
            **{name: ends_P2[p].tolist() for name, ends_P2 in intervals.items()},
            **metrics(main[names[p]]),
        }
        for p in sorted(range(len(names)), key=lambda p: (p not in place_of, effect_P[p]))
    ]


def _effects(outcomes: Outcomes, names: Sequence[str]) -> Floats:
    there = [p for p, name in enumerate(names) if name in outcomes]
    effect_P = np.full(len(names), np.nan)
    effect_P[there] = paired.effect_percent(times_of(outcomes, [names[p] for p in there]), 0)
    return effect_P


def times_of(outcomes: Outcomes, names: Sequence[str]) -> Floats:
    """Return step times [P, N], ns."""
    return np.stack([outcomes[name].times() for name in names])


def _by_name(names: Sequence[str], effect_P: Floats) -> dict[str, float | None]:
    return {name: None if np.isnan(effect) else float(effect) for name, effect in zip(names, effect_P, strict=True)}


def _pairs(names: Sequence[str], c: paired.Comparison) -> list[dict[str, Any]]:
    return [
        {
            "a": names[i], "b": names[j], "difference_percent": float(c.difference_PP[i, j]),
            "interval_percent": [float(c.low_PP[i, j]), float(c.high_PP[i, j])], "differ": bool(c.differ_PP[i, j]),
        }
        for i, j in itertools.combinations(range(len(names)), 2)
    ]  # fmt: skip


def metrics(outcome: Outcome) -> dict[str, Any]:
    """Return what one run cost and reached."""
    times_N = outcome.times()
    energy = [window.energy_uj for window in outcome.energy]
    energy_uj = sum(energy) if energy and None not in energy else None
    return {
        "steps": len(times_N),
        "step_mean_ns": float(times_N.mean()),
        **{f"step_p{percent}_ns": float(np.quantile(times_N, percent / 100)) for percent in (50, 95, 99)},
        "tokens_per_s": outcome.tokens / (outcome.makespan_ns / 1e9),
        "energy_j_per_1k_tokens": None if energy_uj is None else energy_uj / 1e6 / outcome.tokens * 1000,
        "hbm_bytes_per_step": outcome.hbm_bytes / len(times_N),
        "reconfigurations": outcome.reconfigurations,
        "reconfigure_share": outcome.reconfigure_ns / outcome.makespan_ns,
        "captures": outcome.captures,
        "capture_ns": outcome.capture_ns,
        "control_stall_share": outcome.stall_ns / outcome.makespan_ns,
        "unsliced_share": outcome.unsliced_share(),
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
                {"slice": slice_words(one), "busy_share": share}
                for one, share in zip(layout.slices, (use.busy_ns_S / use.step_ns).tolist(), strict=True)
            ],
        }
        for layout, use in used
    ]


def slice_words(one: Slice) -> str:
    tiles = one.up if one.up == one.down else f"{one.up} and {one.down}"
    return f"{one.mechanism} {one.sm_count} SMs, {one.num_ctas} CTAs, {tiles}"


def phase_effects(main: Outcomes, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Return each phase's effects and their workload half-widths, for phases of at least 8 steps."""
    times_PN = times_of(main, names)
    phase_N = np.array(main[names[0]].phases)
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
