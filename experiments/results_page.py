"""The page of the paper's claims beside what was measured and simulated: generated from committed rows alone.

Usage: python -P -m expertslice.experiments.results_page docs/results > docs/results.md
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .claims import NOT_YET, Found, Source, interactions, judged, load_claims, sources
from .kernels_page import page_of
from .pair_gpu import HARMLESS
from .reproduce_arms import FACTORS, cells, impossible

HEADS = {
    "table1": "Table 1: throughput, and section 6.1",
    "figure1": "Figure 1: utilisation",
    "table2": "Table 2 and section 5.3: energy",
    "table3": "Table 3 and section 3.2: bandwidth",
    "table4": "Table 4: components; sections 3.3 and 6.2",
    "table5": "Table 5: other devices",
    "accuracy": "Accuracy",
}
BUSY = {"busy_sms": "SMs", "busy_occupancy": "occupancy", "busy_tensor": "tensor units", "busy_dram": "DRAM"}
USUAL = {*HARMLESS, "sw_power_cap"}
"""Reasons for a lower clock that are no fault: the power cap is the regime of sustained load."""
MOST_SHOWN = 12
"""Interactions, the strongest first."""


def facts(results: Path) -> dict[str, Any]:
    """Return what the page shows of a results folder."""
    held, claims = sources(results), load_claims()
    paper = [source for source in held if source.name.startswith("paper/")]
    rows = [row for source in paper for arms in source.rows.values() for row in arms.values()]
    return {
        "sections": [
            (head, [judged(claim, held) for claim in claims if claim.target == target])
            for target, head in HEADS.items()
        ],
        "sources": [(source, source_line(source)) for source in paper],
        "slowed": sum(bool(slowed(row)) for row in rows),
        "loads": table_of(paper, "load"),
        "busy": BUSY,
        "useful": (*BUSY, "useful_share"),
        "factorial": table_of(paper, "factorial"),
        "cells": cells(),
        "impossible": left_out(),
        "reading": reading,
        "interactions": sorted(interactions(paper, FACTORS), key=lambda row: -abs(row["ratio"] - 1))[:MOST_SHOWN],
        "cell": cell,
        "claimed": claimed,
    }


def slowed(row: Mapping[str, Any]) -> set[str]:
    """Return why the driver held clocks down where it should not have."""
    energy = row.get("energy_throttle_reasons") or ""
    return ({*(row.get("after_throttle_reasons") or ())} | {*filter(None, energy.split(", "))}) - USUAL


def source_line(source: Source) -> str:
    """Return where rows come from, and that they are of several versions where they are."""
    runs = source.about["runs"]
    commits = dict.fromkeys(run["commit"] or "unknown" for run in runs if run["tasks"])
    versions = dict.fromkeys(
        f"torch {run['versions']['torch']}, triton {run['versions']['triton']}, driver {run['driver']}, {run['cpu']}"
        for run in runs if "driver" in run
    )  # fmt: skip
    mixed = " (of several versions: see the column `commit`)" if max(len(commits), len(versions)) > 1 else ""
    notes = "".join(f"; {run['note']}" for run in runs if "note" in run)
    return f"{source.device}: {'; '.join([*versions, 'commit ' + ', '.join(one[:7] for one in commits)])}{mixed}{notes}"


def table_of(held: Sequence[Source], probe: str) -> dict[Any, Mapping[str, Any]]:
    """Return a probe's arms by device and case."""
    return {
        (source.device, case): arms for source in held for (name, case), arms in source.rows.items() if name == probe
    }


def left_out() -> dict[str, list[str]]:
    """Return the combinations of the factorial that cannot be, by reason."""
    found: dict[str, list[str]] = {}
    for one in itertools.product(*FACTORS.values()):
        if why := impossible(*one):
            found.setdefault(why, []).append("/".join(one))
    return found


def reading(row: Mapping[str, Any] | None) -> str:
    """Return an arm's time, or why there is none."""
    if row is None:
        return NOT_YET
    return f"{row['us_q50']:.1f}" if row["status"] == "ok" else f"{row['status']}: {row['reason']}".replace("|", "/")


def cell(found: Sequence[tuple[str, Found | str]], unit: str) -> str:
    """Return a cell of the table: a line for each case that has a value; the verdict says how many have none."""
    held = [(label, one) for label, one in found if one != NOT_YET]
    if found and not held:
        return NOT_YET
    return "<br>".join(f"{label}: {shown(one, unit)}" for label, one in held) or "–"


def shown(found: Found | str, unit: str) -> str:
    """Return a value with its interval, three digits of it; or why there is none, where a table can hold it."""
    if isinstance(found, str):
        return found.replace("|", "/")
    if unit == "same":
        return "yes" if found.value else "no"
    same = found.low == found.value == found.high
    return digits(found.value) + ("" if same else f" ({digits(found.low)}–{digits(found.high)})")


def digits(value: float) -> str:
    """Return three digits, and all of them of what is longer."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def claimed(value: float | Sequence[float], unit: str) -> str:
    """Return what is claimed."""
    if unit == "same":
        return "the same"
    values = [value] if isinstance(value, (int, float)) else value
    return ", ".join(digits(one) for one in values) + f" {unit}"


if __name__ == "__main__":
    sys.stdout.write(page_of("results.md.j2", facts(Path(sys.argv[1]))))
