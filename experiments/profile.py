"""`expertslice profile`: what `calibrate` learns from, group by group, within minutes; torch inside functions alone.

Rows are appended to rows.jsonl as groups finish; the same `--out` goes on with what is missing. A layer runs as
`expertslice run` would run it under the plan, and its output must have the bits of the first plan's.

Shape letters: P weight sets, T tokens, E experts.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..policies.contract import MECHANISMS, ByTokens, Control, Plan, Setup, Slice, SliceLayout
from ..policies.data import load_device, load_variants
from ..policies.layouts import fits_together, max_ctas_per_sm, one_slice_plan, uniform_slice
from ..policies.validate import validate
from ..runtime.meter import EnergyMeter, MeterError
from ..runtime.partition import Partitions
from ..runtime.timer import Captured, burst_size, capture, interleave
from .bench import DEVICES
from .bench_arms import Batch, batch_of, num_sets
from .bench_contenders import device_name
from .bench_rows import claim, device_manifest, in_us, read_rows, write_parquet
from .design import Load, loads, split_held_out
from .errors import StoppedError
from .pair_gpu import HARMLESS
from .precompile import precompile_launches
from .profile_parts import bandwidth, costs, neighbours, power
from .runs import to_json

if TYPE_CHECKING:
    import torch

    from ..kernels.workspace import Workspace

TILES = ("16x128x64w4s4", "32x128x64w4s4", "64x128x64w4s4", "128x128x64w8s4", "128x256x64w8s4")
SHARING = TILES[0], TILES[2]
"""What shares an SM where the tiles that suit a load do not fit one together."""
GRIDS = (32, 64, 96)
"""CTAs of bounded grids, one an SM."""
FIRST_SMS = (8, 16, 32, 48, 72, 88, 104)
"""Of splits: the slice of experts with few tokens."""
Row = dict[str, Any]
Groups = Iterator[tuple[str, Callable[[], list[Row]]]]


WaysOf = Callable[[Setup, Sequence[int]], "list[Way]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One plan of a load."""

    name: str
    plan: Plan
    held_out: bool = False


def ways(setup: Setup, counts_E: Sequence[int]) -> list[Way]:
    """Return the plans to measure for a load: whole launches, bounded grids, one set of SMs, splits and shared SMs."""
    sms, rows = setup.device.sm_count, [n for n in counts_E if n]
    heights = sorted(
        TILES, key=lambda name: abs(np.log2(setup.variant(name).block_m / np.clip(np.mean(rows), 16, 128)))
    )
    hot, cold = sorted(heights[:2], key=lambda name: -setup.variant(name).block_m)
    bound = max(1, int(np.median(rows)))
    most = sms // setup.device.sm_partition_step * setup.device.sm_partition_step
    found = [
        _way(f"shared {tile} x{n}", uniform_slice("shared", sms, tile, n))
        for tile in heights[:3]
        for n in (1, 2)
        if n <= max_ctas_per_sm(setup.variant(tile), setup.device)
    ]
    found += [_way(f"sm_budget {n} {hot}", uniform_slice("sm_budget", n, hot)) for n in GRIDS]
    found += [_way(f"green {n} {hot}", uniform_slice("green_context", n, hot)) for n in (32, 64)]
    fits = fits_together([setup.variant(cold), setup.variant(hot)], setup.device)
    small, large = (cold, hot) if fits else SHARING
    both = uniform_slice("sm_budget", sms, small), uniform_slice("sm_budget", sms, large)
    found.append(_way(f"together {small} {large} <{bound}", *both, bound=bound))
    for n in FIRST_SMS:
        apart = uniform_slice("green_context", n, cold), uniform_slice("green_context", most - n, hot)
        found.append(_way(f"green {n}+{most - n} {cold} {hot} <{bound}", *apart, bound=bound))
    return found


def ways_of_tiles(setup: Setup, counts_E: Sequence[int]) -> list[Way]:
    """Return whole launches, and half of the device, for every tile that plans may name and `ways` does not know."""
    del counts_E
    sms, found = setup.device.sm_count, list[Way]()
    for one in setup.variants:
        if one.name in TILES:
            continue
        most = max_ctas_per_sm(one, setup.device)
        found += [_way(f"shared {one.name} x{n}", uniform_slice("shared", sms, one.name, n)) for n in sorted({1, most})]
        found.append(_way(f"green 64 {one.name}", uniform_slice("green_context", 64, one.name)))
    return found


def _way(name: str, *slices: Slice, bound: int | None = None) -> Way:
    bounds = () if bound is None else (bound,)
    rule = ByTokens(bounds=bounds, slice_ids=tuple(range(len(slices))))
    held_out = bound is not None and slices[0].mechanism == "green_context" and split_held_out(slices[0].sm_count)
    return Way(name=name, plan=Plan(layout=SliceLayout(slices=slices), placement=rule), held_out=held_out)


