"""Figures and files of `expertslice fidelity`, from its rows alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .bench_rows import write_parquet
from .plotting import INK, PALETTE, Sketch, axes, finish, styled
from .runs import provenance, to_json

Row = dict[str, Any]
MEMORY_BOUND = 64
"""Tokens up to which any split is as good as another."""


def write(folder: Path, rows: Mapping[str, Sequence[Row]], summary: Row) -> None:
    """Write rows, summary and manifest into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, mine in rows.items():
        write_parquet(folder / f"{name}.parquet", mine)
    (folder / "summary.json").write_text(to_json(summary) + "\n", encoding="utf-8")
    manifest = {"command": "expertslice fidelity --out FOLDER", **provenance()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def draw(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Draw what is held out of a profile: times against predictions, residuals, splits; return the files made."""
    with styled():
        drawn = [finish(*sketch, folder) for sketch in (_against(rows), _residuals(rows), _splits(rows))]
    return [folder / f"{one.name}.svg" for one in drawn]


def _against(rows: Sequence[Row]) -> Sketch:
    figure, ax = axes(4.2)
    measured = np.array([row["measured_ns"] for row in rows]) / 1000
    for i, name in enumerate(("physics", "calibrated")):
        predicted = np.array([row[f"{name}_ns"] for row in rows]) / 1000
        ax.scatter(measured, predicted, s=9, color=PALETTE[i], marker="os"[i], label=name, alpha=0.7)
    ends = [measured.min(), measured.max()]
    ax.plot(ends, ends, color=INK, lw=1)
    ax.set(xscale="log", yscale="log", xlabel="measured, µs", ylabel="predicted, µs")
    # Powers of ten in the way of mathematics would stay markup where text is text.
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    ax.legend()
    caption = "Layers that the device model was not fitted to; the line is equality."
    return figure, "predicted", "Predicted against measured", caption


def _residuals(rows: Sequence[Row]) -> Sketch:
    figure, ax = axes(3.4)
    for i, regime in enumerate(sorted({row["regime"] for row in rows})):
        mine = [row for row in rows if row["regime"] == regime]
        off = [100 * (row["calibrated_ns"] / row["measured_ns"] - 1) for row in mine]
        ax.scatter(
            [row["tokens"] * 2 ** (i / 6) for row in mine], off, s=9, color=PALETTE[i], marker="os^v"[i], label=regime
        )
    ax.axhline(0, color=INK, lw=1)
    ax.set(xscale="log", xlabel="tokens", ylabel="predicted over measured, %")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.legend(ncols=4)
    caption = "Relative error of the calibrated truth on held-out layers, by tokens and by what has the SMs."
    return figure, "residuals", "Where the simulator is wrong", caption


def _splits(rows: Sequence[Row]) -> Sketch:
    rows = [row for row in rows if row["whole_load"] and row["tokens"] > MEMORY_BOUND]
    shapes = sorted({row["model"] for row in rows}, key=lambda one: -sum(row["model"] == one for row in rows))[:4]
    figure, all_axes = axes(5.6, nrows=2, ncols=2)
    for ax, shape in zip(all_axes.flat, shapes, strict=False):
        loads = sorted({row["source"] for row in rows if row["model"] == shape})[:3]
        for i, load in enumerate(loads):
            mine = [row for row in rows if row["source"] == load and row["regime"] == "split"]
            mine = sorted((int(row["arm"].split()[1].split("+")[0]), row) for row in mine)
            sms, unit = [n for n, _ in mine], min(row["measured_ns"] for _, row in mine)
            ax.plot(sms, [row["calibrated_ns"] / unit for _, row in mine], color=PALETTE[i])
            ax.plot(
                sms, [row["measured_ns"] / unit for _, row in mine], ls="", marker="os^"[i], ms=4, color=PALETTE[i],
                label=" ".join(load.split()[2:]),
            )  # fmt: skip
        ax.set(title=shape, yscale="log", xlabel="SMs of the experts with few tokens", ylabel="time over the best")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.legend()
    caption = (
        "Two slices of one layer as the split of the SMs moves: measured (marks) and predicted (lines), held-out loads."
    )
    return figure, "splits", "Splits measured and predicted", caption
