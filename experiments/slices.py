"""Slices against honest controls on a GPU: grouped products first, then work that no single launch can express.

`python -P -m expertslice.experiments.slices --out FOLDER --seconds 420`. Rows are appended to rows.jsonl as shapes
finish; a call stops at its time limit, and with the same `--out` it goes on with the shapes that are missing.

Both sides search for the same time, over tiles that are ranked for both alike. The five best of each side are timed
again in turn, A B .. B A, and then the best of either side against each other alone, so that the choice does not
flatter the chosen.
Bits come first: an arm whose output differs from one plain launch's is reported and not timed.
"""

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..policies.cost import floor_ns
from ..policies.data import load_device
from ..policies.layouts import SMEM_RESERVED_BYTES
from ..runtime.meter import EnergyMeter, MeterError
from .bench import DEVICES
from .bench_contenders import device_name
from .bench_rows import device_manifest, read_rows, write_parquet
from .cli_gpu import require_gpu
from .runs import to_json
from .slices_arms import Row, Splits, duel, tile_name, tiles, time_in_turn
from .slices_beside import DECODE_ROWS, DENSE_ROWS, MIXES, launches_of, measure_mix
from .slices_load import Load, Shape, Step, Streams, beside, in_turn, one_tile, precompile, quick, slices_of

if TYPE_CHECKING:
    import torch

    from ..kernels.spec import LaunchSpec, LayerLaunch

SHAPES = (
    Shape(name="4096x14336", d_model=4096, d_ff=14336, num_experts=8, top_k=2, tokens=512, zipf_s=1.5),
    Shape(name="2048x4096-E64", d_model=2048, d_ff=4096, num_experts=64, top_k=4, tokens=2048, zipf_s=2.0),
    Shape(name="2048x4096-E32", d_model=2048, d_ff=4096, num_experts=32, top_k=4, tokens=2048, zipf_s=1.0),
    Shape(name="2048x1024", d_model=2048, d_ff=1024, num_experts=64, top_k=8, tokens=1024, zipf_s=1.2),
    Shape(name="2048x4096-E32-T4096", d_model=2048, d_ff=4096, num_experts=32, top_k=4, tokens=4096, zipf_s=1.5),
    Shape(name="2048x768", d_model=2048, d_ff=768, num_experts=128, top_k=8, tokens=4096, zipf_s=1.0),
)
"""One projection each. With `--layers` the whole layers of the same experts come after them."""
COLD_SMS = (16, 32, 48, 64, 80)
ORDERS = ("expert", "heavy", "light")
KEPT = 5
SPLIT_PAIRS, SHARED_PAIRS = 9, 9
"""Pairs of tiles that each bound tries in turn or apart, and together on an SM."""
HOPPER_SMEM_BYTES, HOPPER_REGS = 233_472, 65_536
"""Of an SM: what its CTAs share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to run a load."""

    name: str
    side: str
    """unsliced or sliced."""
    make: Callable[[], Step]


def launches() -> "list[LayerLaunch]":
    """Return a launch of every tile, to compile, as it is and dependent on the one before it."""
    return [one_tile(tile, dependent=dependent) for tile, _ in tiles() for dependent in (False, True)]


def shares_sm(*chosen: "LaunchSpec") -> bool:
    """Return whether a CTA of each tile fits one SM of a Hopper GPU, by operands in shared memory and by registers."""
    smem_bytes = sum(2 * t.num_stages * (t.block_m + t.block_n) * t.block_k + SMEM_RESERVED_BYTES for t in chosen)
    regs = sum(32 * t.num_warps * t.max_regs for t in chosen)
    return smem_bytes <= HOPPER_SMEM_BYTES and regs <= HOPPER_REGS and not any(t.pingpong for t in chosen)


Tile = tuple["LaunchSpec", int]
Pair = tuple[Tile, Tile]


def ranked_pairs(load: Load, sm_count: int) -> dict[int, list[Pair]]:
    """Return pairs of tiles for cold and hot experts under each bound, those first that are fastest one by one.

    Both sides choose from them: each part is timed by itself on all SMs.
    """
    found: dict[int, list[Pair]] = {}
    for bound in load.bounds:
        of_side: list[list[tuple[float, Tile]]] = []
        for side, (least, most) in enumerate(((0, 64), (64, 256))):
            timed: list[tuple[float, Tile]] = []
            for tile, ctas in tiles():
                if least <= tile.block_m <= most:
                    launch = one_tile(*[replace(tile, num_ctas=sm_count * ctas)] * 2)
                    make = partial(lambda launch, bound, s: slices_of(load, load.route(launch, bound))[s], launch)
                    if one := quick(partial(make, bound, side), load.num_sets):
                        timed.append((one[0], (tile, ctas)))
            of_side.append(timed)
        both = sorted(itertools.product(*of_side), key=lambda pair: pair[0][0] + pair[1][0])
        found[bound] = [(cold, hot) for (_, cold), (_, hot) in both]
    return found


