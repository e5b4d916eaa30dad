"""What a paired run found, as plain values.

Shape letters: R rounds, P policies, N steps, L MoE layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .agreement import agree
from .pair import SETTLE_STEPS, Found, Ran
from .ranking import metrics


def summarise(names: Sequence[str], found: Found, *, seed: int) -> dict[str, Any]:
    """Return differences, errors, rankings and divergences, a row for each policy."""
    backend_RPN = np.stack([_times(ran, names) for ran in found.rounds])
    replayed_PN = _times(found.replayed, names) if len(found.replayed) == len(names) else None
    agreed = agree(
        names, backend_RPN, _times(found.closed, names), replayed_PN, np.array(found.draws), seed=seed
    )  # fmt: skip
    agreed["rows"] = [row | _divergence(found, row["policy"]) for row in agreed["rows"]]
    for ranking in agreed["ranking"].values():
        ranking["picked"] = names[ranking["picked"]]
    return {
        "kind": "pair",
        **agreed,
        "settle_steps": SETTLE_STEPS,
        "residuals": residuals(found),
        "slowed": sorted(set().union(*map(_slowed, found.rounds))),
    }


def _times(ran: Mapping[str, Ran], names: Sequence[str]) -> NDArray[np.float64]:
    return np.stack([ran[name].outcome.times()[SETTLE_STEPS:] for name in names])


def _divergence(found: Found, name: str) -> dict[str, int]:
    """Return at how many steps the plans of two runs differ: backend and simulator, and the backend with itself."""
    first = found.rounds[0][name].plan_ids
    rounds = [ran[name].plan_ids for ran in found.rounds]
    return {
        "plans_differ_steps": sum(a != b for a, b in zip(first, found.closed[name].plan_ids, strict=True)),
        "plans_differ_between_rounds": max(sum(a != b for a, b in zip(first, r, strict=True)) for r in rounds),
        "fallback_steps": sum(ran[name].outcome.fallback_steps for ran in found.rounds),
    }


def residuals(found: Found) -> list[dict[str, Any]]:
    """Return how much longer each layer took on the backend than in the replay of its plans, summed over steps."""
    rows: list[dict[str, Any]] = []
    for name, replayed in found.replayed.items():
        backend_L = np.median([ran[name].outcome.layer_ns_L for ran in found.rounds], axis=0)
        simulated_L = np.asarray(replayed.outcome.layer_ns_L)
        for layer, (backend_ns, simulated_ns) in enumerate(zip(backend_L, simulated_L, strict=True)):
            percent = 100 * (float(backend_ns) / float(simulated_ns) - 1) if simulated_ns else None
            rows.append({"policy": name, "layer": layer, "residual_percent": percent})
    return rows


def blocks(found: Found) -> list[dict[str, Any]]:
    """Return a row for each block on the backend: what it took, and the GPU before and after."""
    kept = ("steps", "step_mean_ns", "step_p50_ns", "step_p99_ns", "tokens_per_s", "energy_j_per_1k_tokens")
    rows: list[dict[str, Any]] = []
    for number, ran in enumerate(found.rounds):
        for name, one in ran.items():
            measured = metrics(one.outcome)
            row = {"round": number, "policy": name, **{key: measured[key] for key in kept}}
            for when, reading in zip(("before", "after"), one.readings, strict=False):
                row |= {f"{when}_{key}": value for key, value in reading.items()}
            rows.append(row)
    return rows


def _slowed(ran: Mapping[str, Ran]) -> set[str]:
    from .pair_gpu import slowed

    return set().union(*(slowed(reading) for one in ran.values() for reading in one.readings))
