"""How far a simulator agrees with a backend on the same steps: differences, their error, rankings, repeat noise.

Shape letters: R rounds, P policies with the reference first, N steps, B bootstrap draws, M draws of the model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from . import paired

Floats = NDArray[np.float64]


def agree(
    names: Sequence[str],
    backend_RPN: Floats,
    closed_PN: Floats,
    replayed_PN: Floats | None,
    draw_MP: Floats,
    *,
    seed: int,
) -> dict[str, Any]:
    """Compare step times of a backend, ns, with those of a simulator that decides itself or replays its plans.

    A step's time on the backend is the median over rounds. Workloads are resampled by the same blocks in both worlds.
    `draw_MP` are deviations of the simulated effect under draws of the model's errors. The error on a difference is
    the simulator's less the backend's, in percentage points; its interval holds workload and repeats, and not the
    model's declared error, which is what it tests.
    """
    backend_PN = np.median(backend_RPN, axis=0)
    length = max(paired.common_block_length(times_PN, 0) for times_PN in (backend_PN, closed_PN))
    repeat_BP = paired.t_draws(_round_deviations(backend_RPN), seed=seed + 1)
    model_BP = paired.t_draws(draw_MP, seed=seed + 2, about_mean=True)
    workload_BP = paired.block_bootstrap(backend_PN, 0, seed=seed, length=length)
    sides = {"backend": (backend_PN, workload_BP + repeat_BP)}
    for side, times_PN in (("closed", closed_PN), ("replayed", replayed_PN)):
        if times_PN is not None:
            sides[side] = times_PN, paired.block_bootstrap(times_PN, 0, seed=seed, length=length)
    effects = {side: paired.effect_percent(times_PN, 0) for side, (times_PN, _) in sides.items()}
    ends = {side: paired.interval(effects[side], d_BP).T for side, (_, d_BP) in sides.items()}
    ends["closed"] = paired.interval(effects["closed"], sides["closed"][1] + model_BP).T
    rows: list[dict[str, Any]] = [{"policy": name} for name in names]
    for side, (times_PN, deviation_BP) in sides.items():
        error_P = effects[side] - effects["backend"]
        error_P2 = paired.interval(error_P, deviation_BP - sides["backend"][1]).T
        for p, row in enumerate(rows):
            row[f"{side}_mean_ns"] = float(times_PN[p].mean())
            row[f"{side}_effect_percent"] = float(effects[side][p])
            row[f"{side}_interval_percent"] = ends[side][p].tolist()
            if side != "backend":
                row[f"{side}_error_points"] = float(error_P[p])
                row[f"{side}_error_interval_points"] = error_P2[p].tolist()
    return {
        "rows": rows,
        "level": paired.LEVEL,
        "block_steps": length,
        "rounds": len(backend_RPN),
        "noise_percent": repeat_noise_percent(backend_RPN),
        "ranking": {
            side: rankings(effects["backend"], effects[side], sides["backend"][1], sides[side][1] + model_BP)
            for side in sides
            if side != "backend"
        },
    }


def _round_deviations(backend_RPN: Floats) -> Floats:
    """Return deviations [R, P] whose spread is that of the mean effect over rounds; none for a single round."""
    r = len(backend_RPN)
    effect_RP = np.array([paired.effect_percent(times_PN, 0) for times_PN in backend_RPN])
    return (effect_RP - effect_RP.mean(axis=0)) / np.sqrt(r - 1) if r > 1 else effect_RP[:0]


def repeat_noise_percent(backend_RPN: Floats) -> float | None:
    """Return the noise floor: the median change of a policy's mean step time from one round to the next."""
    mean_RP = backend_RPN.mean(axis=2)
    return float(100 * np.median(np.abs(mean_RP[1:] / mean_RP[:-1] - 1))) if len(mean_RP) > 1 else None


def rankings(backend_P: Floats, simulated_P: Floats, backend_BP: Floats, simulated_BP: Floats) -> dict[str, Any]:
    """Return how two rankings agree.

    `tau_b` is Kendall's of the effects as they are, `tau_b_told_apart` of ranks in which what cannot be told apart is
    tied; None where one side is all ties. The regret is how much longer the simulator's first choice takes on the
    backend than the backend's own.
    """
    ranks = [
        [place.rank for place in paired.ranks_with_ties(effect_P, paired.compare_all(effect_P, d_BP).differ_PP)]
        for effect_P, d_BP in ((backend_P, backend_BP), (simulated_P, simulated_BP))
    ]
    picked = int(np.argmin(simulated_P))
    return {
        "tau_b": _tau_b(backend_P, simulated_P),
        "tau_b_told_apart": _tau_b(*ranks),
        "picked": picked,
        "regret_percent": float(100 * ((100 + backend_P[picked]) / (100 + backend_P.min()) - 1)),
        "ranks": ranks,
    }


def _tau_b(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float | None:
    if len(a) < 2 or len(set(map(float, a))) < 2 or len(set(map(float, b))) < 2:
        return None
    return float(kendalltau(a, b).statistic)
