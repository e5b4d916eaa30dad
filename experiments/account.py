"""Where a layer's time goes, launch by launch: the timeline of a replayed graph beside the floor of each product.

`python -P -m expertslice.experiments.account --out FOLDER --seconds 120`. A launch is charged with what it adds to the
time at which everything before it had ended, so that overlapping launches are not counted twice and the parts add up.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..policies.contract import DeviceSpec
from ..policies.cost import floor_ns
from ..policies.data import load_device
from ..runtime.meter import EnergyMeter
from ..runtime.timer import Captured, capture
from .bench import points_of
from .bench_arms import Batch
from .bench_rows import LONG_LAYER_US, Point, Work, cold_batches, device_manifest, write_parquet
from .runs import to_json

PARTS = ("routing", "gather", "up", "middle", "down", "fused", "combine", "gaps")
PART_OF_KERNEL = {
    "route_kernel": "routing",
    "place_kernel": "routing",
    "gather_kernel": "gather",
    "fused_kernel": "fused",
    "combine_kernel": "combine",
}
PRODUCTS = ("grouped_kernel", "pingpong_kernel")
PART_OF_PRODUCT = {1: ("up",), 2: ("up", "down"), 3: ("up", "middle", "down")}


class Span(NamedTuple):
    """One launch on the device's timeline."""

    kernel: str
    start_us: float
    end_us: float


def parts_of(kernels: Sequence[str]) -> list[str]:
    """Return the part that each launch of one layer belongs to; ValueError for a kernel that is none of a layer's."""
    unknown = [name for name in kernels if name not in PART_OF_KERNEL and name not in PRODUCTS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no launch of a layer; known are {', '.join((*PART_OF_KERNEL, *PRODUCTS))}")
    products = iter(PART_OF_PRODUCT.get(sum(name in PRODUCTS for name in kernels), ()))
    return [PART_OF_KERNEL.get(name) or next(products) for name in kernels]


def account(spans: Sequence[Span], layers: int) -> dict[str, float]:
    """Return the median µs of each part over the layers of a timeline, gaps before launches among them.

    Raises:
        ValueError: the timeline holds no equal number of launches for each layer.
    """
    ordered = sorted(spans, key=lambda span: span.start_us)
    if not ordered or len(ordered) % layers:
        raise ValueError(f"a timeline of {len(ordered)} launches for {layers} layers; each must have as many")
    count = len(ordered) // layers
    found: list[dict[str, float]] = []
    ended_us = ordered[0].start_us
    for first in range(0, len(ordered), count):
        layer = ordered[first : first + count]
        took = dict.fromkeys(PARTS, 0.0)
        for span, part in zip(layer, parts_of([span.kernel for span in layer]), strict=True):
            took["gaps"] += max(0.0, span.start_us - ended_us)
            took[part] += max(0.0, span.end_us - max(span.start_us, ended_us))
            ended_us = max(ended_us, span.end_us)
        found.append(took)
    return {part: statistics.median(took[part] for took in found) for part in PARTS}


def timeline(arm: Captured) -> list[Span]:
    """Return the launches of one replay."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    arm.time_ns()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        arm.graph.replay()
        torch.cuda.synchronize()
    on_device = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in on_device
        if event.name.endswith("_kernel")
    ]


def product_floors_us(batch: Batch, device: DeviceSpec) -> dict[str, float]:
    """Return the least time of each product: its weights of the experts hit read once, or its rows multiplied."""
    work, products = Work.of(batch), batch.spec.products(batch.spec.d_ff_of(0))
    sizes = [product.n_dim * product.k_dim for product in products]
    shares = zip(PART_OF_PRODUCT[len(sizes)], (size / sum(sizes) for size in sizes), strict=True)
    return {
        f"{part}_floor_us": floor_ns(
            hbm_bytes=work.hbm_bytes * share, flops=work.flops * share, device=device, dtype=batch.spec.dtype
        )
        / 1000
        for part, share in shares
    }


def account_of(point: Point, batch: Batch, device: DeviceSpec) -> dict[str, Any]:
    """Return a point's row: the parts, the floors, and the whole as an event timer sees it."""
    from .bench_contenders import ours

    contender = ours(batch)
    floor_us = Work.of(batch).floor_us(device)
    arm = capture(contender.step, 1 if floor_us > LONG_LAYER_US else len(batch.sets))
    whole_us = statistics.median(arm.time_ns() for _ in range(5)) / 1000
    found = account(timeline(arm), arm.layers)
    return {
        **asdict(point),
        "launch": contender.about["launch"],
        "whole_us": whole_us,
        "floor_us": floor_us,
        **{f"{part}_us": took_us for part, took_us in found.items()},
        **product_floors_us(batch, device),
    }


def line(row: dict[str, Any]) -> str:
    """Return one row for the terminal."""
    parts = " ".join(f"{part} {row[f'{part}_us']:.1f}" for part in PARTS if row[f"{part}_us"])
    head = f"{row['model']:14} {row['kind']:6} {row['skew']:7} {row['tokens']:5}"
    return f"{head} whole {row['whole_us']:8.1f} floor {row['floor_us']:8.1f} us: {parts}"


def loads() -> list[Point]:
    """Return the loads accounted for: SwiGLU layers of the models compared, then the paper's three-layer ReLU ones."""
    swiglu = ("qwen3-30b-a3b", "mixtral-8x7b", "large", "olmoe-1b-7b", "medium", "small")
    points = points_of(swiglu, (1, 32, 256, 2048, 8192), ("uniform", "zipf"), "swiglu")
    return points + points_of(("small", "medium", "large"), (1, 32, 256, 2048), ("uniform",), "relu3")


def main() -> None:
    """Account for the loads of the page about speed, or those of the models given, within a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--models", help="comma-separated; default all")
    parser.add_argument("--commit", help="of a checkout that has no history with it")
    arguments = parser.parse_args()
    wanted = arguments.models.split(",") if arguments.models else None
    points = [point for point in loads() if wanted is None or point.model in wanted]
    arguments.out.mkdir(parents=True, exist_ok=True)
    device, rows = load_device("h100-sxm5-80gb"), []
    for point, batch in cold_batches(points, arguments.seconds):
        rows.append(account_of(point, batch, device))
        sys.stdout.write(line(rows[-1]) + "\n")
    write_parquet(arguments.out / "account.parquet", rows)
    command = f"python -P -m expertslice.experiments.account --seconds {arguments.seconds:.0f}"
    with EnergyMeter(0) as meter:
        manifest = {**device_manifest(meter, arguments.commit), "command": command}
    (arguments.out / "account.manifest.json").write_text(to_json(manifest) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
