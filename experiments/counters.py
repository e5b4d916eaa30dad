"""What the device's counters say of each launch of a layer: bytes from memory and L2, and how busy the pipes were.

`python -P -m expertslice.experiments.counters --out FOLDER` starts itself under Nsight Compute. Caches are flushed
before each launch, and clocks are left alone.
"""

import argparse
import csv
import io
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..runtime.meter import EnergyMeter
from .account import PART_OF_KERNEL, PRODUCTS, parts_of
from .bench_rows import Point, device_manifest, write_parquet
from .runs import to_json

POINTS = tuple(
    Point(model=model, kind="swiglu", skew="uniform", tokens=tokens)
    for model, tokens in (
        ("small", 32), ("medium", 256), ("large", 32), ("large", 256), ("large", 2048), ("large", 8192),
        ("qwen3-30b-a3b", 2048),
    )
)  # fmt: skip
METRICS = {
    "time_us": ("gpu__time_duration.sum", 1e-3),
    "memory_read_bytes": ("dram__bytes_read.sum", 1),
    "memory_written_bytes": ("dram__bytes_write.sum", 1),
    "l2_bytes": ("lts__t_bytes.sum", 1),
    "memory_busy_percent": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "l2_busy_percent": ("lts__t_sectors.avg.pct_of_peak_sustained_elapsed", 1),
    "tensor_busy_percent": ("sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_elapsed", 1),
    "issue_busy_percent": ("sm__inst_issued.avg.pct_of_peak_sustained_elapsed", 1),
}
"""Column: metric, and what its base unit (ns, bytes, percent) is multiplied by."""


def counted(report: str, points: Iterable[Point]) -> list[dict[str, Any]]:
    """Return a row for each launch of the points' layers, in order; a counter that the device lacks is left out.

    Raises:
        ValueError: the report holds no layer for each point.
    """
    table = [row for row in csv.reader(io.StringIO(report)) if len(row) > 1]
    if not table:
        raise ValueError(f"no launch was profiled; the profiler said: {report.strip()[-300:]!r}")
    names, launches = table[0], [dict(zip(table[0], row, strict=False)) for row in table[2:]]
    kernel = names.index("Kernel Name")
    layers: list[list[Mapping[str, str]]] = []
    for launch in launches:
        if launch[names[kernel]] == "route_kernel":
            layers.append([])
        layers[-1].append(launch)
    rows: list[dict[str, Any]] = []
    for point, layer in zip(points, layers, strict=True):
        parts = parts_of([launch["Kernel Name"] for launch in layer])
        for part, launch in zip(parts, layer, strict=True):
            found = {
                column: float(launch[metric].replace(",", "")) * scale
                for column, (metric, scale) in METRICS.items()
                if launch.get(metric)
            }
            rows.append({**asdict(point), "part": part, "kernel": launch["Kernel Name"], **found})
    return rows


def run_layers() -> None:
    """Run each point's layer, profiled once it is compiled."""
    import torch

    from ..kernels.weights import random_weights
    from .bench_arms import batch_of
    from .bench_contenders import ours

    for point in POINTS:
        batch = batch_of(point.spec, point.tokens, point.skew, [random_weights(point.spec, "cuda")])
        step = ours(batch).step
        step(0)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        step(0)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def profile() -> str:
    """Return the profiler's table of this module's layers.

    Raises:
        ValueError: there is no profiler, or counters are not permitted.
    """
    kernels = "|".join((*PART_OF_KERNEL, *PRODUCTS))
    metrics = ",".join(metric for metric, _ in METRICS.values())
    command = [
        "ncu", "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off", "--clock-control",
        "none", "--kernel-name", f"regex:{kernels}", "--metrics", metrics,
        sys.executable, "-P", "-m", __spec__.name, "--layers", "--out", ".",
    ]  # fmt: skip
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError("counters need Nsight Compute's ncu on the path; install it") from None
    if ran.returncode:
        raise ValueError(f"ncu failed: {(ran.stderr or ran.stdout).strip()[-300:]!r}; may this user read counters?")
    return "\n".join(line for line in ran.stdout.splitlines() if line.startswith('"'))


def main() -> None:
    """Profile the layers and write their counters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="of a checkout that has no history with it")
    parser.add_argument("--layers", action="store_true", help="only run the layers, for the profiler")
    arguments = parser.parse_args()
    if arguments.layers:
        run_layers()
        return
    rows = counted(profile(), POINTS)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_parquet(arguments.out / "counters.parquet", rows)
    with EnergyMeter(0) as meter:
        manifest = {
            **device_manifest(meter, arguments.commit),
            "command": "python -P -m expertslice.experiments.counters",
        }
    (arguments.out / "counters.manifest.json").write_text(to_json(manifest) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
