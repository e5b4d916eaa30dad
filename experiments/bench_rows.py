"""What the benchmarks share: their points, the least time for one, cold batches of it, and rows on disk.

Torch is imported inside functions alone. Shape letters: T tokens, E experts, P weight sets.
"""

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..policies.contract import DeviceSpec
from ..policies.cost import floor_ns
from ..runtime.timer import quantiles
from ..traces.models import load_model
from ..traces.schema import DTYPE_BYTES, Dtype, MoeSpec
from .bench_arms import Batch, batch_of, num_sets
from .runs import provenance, to_json

MACHINE = ("device", "driver", "torch", "triton")
LONG_LAYER_US = 4000
"""One set: two would not fit a burst, and one exceeds L2 many times."""
SEEDS = "weights: the set's number; tokens: 1; logits: the number of tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One load of one layer."""

    model: str
    kind: str
    skew: str
    tokens: int
    dtype: Dtype = "bf16"

    @property
    def spec(self) -> MoeSpec:
        """Return the layer's shape."""
        return replace(load_model(self.model), kind=self.kind, num_layers=1, dtype=self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step must do at least, the mean over weight sets: read the experts hit once, and multiply all rows."""

    hbm_bytes: float
    flops: float
    dtype: Dtype

    @classmethod
    def of(cls, batch: Batch) -> "Work":
        """Return the work of a batch."""
        spec = batch.spec
        hit = [len(logits_TE.topk(spec.top_k, dim=1).indices.unique()) for logits_TE in batch.logits_PTE]
        rows, weights = len(batch.x_TD) * spec.top_k, spec.expert_bytes() // DTYPE_BYTES[spec.dtype]
        return cls(hbm_bytes=statistics.mean(hit) * spec.expert_bytes(), flops=rows * 2 * weights, dtype=spec.dtype)

    def floor_us(self, device: DeviceSpec) -> float:
        """Return the least time on a device."""
        return floor_ns(hbm_bytes=self.hbm_bytes, flops=self.flops, device=device, dtype=self.dtype) / 1000


def in_us(name: str, samples_ns: Sequence[float]) -> dict[str, float]:
    """Return the 20, 50 and 80 % quantiles under names that say so, and whose they are where a name is given."""
    found, whose = quantiles(samples_ns), f"{name}_" if name else ""
    return {f"{whose}us_q{q}": round(getattr(found, f"q{q}_ns") / 1000, 3) for q in (20, 50, 80)}


def cold_batches(points: Sequence[Point], seconds: float) -> Iterator[tuple[Point, Batch]]:
    """Yield points with their batches until the time is up; weights are drawn once for the points of one layer."""
    import torch

    from ..kernels.weights import random_weights

    end, held, sets = time.monotonic() + seconds, None, []
    for point in points:
        if time.monotonic() > end:
            return
        if held != (point.model, point.kind, point.dtype):
            held, sets = (point.model, point.kind, point.dtype), []
            torch.cuda.empty_cache()
        spec, wanted = point.spec, num_sets(point.spec, point.tokens)
        sets += [random_weights(spec, "cuda", seed) for seed in range(len(sets), wanted)]
        yield point, batch_of(spec, point.tokens, point.skew, sets[:wanted])


def device_manifest(meter: Any, commit: str | None) -> dict[str, Any]:
    """Return what is needed to read rows later: a checkout without its history is told its commit."""
    import torch
    import triton

    found = provenance()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    return {
        **found,
        "versions": found["versions"] | versions,
        **({"commit": commit, "dirty": False} if commit else {}),
        "seeds": SEEDS,
        "device": torch.cuda.get_device_name(0),
        "driver": meter.nvml.nvmlSystemGetDriverVersion(),
        "before": asdict(meter.snapshot()),
    }


def machine_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same where rows are put together: device, driver and versions; None: there is none."""
    found = {**manifest["versions"], **manifest}
    return {what: found.get(what) for what in MACHINE}


def refuse_other_machine(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise ValueError where a folder's rows are of another machine than a manifest says."""
    path = folder / "manifest.json"
    if not path.exists():
        return
    held = json.loads(path.read_text(encoding="utf-8"))
    before, now = machine_of(held if "versions" in held else held["runs"][-1]), machine_of(manifest)
    for what, was in before.items():
        if now[what] != was:
            raise ValueError(f"{folder} holds rows of {what} {was!r}, this is {now[what]!r}; give another --out")


def claim(folder: Path, run: dict[str, Any]) -> None:
    """Add a call to a folder's manifest; ValueError where its rows are of another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    refuse_other_machine(folder, run)
    path = folder / "manifest.json"
    before = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    path.write_text(to_json({"device": run["device"], "runs": [*before, run]}) + "\n", encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of arms in a rows.jsonl; ValueError where a line is none."""
    rows = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict) or "arm" not in row:
            raise ValueError(f"{path}: line {number} is no row of a benchmark's arm; give another rows.jsonl")
        rows.append(row)
    return rows


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as Parquet: a column for every name that any of them has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    pq.write_table(table, path, compression="zstd")
