"""The page about slices: what committed GPU runs say of slices beside controls, and of changing plans.

Usage: python -P -m expertslice.experiments.slices_page docs/results/slices > docs/slices.md; it draws the frontier too.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from .kernels_page import page_of
from .plotting import PALETTE, Sketch, axes, finish, styled

Row = dict[str, Any]
GAIN, SMS, IN_TURN = "gain", 132, "one after the other"
KINDS = (("green", "SM sets"), ("bounded", "bounded grids"), ("co-resident", "sharing SMs"), ("", "controls"))


def facts(folder: Path) -> dict[str, Any]:
    """Return what the page shows of a results folder."""
    products, again, beside = (
        pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("products", "again", "beside")
    )
    told = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in ("soak", "graphs", "other_work", "profiling")
    }
    later = {row["name"]: row for row in gains(again)}
    both = [row["unsliced"] for row in gains(products)]
    return {
        "two_tiles": sum(arm.startswith(("in turn", "dependent")) for arm in both),
        "meeting": meeting(beside),
        "about": json.loads((folder / "manifest.json").read_text()),
        "products": [row | {"again": later.get(row["name"])} for row in gains(products)],
        "torch_us": {row["name"]: row["us_q50"] for row in products if row["side"] == "torch"},
        "mixes": [row | best_of(beside, row) | {"room": row["unsliced_us"] / row["floor_us"]} for row in gains(beside)],
        "shared": shared(beside),
        "changes": json.loads((folder / "plan_changes.json").read_text()),
        **told,
    }


def gains(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that say what slicing gained."""
    return [row for row in rows if row["arm"] == GAIN]


def best_of(rows: Sequence[Row], gain: Row) -> Row:
    """Return the best arm's share of the other part that joined it, and what both parts did."""
    (best,) = [row for row in rows if row["name"] == gain["name"] and row["arm"] == gain["sliced"]]
    held = {name: best[name] for name in ("join", "decode_us_q50", "decode_us_q99", "of_floor")}
    return held | {"dense_tflops": dense_tflops(best)}


def meeting(rows: Sequence[Row]) -> Row:
    """Return the parts that ran most evenly beside each other, and how much longer than apart they took.

    Of splits that leave decode two thirds of the SMs or more: as many as memory needs.
    """
    split = [row | {"sms": int(row["arm"].split()[1])} for row in rows if row["arm"].startswith("green")]
    split = [row for row in split if not row["join"] and 3 * row["sms"] >= 2 * SMS]
    row = min(split, key=lambda row: abs(row["decode_us_q50"] / row["dense_us_q50"] - 1))
    shares = SMS / (SMS - row["sms"])
    return {
        "name": row["name"], "arm": row["arm"], "decode_over": row["decode_us_q50"] / row["decode_alone_us"],
        "dense_over": row["dense_us_q50"] / (row["dense_alone_us"] * shares),
    }  # fmt: skip


def shared(rows: Sequence[Row]) -> list[float]:
    """Return the time of each mix's best control over that of its best arm in which both parts share every SM."""
    found = []
    for gain in gains(rows):
        here = [row for row in rows if row["name"] == gain["name"] and row["arm"].startswith("co-resident")]
        found.append(gain["unsliced_us"] / min(row["us_q50"] for row in here))
    return found


def dense_tflops(row: Row) -> float:
    """Return the rate of the dense product over the whole step, however long it took itself."""
    return 2 * row["m"] * row["n"] * row["k"] / row["us_q50"] / 1e6


def draw(folder: Path) -> None:
    """Draw the frontier of the parts that run beside each other."""
    with styled():
        finish(*_frontier(pq.read_table(folder / "beside.parquet").to_pylist()), folder)


def _frontier(rows: Sequence[Row]) -> Sketch:
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, all_axes = axes(5.6, nrows=2, ncols=2)
    for ax, name in zip(all_axes.flat, names, strict=True):
        mine = [row for row in rows if row["name"] == name and row["arm"] != GAIN]
        for i, (kind, label) in enumerate(KINDS):
            some = [row for row in mine if _kind(row["arm"]) == kind]
            if not some:
                continue
            points = [(dense_tflops(row), row["decode_us_q99"]) for row in some]
            ax.plot(*zip(*points, strict=True), "osD^"[i], ms=4, color=PALETTE[i], label=label)
            # The rest lie on one another.
            told = [
                row["arm"].split()[-1] if kind == "green" else "in turn" if row["arm"] == IN_TURN else ""
                for row in some
            ]
            for text, point in zip(told, points, strict=True):
                ax.annotate(text, point, fontsize=6, xytext=(2, 2), textcoords="offset points")
        ax.set(title=name)
    figure.supxlabel("TFLOP/s of the dense product over the whole step", fontsize=9)
    figure.supylabel("µs until the decode part is done, 99th percentile", fontsize=9)
    all_axes.flat[0].legend()
    caption = (
        "Numbers are the decode part's SMs, in turn is one part after the other: down and to the right is better, and "
        "no split is best at both."
    )
    return figure, "frontier", "Decode beside a dense product", caption


def _kind(arm: str) -> str:
    word = arm.replace(",", " ").split(maxsplit=1)[0]
    return next((kind for kind, _ in KINDS if word == kind), "")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
    sys.stdout.write(page_of("slices.md.j2", facts(Path(sys.argv[1]))))
