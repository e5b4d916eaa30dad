"""Committed layer times as measurements that the simulator can be asked about; not how well it answers.

Records hold no counts: a load is drawn anew by the same rule, so that what a draw differs is part of every error.

Shape letters: L draws, T tokens, E experts.
"""

import json
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from ..policies.contract import Slice, SliceLayout, TileVariant
from ..policies.layouts import one_slice_plan
from ..policies.residual import FLAGS
from ..sim.calibrate import Measured
from ..traces.models import load_model
from ..traces.schema import I32, MoeSpec

TILE = re.compile(r"(\d+)x(\d+)x(\d+)w(\d+)s(\d+)[df]*(p?)@(\d+)")
DRAWS = 2
SM_COUNT = 132
"""Of the device that the committed records are of."""


class Record(NamedTuple):
    """A measurement with what it is compared to."""

    measured: Measured
    floor_ns: float
    noise: float | None
    """Half the distance of the 20 and 80 % quantiles over the median; None: not on record."""
    source: str


@lru_cache
def drawn_counts_LE(spec: MoeSpec, tokens: int, skew: str) -> I32:
    """Return counts of random routing, uniform or Zipf (s = 1) over a random order of the experts."""
    counts: list[Any] = []
    for draw in range(DRAWS):
        rng = np.random.default_rng([tokens, draw])
        logits_TE = rng.gumbel(size=(tokens, spec.num_experts))
        if skew == "zipf":
            logits_TE -= np.log(rng.permutation(spec.num_experts) + 1.0)
        ids_TK = np.argpartition(-logits_TE, spec.top_k - 1, axis=1)[:, : spec.top_k]
        counts.append(np.bincount(ids_TK.ravel(), minlength=spec.num_experts))
    return np.array(counts, dtype=np.int32)


def tile_of(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int, regs: int = 0) -> TileVariant:
    """Return a tile with the resources that its operands and accumulators need, bf16; `regs` of a thread if known."""
    return TileVariant(
        name=f"{block_m}x{block_n}x{block_k}w{num_warps}s{num_stages}",
        block_m=block_m, block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=num_stages,
        smem_bytes=2 * num_stages * (block_m + block_n) * block_k,
        regs_per_thread=regs or min(255, block_m * block_n // (num_warps * 32) + 64),
    )  # fmt: skip


def of_layer(row: dict[str, Any], launch: str, us: float) -> Measured:
    """Return a layer's time under an unsliced launch written as the benchmarks write it."""
    spec = replace(load_model(row["model"]), kind=row.get("kind") or "swiglu", num_layers=1, dtype="bf16")
    found = list(TILE.finditer(launch))
    up, down = (tile_of(*map(int, one.group(1, 2, 3, 4, 5))) for one in found)
    # A slice has one grid; the first product's is two thirds of the work or more.
    num_ctas = int(found[0].group(7))
    one = Slice(
        mechanism="shared", sm_count=SM_COUNT, num_ctas=num_ctas, ctas_per_sm=-(-num_ctas // SM_COUNT),
        up=up.name, down=down.name,
    )  # fmt: skip
    words = {*launch.split()[2:], *(["pingpong"] if any(one.group(6) for one in found) else [])}
    return Measured(
        cell=f"{spec.name}-{spec.kind} {row['tokens']} {row['skew']}",
        model=spec,
        variants=tuple(dict.fromkeys((up, down))),
        plan=one_slice_plan(SliceLayout(slices=(one,))),
        counts_LE=drawn_counts_LE(spec, row["tokens"], row["skew"]),
        ns=us * 1000,
        flags=tuple(float(flag in words) for flag in FLAGS),
    )


def committed(folder: Path) -> list[Record]:
    """Return the layer times of docs/results/speed: of kernels as they are kept, in bursts."""
    records: list[Record] = []
    floors: dict[str, float] = {}
    for row in pq.read_table(folder / "layers/rows.parquet").to_pylist():
        if row["launch"] and row["status"] == "ok" and row["regime"] == "burst":
            measured = of_layer(row, row["launch"], row["us_q50"])
            floors[measured.cell] = row["floor_us"] * 1000
            noise = (row["us_q80"] - row["us_q20"]) / 2 / row["us_q50"]
            records.append(Record(measured, row["floor_us"] * 1000, noise, "layers"))
    for row in pq.read_table(folder / "tried.parquet").to_pylist():
        # Whole-layer launches and prefetch were tried and not kept.
        if not (row["whole"] or row["tile_prefetch"] or row["prefetch_mib"]):
            flags = "".join(f" {flag}" for flag in FLAGS[:3] if row[flag])
            measured = of_layer(row, f"{row['up']} {row['down']}{flags}", row["us"])
            if measured.cell in floors:
                records.append(Record(measured, floors[measured.cell], None, "tried"))
    return records


def device_of(folder: Path) -> dict[str, Any]:
    """Return the manifest of the layer times."""
    return json.loads((folder / "layers/manifest.json").read_text(encoding="utf-8"))
