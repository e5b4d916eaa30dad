"""Figures of a benchmark, from its rows and manifest alone: a roofline, and how far the best peer is behind ours."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import seaborn as sns

from .plotting import INK, PALETTE, Sketch, axes, finish, styled

Row = dict[str, Any]
ROOF_INTENSITIES = (0.5, 20_000)
"""FLOP per byte: from a token an expert to more tokens than any batch has."""


def draw(folder: Path) -> list[Path]:
    """Draw a benchmark's figures beside its rows; return the files made."""
    path = folder / "rows.parquet"
    if not path.is_file():
        raise ValueError(f"{folder} holds no rows.parquet; give the folder of a finished `expertslice bench`")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    rows = pq.read_table(path).to_pylist()
    # Bursts where there are any: the records of peers are of bursts.
    regime = min(row["regime"] for row in rows)
    rows = [row for row in rows if row["regime"] == regime]
    with styled():
        sketches = filter(None, (_roofline(rows, manifest["ceilings"], regime), _ratios(rows, regime)))
        drawn = [finish(*sketch, folder) for sketch in sketches]
    return [folder / f"{one.name}{suffix}" for one in drawn for suffix in (".svg", ".png")]


def _roofline(rows: Sequence[Row], ceilings: dict[str, Any], regime: str) -> Sketch | None:
    """Draw what each arm reaches of what the device allows at the least bytes that its load needs."""
    timed = [row for row in rows if row.get("us_q50")]
    if not timed:
        return None
    figure, ax = axes(4.4)
    intensity = np.geomspace(*ROOF_INTENSITIES, 200)
    for rate, style, label in (
        (ceilings["burst_flops_per_s"], "-", "ceilings, in a burst"),
        (ceilings["sustained_flops_per_s"], "--", "products sustained at the power limit"),
    ):
        ax.plot(
            intensity, np.minimum(intensity * ceilings["bytes_per_s"], rate) / 1e12, style, color=INK, lw=1, label=label
        )
    for i, arm in enumerate(dict.fromkeys(row["arm"] for row in timed)):
        mine = [row for row in timed if row["arm"] == arm]
        ax.scatter(
            [row["flops"] / row["hbm_bytes"] for row in mine],
            [row["flops"] / row["us_q50"] / 1e6 for row in mine],
            s=22 if arm == "ours" else 12, color=PALETTE[i % len(PALETTE)], marker="oDs^v<>PX*"[i % 10], label=arm,
            zorder=3 if arm == "ours" else 2,
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="FLOP per byte of the experts hit, each read once", ylabel="TFLOP/s")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    ax.grid(which="major")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    caption = (
        f"Rates that arms reach ({regime}), over the arithmetic intensity of the load; lines: {ceilings['device']}."
    )
    return figure, "roofline", "What each arm reaches of the roofline", caption


def _ratios(rows: Sequence[Row], regime: str) -> Sketch | None:
    """Draw the time of the best arm that is not ours over ours."""
    best: dict[tuple[str, int], tuple[float, str]] = {}
    for row in rows:
        if row.get("over_ours") and not row["arm"].startswith("ours"):
            key = f"{row['model']} {row['kind']}, {row['skew']}", row["tokens"]
            name = row["arm"].removeprefix("torch_") + ("*" if row["status"] == "bridged" else "")
            best[key] = min(best.get(key, (math.inf, "")), (row["over_ours"], name))
    if not best:
        return None
    layers, tokens = list(dict.fromkeys(layer for layer, _ in best)), sorted({tokens for _, tokens in best})
    figure, ax = axes(1.2 + 0.42 * len(layers))
    ratios = [[best.get((layer, n), (math.nan, ""))[0] for n in tokens] for layer in layers]
    words = [[_word(best.get((layer, n))) for n in tokens] for layer in layers]
    sns.heatmap(
        np.log2(ratios), annot=np.array(words), fmt="", vmin=-1, vmax=1, cmap="vlag_r", cbar=False, ax=ax,
        xticklabels=tokens, yticklabels=layers, linewidths=1, annot_kws={"fontsize": 7.5},
    )  # fmt: skip
    ax.set(xlabel="tokens of a step", ylabel="")
    caption = (
        f"Time of the fastest arm that is not ours over ours ({regime}); above 1, ours is faster; *: by its record."
    )
    return figure, "ratios", "The best peer beside ours", caption


def _word(found: tuple[float, str] | None) -> str:
    return f"{found[0]:.2f}\n{found[1]}" if found else ""
