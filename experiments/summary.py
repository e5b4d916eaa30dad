"""A result as plain values: what `--json` prints, `summary.json` holds and the report shows.

Shape letters: P policies, N steps.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..policies.contract import Slice
from ..traces.schema import PHASES
from . import paired
from .case import Case
from .ranking import Evidence, Ranking, times_of
from .simulate import Outcome
from .why import Why


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished comparison."""

    case: Case
    evidence: Evidence
    ranking: Ranking
    why: Why
    records: dict[str, Path]

    @property
    def provisional(self) -> bool:
        """Return whether the device's model has not been calibrated."""
        return self.case.world.device.status == "provisional"


def summarise(result: Result) -> dict[str, Any]:
    """Return the result as plain values: what `--json` prints and the report shows."""
    case, ranking = result.case, result.ranking
    rows = [
        row_of(name, ranking, result.evidence.main[name], case.policies[name].foresees) for name in ranking.best_first()
    ]
    device = case.world.device

    def by_name(values_P: NDArray[np.float64]) -> dict[str, float | None]:
        known = (None if np.isnan(value) else value for value in values_P.tolist())
        return dict(zip(ranking.names, known, strict=True))

    return {
        "kind": "whatif",
        "provisional": result.provisional,
        "device": {"name": device.name, "title": device.title, "status": device.status},
        "model": asdict(case.world.model),
        "trace": case.opened.plain(),
        "workload": {
            name: getattr(case.survey, name)
            for name in ("num_steps", "num_tokens", "steps_of_phase", "tokens_of_phase")
        },
        "seed": case.options.seed,
        "statistics": {
            "effect": "mean step time against unsliced on the same steps, percent; negative is faster",
            "level": 0.95,
            "block_steps": ranking.block_steps,
            "compositions": len(ranking.composition_CP),
            "model_draws": len(ranking.draw_MP),
            "sampled_steps": case.survey.windows.num_steps,
        },
        "ranking": rows,
        "phases": phase_effects(result.evidence, ranking.names, case.options.seed),
        "compositions": [by_name(row) for row in ranking.composition_CP],
        "sampled": by_name(ranking.nominal_P),
        "draws": [by_name(row) for row in ranking.draw_MP],
        "pairs": _pairs(ranking),
        "why": result.why.plain(),
        "notes": list(case.notes),
    }


def _pairs(ranking: Ranking) -> list[dict[str, Any]]:
    c = ranking.comparison
    return [
        {
            "a": ranking.names[i], "b": ranking.names[j], "difference_percent": float(c.difference_PP[i, j]),
            "interval_percent": [float(c.low_PP[i, j]), float(c.high_PP[i, j])], "differ": bool(c.differ_PP[i, j]),
        }
        for i, j in itertools.combinations(range(len(ranking.names)), 2)
    ]  # fmt: skip


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
        "surely_faster": bool(ranking.surely_faster[p]),
        "effect_percent": float(ranking.effect_P[p]),
        "effect_interval_percent": ranking.both_2P[:, p].tolist(),
        "workload_interval_percent": ranking.workload_2P[:, p].tolist(),
        "model_interval_percent": ranking.model_2P[:, p].tolist(),
        **metrics(outcome),
    }


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


def phase_effects(evidence: Evidence, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Return each phase's effects and their workload half-widths, for phases of at least 8 steps."""
    times_PN = times_of(evidence.main, names)
    phase_N = np.array(evidence.main[names[0]].phases)
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