class Streams:
    """Streams of layouts."""

    def __init__(self) -> None:
        self._partitions = Partitions()

    def __call__(self, layout: SliceLayout) -> "Sequence[torch.cuda.Stream | None]":
        """Return a stream for each slice, or None for the current one: as the executor does."""
        import torch

        if layout.slices[0].mechanism != "green_context":
            return [torch.cuda.Stream() for _ in layout.slices] if layout.num_slices > 1 else [None]
        return self._partitions(*(one.sm_count for one in layout.slices))

    def close(self) -> None:
        """Destroy the partitions."""
        self._partitions.close()


def layer_step(batch: Batch, ws: "Workspace", plan: Plan, setup: Setup, streams: Streams) -> Callable[[int], Any]:
    """Return the call that runs the layer on one weight set as the runtime runs a plan."""
    import torch

    from ..kernels.layer import moe_layer
    from ..kernels.spec import MAX_SLICES, RouterSpec
    from ..runtime.lanes import StreamLanes
    from ..runtime.layers import launch_of, plan_words_LW

    device, launch, router = batch.x_TD.device, launch_of(plan, setup), RouterSpec.of(batch.spec)
    own = replace(ws, plan=plan_words_LW(plan, 1, batch.spec.num_experts)[0].to(device))
    stamps_LS2 = torch.zeros(1, MAX_SLICES, 2, dtype=torch.int64, device=device)
    lanes = StreamLanes(streams(plan.layout), stamps_LS2, sms=[one.sm_count for one in plan.layout.slices])

    def step(p: int) -> Any:
        lanes.enter(0)
        x_TD, logits_TE, weights = batch.x_TD, batch.logits_PTE[p], batch.sets[p]
        return moe_layer(x_TD, logits_TE, weights, router, own, launch, beside=lanes.beside)

    return step


def measure_load(
    load: Load, batch: Batch, setup: Setup, streams: Streams, rounds: int, ways_of: WaysOf = ways
) -> list[Row]:
    """Return a row for every way of a load, timed in turn; what the device cannot hold has a reason instead."""
    from ..kernels.workspace import Workspace

    ids_PTK = batch.logits_PTE.topk(batch.spec.top_k, dim=2).indices.cpu().numpy()
    counts_PE = [np.bincount(ids.ravel(), minlength=batch.spec.num_experts).tolist() for ids in ids_PTK]
    ws = Workspace.allocate(batch.spec, load.tokens, batch.x_TD.device)
    rows, arms, expected = list[Row](), list[Any](), list[Any]()
    for way in ways_of(setup, counts_PE[0]):
        row = _about(load, way, counts_PE)
        row |= _attempt(partial(layer_step, batch, ws, way.plan, setup, streams), way, setup, expected)
        if step := row.pop("step", None):
            try:
                arms.append((row, _fitting(capture(step, len(batch.sets)))))
            except ValueError as error:
                row |= {"status": "refused", "reason": str(error)}
        rows.append(row)
    timed = interleave([arm for _, arm in arms], rounds, "burst") if arms else None
    for (row, _), samples_ns in zip(arms, timed.samples_ns if timed else (), strict=True):
        row |= {"samples": len(samples_ns), **in_us("", samples_ns)}
    return rows


def _fitting(arm: Captured) -> Captured:
    """Return an arm whose replays fit a burst; ValueError where a replay takes longer."""
    # A third more: replays of the first arms are timed before the clock is at its highest, and may wait for others.
    burst_size([arm.time_ns() * arm.layers * 4 / 3])
    return arm


def _about(load: Load, way: Way, counts_PE: list[list[int]]) -> Row:
    assert isinstance(way.plan.placement, ByTokens)
    return {
        "arm": way.name, **asdict(load), "held_out": load.held_out or way.held_out, "tile_order": way.plan.tile_order,
        "slices": json.dumps([asdict(one) for one in way.plan.layout.slices]),
        "bounds": list(way.plan.placement.bounds), "counts": [n for counts_E in counts_PE for n in counts_E],
    }  # fmt: skip


def _attempt(make: Callable[[], Callable[[int], Any]], way: Way, setup: Setup, expected: list[Any]) -> Row:
    """Return a step whose first output has the expected bits, or why there is none; the first way's are expected."""
    import torch
    from triton import OutOfResources

    try:
        validate(way.plan, setup)
        out = (step := make())(0).clone()
    except (ValueError, OutOfResources) as error:
        return {"status": "refused", "reason": str(error).splitlines()[0]}
    if not expected:
        expected.append(out)
    return {"status": "ok", "step": step} if torch.equal(out, expected[0]) else {"status": "wrong bits"}