def controls(load: Load, sm_count: int, pairs: dict[int, list[Pair]]) -> list[Arm]:
    """Return single launches of every tile and order, then two tiles one after the other, the second dependent or not.

    Of pairs those that are fastest one by one.
    """
    found = []
    for tile, ctas in tiles():
        launch = one_tile(replace(tile, num_ctas=sm_count * ctas))
        for order in ORDERS:
            make = partial(lambda launch, order: in_turn(load, load.route(launch, tile_order=order)), launch, order)
            found.append(Arm(name=f"one {tile_name(tile)} {order}", side="unsliced", make=make))
    later = []
    for bound, ((cold, c), (hot, h)) in _best(pairs, SPLIT_PAIRS):
        wide = replace(cold, num_ctas=sm_count * c), replace(hot, num_ctas=sm_count * h)
        for how, dependent in (("in turn", False), ("dependent", True)):
            launch = one_tile(*wide, dependent=dependent)
            make = partial(lambda launch, bound: in_turn(load, load.route(launch, bound)), launch, bound)
            later.append(Arm(name=f"{how} {tile_name(cold)} {tile_name(hot)} <{bound}", side="unsliced", make=make))
    return [*found, *random.Random(0).sample(later, len(later))]


def sliced(load: Load, sm_count: int, pairs: dict[int, list[Pair]], split: "Splits") -> list[Arm]:
    """Return cold beside hot experts, shuffled: grids of one CTA an SM that share all SMs, and SM sets of their own."""
    import torch

    shared, found = [torch.cuda.Stream() for _ in range(2)], []
    fitting = {bound: [p for p in some if shares_sm(p[0][0], p[1][0])] for bound, some in pairs.items()}
    for bound, ((cold, _), (hot, _)) in _best(fitting, SHARED_PAIRS):
        launch = one_tile(replace(cold, num_ctas=sm_count), replace(hot, num_ctas=sm_count))
        make = partial(_beside, load, launch, bound, lambda: shared)
        found.append(Arm(name=f"co-resident {tile_name(cold)} {tile_name(hot)} <{bound}", side="sliced", make=make))
    for bound, ((cold, c), (hot, h)) in _best(pairs, SPLIT_PAIRS):
        for sms in COLD_SMS:
            launch = one_tile(replace(cold, num_ctas=sms * c), replace(hot, num_ctas=(sm_count - sms) * h))
            make = partial(_beside, load, launch, bound, partial(split, sms))
            found.append(Arm(name=f"green {sms} {tile_name(cold)} {tile_name(hot)} <{bound}", side="sliced", make=make))
    return random.Random(0).sample(found, len(found))


def _best(pairs: dict[int, list[Pair]], most: int) -> list[tuple[int, Pair]]:
    return [(bound, pair) for bound, some in pairs.items() for pair in some[:most]]


def _beside(load: Load, launch: "LayerLaunch", bound: int, streams: "Callable[[], Streams]") -> Step:
    return beside(slices_of(load, load.route(launch, bound)), streams())


def search(
    load: Load, arms: Sequence[Arm], seconds: float, expected: "torch.Tensor"
) -> tuple[list[Row], dict[str, float]]:
    """Return the fastest arms of right bits with their steps, best first, and the us of all tried in the time."""
    import torch

    end, found, tried_us = time.monotonic() + seconds, list[Row](), dict[str, float]()
    for arm in arms:
        if tried_us and time.monotonic() > end:
            break
        if (one := quick(arm.make, load.num_sets)) is None:
            continue
        ns, step = one
        tried_us[arm.name] = round(ns / 1000, 2)
        load.out.fill_(float("nan"))
        step(0)
        if not torch.equal(load.out, expected):
            found.append({"arm": arm.name, "side": arm.side, "status": "wrong bits"})
            continue
        found.append({"arm": arm.name, "side": arm.side, "status": "ok", "quick_us": ns / 1000, "step": step})
        found.sort(key=lambda row: row.get("quick_us", float("inf")))
        for row in found[KEPT:]:
            row.pop("step", None)
    return found, tried_us


