"""The page about speed: what committed GPU runs say of layers beside peers, of energy, and of where the time goes.

Usage: python -P -m expertslice.experiments.speed_page docs/results/speed > docs/speed.md
"""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from .account import PARTS
from .bench_peers import PEERS
from .kernels_page import page_of

Row = dict[str, Any]
GROUPED = "torch_grouped_graph"
MEANS = {
    "dependent": "dependent launch",
    "prefetch_mib": "prefetch",
    "gathered": "rows gathered first",
    "whole": "one launch for the layer",
    "tile_prefetch": "prefetch by tile",
}


def facts(folder: Path) -> dict[str, Any]:
    """Return what the page shows of a results folder."""
    layers = beside(pq.read_table(folder / "layers/rows.parquet").to_pylist())
    peered = [row["peer"] for row in layers if row["peer"]]
    energy = pq.read_table(folder / "energy/rows.parquet").to_pylist()
    accounts = pq.read_table(folder / "account.parquet").to_pylist()
    shipped = {point_of(row): row["launch"] for row in layers}
    arms = by_point(pq.read_table(folder / "arms/rows.parquet").to_pylist())
    return {
        "about": json.loads((folder / "layers/manifest.json").read_text()),
        "layers": layers,
        "mean": geometric_mean(peered),
        "ahead": sum(ratio >= 1 for ratio in peered),
        "behind": sum(ratio < 0.98 for ratio in peered),
        "num_peered": len(peered),
        "energy": [row for row in energy if row["arm"] == "ours" and row["regime"] == "sustained"],
        "grouped": {
            (row["model"], row["tokens"]): row
            for row in energy
            if row["arm"] == GROUPED and row["regime"] == "sustained"
        },
        "parts": [part for part in PARTS if any(row[f"{part}_us"] for row in accounts)],
        "accounts": [row | {"tuned_since": row["launch"] != shipped[point_of(row)]} for row in accounts],
        "arms": list(arms.values()),
        "arm_names": [
            name for name in dict.fromkeys(name for found in arms.values() for name in found) if name != "ours"
        ],
        "counters": pq.read_table(folder / "counters.parquet").to_pylist(),
        "means": MEANS,
        "tried": tried(pq.read_table(folder / "tried.parquet").to_pylist()),
    }


def beside(rows: Sequence[Row]) -> list[Row]:
    """Return our rows, each beside the best peer, torch's grouped product and the modelled launch."""
    found = []
    for arms in by_point(rows).values():
        best = min((arms[name] for name in PEERS if arms.get(name, {}).get("over_ours")), key=_over_ours, default=None)
        found.append(
            arms["ours"]
            | {
                "peer": best and best["over_ours"],
                "peer_low": best and best["over_ours_low"],
                "peer_high": best and best["over_ours_high"],
                "peer_name": best and best["arm"],
                "grouped": arms[GROUPED]["over_ours"],
                "modelled": arms["ours_modelled"]["over_ours"],
            }
        )
    return found


def by_point(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Return the rows of each point by arm."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(point_of(row), {})[row["arm"]] = row
    return found


def point_of(row: Row) -> tuple[Any, ...]:
    """Return what names a point."""
    return row["model"], row["kind"], row["tokens"], row["skew"]


def _over_ours(row: Row) -> float:
    return row["over_ours"]


def geometric_mean(ratios: Iterable[float]) -> float:
    """Return the geometric mean."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))


def tried(rows: Sequence[Row]) -> dict[tuple[str, int, str], dict[str, float]]:
    """Return each load's best time with a means over that without it, of launches that differ in it alone.

    Where two sittings have such launches, the later one counts.
    """
    by_load: dict[tuple[str, int, str], dict[str, list[Row]]] = {}
    for row in rows:
        by_load.setdefault((row["model"], row["tokens"], row["skew"]), {}).setdefault(row["sitting"], []).append(row)
    found: dict[tuple[str, int, str], dict[str, float]] = {}
    for load, sittings in by_load.items():
        for launches in sittings.values():
            for means in MEANS:
                pairs = [(a, b) for a in launches if a[means] for b in launches if not b[means] and _alike(a, b, means)]
                if pairs:
                    ratio = min(a["us"] for a, _ in pairs) / min(b["us"] for _, b in pairs)
                    found.setdefault(load, {})[means] = ratio
    return found


def _alike(a: Row, b: Row, means: str) -> bool:
    return all(a[name] == b[name] for name in a if name not in (means, "us"))


if __name__ == "__main__":
    sys.stdout.write(page_of("speed.md.j2", facts(Path(sys.argv[1]))))
