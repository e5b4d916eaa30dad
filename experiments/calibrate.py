"""From a folder of `expertslice profile` to a device model: rows become measurements, throttled ones are dropped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ..policies.contract import ByTokens, Plan, Slice, SliceLayout
from ..policies.data import load_variants
from ..sim.calibrate import Measured
from .bench import DEVICES
from .bench_rows import machine_of
from .design import Load
from .device_model import DeviceModel, calibrate


def from_profile(folder: Path, *, seed: int, say: Callable[[str], object]) -> DeviceModel:
    """Return the device model of a profile.

    Raises:
        ValueError: the folder holds no profile, or one with too few points, or of an unknown device.
    """
    rows, manifest = read_profile(folder)
    last = manifest["runs"][-1]
    name = DEVICES.get(manifest["device"])
    if name is None:
        raise ValueError(f"nothing is known of {manifest['device']!r}; profiles can be of {', '.join(DEVICES)}")
    kept, dropped = usable(rows)
    if dropped:
        say(f"{dropped} of {dropped + len(kept)} points were measured under throttling and are dropped")
    known = [measured_of(row) for row in kept if not row["held_out"]]
    held_out = [measured_of(row) for row in kept if row["held_out"]]
    about = {"profile": sorted({run["commit"] for run in manifest["runs"]}), "profiled": last["seeds"]}
    return calibrate(known, device=name, machine=machine_of(last), held_out=held_out, seed=seed, about=about)


def read_profile(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows and the manifest of a profile; ValueError where the folder holds none."""
    if not (folder / "rows.parquet").is_file() or not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} holds no rows.parquet and manifest.json; give the folder of `expertslice profile`")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return pq.read_table(folder / "rows.parquet").to_pylist(), manifest


def usable(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of layers that were timed, and how many more the device throttled."""
    layers = [row for row in rows if row["group"] in ("layers", "tiles") and row["status"] == "ok"]
    kept = [row for row in layers if not row["throttled"]]
    return kept, len(layers) - len(kept)


def load_of(row: dict[str, Any]) -> Load:
    """Return the load that a row of a profiled layer is of."""
    return Load(shape=row["shape"], tokens=row["tokens"], skew=row["skew"])


def measured_of(row: dict[str, Any]) -> Measured:
    """Return a row of a profiled layer as a measurement."""
    load = load_of(row)
    slices = tuple(Slice(**one) for one in json.loads(row["slices"]))
    rule = ByTokens(bounds=tuple(row["bounds"]), slice_ids=tuple(range(len(slices))))
    return Measured(
        cell=load.name,
        model=load.spec,
        variants=load_variants(),
        plan=Plan(layout=SliceLayout(slices=slices), placement=rule, tile_order=row["tile_order"]),
        counts_LE=np.array(row["counts"], dtype=np.int32).reshape(-1, load.spec.num_experts),
        ns=row["us_q50"] * 1000,
    )