def groups(setup: Setup, meter: EnergyMeter, streams: Streams, rounds: int) -> Groups:
    """Yield the groups by name with what measures them, the cheap ones first, those of a shape side by side."""
    from ..kernels.weights import random_weights

    yield "costs", partial(costs, streams)
    yield "bandwidth", partial(bandwidth, setup.device, rounds)
    yield "neighbours", partial(neighbours, setup.device, streams, rounds)
    held: dict[str, list[Any]] = {}
    compiled = cache(partial(compile_ahead, setup))
    for load in loads():

        def measure(ways_of: WaysOf, load: Load = load) -> list[Row]:
            compiled()
            spec = load.spec
            if load.shape not in held:
                # The next shape's weights need the room of this one's.
                held.clear()
                _release()
            sets = held.setdefault(load.shape, [])
            wanted = num_sets(spec, load.tokens)
            sets += [random_weights(spec, "cuda", seed) for seed in range(len(sets), wanted)]
            batch = batch_of(spec, load.tokens, load.skew, sets[:wanted])
            return measure_load(load, batch, replace(setup, model=spec), streams, rounds, ways_of)

        yield f"layers {load.name}", partial(measure, ways)
        if load.skew == "uniform":
            yield f"tiles {load.name}", partial(measure, ways_of_tiles)
    yield "power", partial(power, setup.device, meter)


def compile_ahead(setup: Setup) -> None:
    """Compile on all cores what the loads run: a tile's kernels serve all of them, routing is of experts and tokens."""
    from ..runtime.layers import launch_of

    launches = [launch_of(one_slice_plan(SliceLayout(slices=(uniform_slice("shared", 1, one.name),))), setup)
                for one in setup.variants]  # fmt: skip
    found = list(loads())
    precompile_launches([
        *((found[0].spec, found[0].tokens, launch) for launch in launches),
        *((load.spec, load.tokens, launches[0]) for load in found),
    ])  # fmt: skip


def _release() -> None:
    import torch

    torch.cuda.empty_cache()


def run_profile(
    folder: Path, *, seconds: float, rounds: int, only: str | None, commit: str | None, say: Callable[[str], object]
) -> None:
    """Measure the groups that are missing within a time, into a folder.

    Raises:
        ValueError: nothing is known of this device, or the folder holds rows of another machine.
        StoppedError: the user stopped it; finished groups are kept.
    """
    if device_name() not in DEVICES:
        raise ValueError(f"nothing is known of {device_name()!r}; profiles can be of {', '.join(DEVICES)}")
    device = load_device(DEVICES[device_name()])
    variants = load_variants(device.compute_capability)
    mechanisms = frozenset(MECHANISMS) - {"mig"}
    try:
        with EnergyMeter(0) as meter:
            claim(folder, {**device_manifest(meter, commit), "rounds": rounds})
            setup = Setup(
                device=device, model=next(loads()).spec, variants=variants, mechanisms=mechanisms, control=Control(),
                seed=0,
            )  # fmt: skip
            streams = Streams()
            measure_groups(folder, groups(setup, meter, streams, rounds), meter, seconds, only, say)
            streams.close()
    except MeterError as error:
        raise ValueError(str(error)) from error
    except KeyboardInterrupt:
        raise StoppedError(f"stopped; finished groups are kept: go on with the same --out {folder}") from None


def measure_groups(
    folder: Path, found: Groups, meter: Any, seconds: float, only: str | None, say: Callable[[str], object]
) -> None:
    """Append each missing group's rows, flagged where the device throttled; write all as Parquet in the end."""
    path, end = folder / "rows.jsonl", time.monotonic() + seconds
    done = {row["part"] for row in read_rows(path)} if path.exists() else set()
    with path.open("a", encoding="utf-8") as file:
        for name, measure in found:
            if name in done or (only and only not in name):
                continue
            if time.monotonic() > end:
                say("time is up; the same command goes on with what is missing")
                break
            reasons = set(meter.snapshot().throttle_reasons or ())
            rows = measure()
            reasons |= set(meter.snapshot().throttle_reasons or ())
            about = {"group": name.split()[0], "part": name, "throttled": bool(reasons - HARMLESS)}
            file.write("".join(to_json(about | row, indent=None) + "\n" for row in rows))
            file.flush()
            say(f"{name}: {len(rows)} rows, {end - time.monotonic():.0f} s left")
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"no group was measured; give more --seconds, or another --only than {only!r}")
    write_parquet(folder / "rows.parquet", rows)
