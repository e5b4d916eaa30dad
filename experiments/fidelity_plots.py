"""Figures and files of `expertslice fidelity`, from its rows alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .bench_rows import write_parquet
from .plotting import INK, PALETTE, axes, finish, styled
from .runs import provenance, to_json

Row = dict[str, Any]


def write(folder: Path, rows: Sequence[Row], summary: Row) -> None:
    """Write rows, summary and manifest into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(folder / "rows.parquet", rows)
    (folder / "summary.json").write_text(to_json(summary) + "\n", encoding="utf-8")
    manifest = {"command": f"expertslice fidelity --out {folder}", **provenance()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def draw(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Draw predicted against measured times, and residuals; return the files made."""
    with styled():
        drawn = [finish(*sketch, folder) for sketch in (_against(rows), _residuals(rows))]
    return [folder / f"{one.name}.svg" for one in drawn]


def _against(rows: Sequence[Row]) -> tuple[Any, str, str, str]:
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
    caption = "Layer times of models that the predictor was not fitted to; the line is equality."
    return figure, "predicted", "Predicted against measured", caption


def _residuals(rows: Sequence[Row]) -> tuple[Any, str, str, str]:
    figure, ax = axes(3.4)
    for i, model in enumerate(sorted({row["model"] for row in rows})):
        mine = [row for row in rows if row["model"] == model]
        off = [100 * (row["calibrated_ns"] / row["measured_ns"] - 1) for row in mine]
        ax.scatter(
            [row["tokens"] * 2 ** (i / 8) for row in mine], off, s=9, color=PALETTE[i % 10], marker="os^vD*"[i % 6],
            label=model,
        )  # fmt: skip
    ax.axhline(0, color=INK, lw=1)
    ax.set(xscale="log", xlabel="tokens", ylabel="predicted over measured, %")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.legend(ncols=3)
    caption = "Relative error of the calibrated truth by model and tokens, each model held out whole."
    return figure, "residuals", "Where the simulator is wrong", caption