def measure(shape: Shape, seconds: float, rounds: int, split: Splits) -> list[Row]:
    """Return a row for each finalist and torch's product, then one that says what slicing gained."""
    import torch

    device = load_device(DEVICES[device_name()])
    load, sm_count = Load(shape), torch.cuda.get_device_properties(0).multi_processor_count
    floor_us = floor_ns(hbm_bytes=load.hbm_bytes, flops=load.flops, device=device, dtype="bf16") / 1000
    plain = next(tile for tile, _ in tiles() if not tile.pingpong)
    in_turn(load, load.route(one_tile(replace(plain, num_ctas=sm_count))))(0)
    expected, pairs = load.out.clone(), ranked_pairs(load, sm_count)
    sides = controls(load, sm_count, pairs), sliced(load, sm_count, pairs, split)
    found, tried = zip(*(search(load, arms, seconds, expected) for arms in sides), strict=True)
    common = {"experiment": "grouped", **asdict(shape), "floor_us": floor_us, "weight_sets": load.num_sets}
    wrong = [common | row for side in found for row in side if row["status"] != "ok"]
    final = [row for side in found for row in side[:KEPT] if "step" in row]
    if shape.products == 1:
        final.append({"arm": "torch grouped", "side": "torch", "status": "ok", "step": load.torch_grouped})
        differing = float((load.torch_grouped(0) != expected).float().mean())
        final[-1]["differing_share"] = differing
    rows = time_in_turn(final, load.num_sets, rounds, floor_us)
    summary = {"tried_unsliced_us": json.dumps(tried[0]), "tried_sliced_us": json.dumps(tried[1])}
    summary |= duel(rows, load.num_sets, rounds)
    if {"unsliced_us", "sliced_us"} <= set(summary):
        room_us = summary["unsliced_us"] - floor_us
        summary["of_room"] = (summary["unsliced_us"] - summary["sliced_us"]) / room_us
    for row in rows:
        row.pop("step")
    return [*wrong, *(common | row for row in rows), common | {"arm": "gain", "side": "both", **summary}]


def line(row: Row) -> str:
    """Return one row for the terminal."""
    head = f"{row['experiment']:8} {row['name']:22}"
    if row["arm"] == "gain":
        gain = f"x{row['gain']:.3f} [{row['gain_low']:.3f}, {row['gain_high']:.3f}]" if "gain" in row else row["status"]
        return f"{head} gain {gain}: {row.get('sliced')} over {row.get('unsliced')}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['arm']}"
    times = f"{row['us_q50']:9.1f} us, {row['of_floor']:.2f} of the floor"
    if "decode_us_q50" in row:
        times += f", decode {row['decode_us_q50']:.0f} us beside {row['dense_tflops']:.0f} TFLOP/s"
    return f"{head} {times}  {row['side']:8} {row['arm']}"


def run_all(arguments: argparse.Namespace, say: Callable[[str], object]) -> None:
    """Measure the shapes that are missing, within the time given."""
    import torch

    path, end = arguments.out / "rows.jsonl", time.monotonic() + arguments.seconds
    done = {(row["experiment"], row["name"]) for row in read_rows(path)} if path.exists() else set()
    whole = [replace(s, name=f"{s.name}-layer", kind="swiglu", products=2) for s in SHAPES if arguments.layers]
    shapes = [s for s in (*SHAPES, *whole) if ("grouped", s.name) not in done and "grouped" in arguments.what]
    mixes = [m for m in MIXES if ("beside", m.name) not in done and "beside" in arguments.what]
    jobs = [(shape, launch) for shape in shapes for launch in launches()]
    for mix in mixes:
        for shape, rows in ((mix.decode, DECODE_ROWS), (mix.dense, DENSE_ROWS)):
            jobs += [(shape, one_tile(launch_of(1))) for launch_of in launches_of(rows).values()]
    precompile(jobs)
    say(f"compiled, {end - time.monotonic():.0f} s left")
    split = Splits(torch.cuda.get_device_properties(0).multi_processor_count)
    measures = [partial(measure, s, arguments.search, arguments.rounds, split) for s in shapes]
    measures += [partial(measure_mix, m, arguments.rounds, split) for m in mixes]
    with path.open("a", encoding="utf-8") as file:
        for job in measures:
            if time.monotonic() > end:
                say("time is up; the same command goes on with what is missing")
                break
            torch.cuda.empty_cache()
            rows = job()
            file.write("".join(to_json(row, indent=None) + "\n" for row in rows))
            file.flush()
            for row in rows:
                say(line(row))
    torch.cuda.synchronize()
    split.close()


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=420.0, help="after which no shape begins")
    parser.add_argument("--search", type=float, default=10.0, help="seconds that each side searches")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--what", nargs="+", choices=("grouped", "beside"), default=("grouped", "beside"))
    parser.add_argument("--layers", action="store_true", help="whole layers after the products")
    parser.add_argument("--commit", help="of a checkout that has no history with it")
    arguments = parser.parse_args()
    try:
        _run(arguments)
    except (ValueError, MeterError) as error:
        parser.error(str(error))


def _run(arguments: argparse.Namespace) -> None:
    require_gpu("this experiment")
    if device_name() not in DEVICES:
        raise ValueError(f"nothing is known of {device_name()!r}; this experiment knows {', '.join(DEVICES)}")
    arguments.out.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    with EnergyMeter(0) as meter:
        manifest = {
            **device_manifest(meter, arguments.commit),
            "command": f"python -P -m expertslice.experiments.slices --seconds {arguments.seconds:.0f}",
            "regime": "burst: at most 20 ms busy, then at least 100 ms idle; graph replay; weights cold",
            "search_s": arguments.search,
            "rounds": arguments.rounds,
        }
        (arguments.out / "manifest.json").write_text(to_json(manifest) + "\n", encoding="utf-8")
        run_all(arguments, say)
    rows = [json.loads(text) for text in (arguments.out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    write_parquet(arguments.out / "rows.parquet", rows)


if __name__ == "__main__":
    main()
