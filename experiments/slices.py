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
import operator
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..policies.cost import floor_ns
from ..policies.data import load_device
from ..policies.layouts import SMEM_RESERVED_BYTES
from ..runtime.meter import EnergyMeter, MeterError
from ..runtime.partition import Partitions
from .bench import DEVICES
from .bench_contenders import device_name
from .bench_rows import device_manifest, read_rows, refuse_other_machine, write_parquet
from .cli_gpu import require_gpu
from .runs import to_json
from .slices_arms import Row, duel, smem_bytes, tile_name, tiles, time_in_turn
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
REGIME = "burst: at most 20 ms busy, then at least 100 ms idle; graph replay; weights cold"
COLD_SMS = (16, 32, 48, 64, 80)
SMS_STEPS, LEAST_SMS = (-8, -4, 4, 8), 4
ORDERS = ("expert", "heavy", "light")
KEPT = 5
PAIRS = 5
"""Pairs of tiles that each bound starts from on either side."""
OTHER_TILES = 4
"""The fastest of a part, which a step of the search may take instead."""
HOPPER_SMEM_BYTES, HOPPER_REGS = 233_472, 65_536
"""Of an SM: what its CTAs share."""
Tile = tuple["LaunchSpec", int]
Ranking = dict[int, tuple[list[Tile], list[Tile]]]
"""By bound: the tiles of the experts below it and of the others, those first that are fastest alone on all SMs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to run a load."""

    how: Literal["one", "in turn", "dependent", "co-resident", "green"]
    hot: Tile
    """Of all experts, where there is one launch."""
    cold: Tile | None = None
    bound: int | None = None
    """Experts of fewer tokens are the cold ones."""
    sms: int = 0
    """Where slices run beside each other: the cold one's CTAs, or SMs."""
    order: str = "expert"

    @property
    def side(self) -> Literal["sliced", "unsliced"]:
        """Return which side the arm is of."""
        return "sliced" if self.sms else "unsliced"

    @property
    def name(self) -> str:
        """Return the arm in a few words."""
        words = [self.how, str(self.sms or ""), *(tile_name(tile[0]) for tile in (self.cold, self.hot) if tile)]
        return " ".join(filter(None, (*words, f"<{self.bound}" if self.bound else "", self.order)))

    def step(self, load: Load, sm_count: int, split: Partitions, shared: "Streams") -> Step:
        """Return what enqueues the load."""
        hot, num_hot = self.hot
        if self.cold is None:
            launch = one_tile(replace(hot, num_ctas=sm_count * num_hot))
            return in_turn(load, load.route(launch, tile_order=self.order))
        cold, num_cold = self.cold
        if self.how == "green":
            rest = sm_count - self.sms
            grids, streams = (self.sms * num_cold, rest * num_hot), split(self.sms, rest)
        elif self.how == "co-resident":
            grids, streams = (self.sms, sm_count), shared
        else:
            grids, streams = (sm_count * num_cold, sm_count * num_hot), None
        tiles = [replace(tile, num_ctas=num_ctas) for tile, num_ctas in zip((cold, hot), grids, strict=True)]
        queues = load.route(one_tile(*tiles, dependent=self.how == "dependent"), self.bound, self.order)
        return beside(slices_of(load, queues), streams) if streams else in_turn(load, queues)


def launches() -> "list[LayerLaunch]":
    """Return a launch of every tile, to compile, as it is and dependent on the one before it."""
    return [one_tile(tile, dependent=dependent) for tile, _ in tiles() for dependent in (False, True)]


def shares_sm(*chosen: "LaunchSpec") -> bool:
    """Return whether a CTA of each tile fits one SM of a Hopper GPU, by shared memory and by registers."""
    held_bytes = sum(smem_bytes(tile) + SMEM_RESERVED_BYTES for tile in chosen)
    regs = sum(32 * t.num_warps * t.max_regs for t in chosen)
    return held_bytes <= HOPPER_SMEM_BYTES and regs <= HOPPER_REGS and not any(t.pingpong for t in chosen)


def ranked(load: Load, sm_count: int) -> Ranking:
    """Return tiles for cold and hot experts under each bound; both sides choose from them."""
    found: Ranking = {}
    for bound in load.bounds:
        of_side: list[list[Tile]] = []
        for side, (least, most) in enumerate(((0, 64), (64, 256))):
            timed: list[tuple[float, Tile]] = []
            for tile, ctas in tiles():
                if least <= tile.block_m <= most:
                    launch = one_tile(*[replace(tile, num_ctas=sm_count * ctas)] * 2)
                    make = partial(lambda launch, bound, s: slices_of(load, load.route(launch, bound))[s], launch)
                    if one := quick(partial(make, bound, side), load.num_sets):
                        timed.append((one[0], (tile, ctas)))
            of_side.append([tile for _, tile in sorted(timed, key=operator.itemgetter(0))])
        found[bound] = of_side[0], of_side[1]
    return found


def starts(ranking: Ranking, sm_count: int) -> list[Arm]:
    """Return the arms that both searches begin with.

    Unsliced: single launches of every tile and order, then the best pairs one after the other. Sliced: the best pairs
    that fit on an SM together, and all best pairs on SM sets of their own.
    """
    found = [Arm(how="one", hot=tile, order=order) for tile in tiles() for order in ORDERS]
    for bound, (colds, hots) in ranking.items():
        pairs = sorted(itertools.product(range(len(colds)), range(len(hots))), key=sum)
        chosen = [(colds[c], hots[h]) for c, h in pairs]
        fitting = [pair for pair in chosen if shares_sm(pair[0][0], pair[1][0])]
        for cold, hot in chosen[:PAIRS]:
            arm = Arm(how="dependent", cold=cold, hot=hot, bound=bound)
            found += [arm, replace(arm, how="in turn")]
            found += [replace(arm, how="green", sms=sms) for sms in COLD_SMS if sms < sm_count]
        found += [
            Arm(how="co-resident", cold=cold, hot=hot, bound=bound, sms=sm_count) for cold, hot in fitting[:PAIRS]
        ]
    return random.Random(0).sample(found, len(found))


def neighbours(arm: Arm, load: Load, ranking: Ranking, sm_count: int) -> Iterator[Arm]:
    """Yield the arms that differ in one choice: the next bounds and splits, other tiles, another order."""
    yield from (replace(arm, order=order) for order in ORDERS if order != arm.order)
    if arm.bound is None:
        return
    yield from (replace(arm, bound=bound) for bound in load.bounds_beside(arm.bound))
    if arm.sms:
        most = sm_count - LEAST_SMS * (arm.how == "green")
        others = (arm.sms + by for by in SMS_STEPS)
        yield from (replace(arm, sms=sms) for sms in others if LEAST_SMS <= sms <= most)
    else:
        yield replace(arm, how="in turn" if arm.how == "dependent" else "dependent")
    colds, hots = ranking[min(ranking, key=partial(_apart, arm.bound))]
    found = [replace(arm, cold=tile) for tile in colds[:OTHER_TILES]]
    found += [replace(arm, hot=tile) for tile in hots[:OTHER_TILES]]
    yield from (
        one for one in found if one.how != "co-resident" or shares_sm(*(t[0] for t in (one.cold, one.hot) if t))
    )


def _apart(bound: int, other: int) -> int:
    return abs(bound - other)


def search(
    arms: Sequence[Arm], near: Callable[[Arm], Iterable[Arm]], attempt: Callable[[Arm], Row | None], seconds: float
) -> tuple[list[Row], dict[str, float]]:
    """Return the fastest arms of right bits with their steps, best first, and the us of all tried in the time.

    All arms given are tried, then the neighbours of the best that has untried ones.
    """
    end, found, tried_us = time.monotonic() + seconds, list[Row](), dict[str, float]()
    queue, seen, opened = deque(arms), set(arms), set[str]()
    while queue and not (tried_us and time.monotonic() > end):
        arm = queue.popleft()
        if row := attempt(arm):
            tried_us[arm.name] = round(row["quick_us"], 2)
            found.append(row)
            found.sort(key=lambda row: (row["status"] != "ok", row["quick_us"]))
            for slow in found[KEPT:]:
                slow.pop("step", None)
        if not queue:
            best = next((row for row in found[:KEPT] if row["status"] == "ok" and row["arm"] not in opened), None)
            if best:
                opened.add(best["arm"])
                queue.extend(one for one in near(best["spec"]) if one not in seen)
                seen.update(queue)
    return found, tried_us


def attempted(arm: Arm, load: Load, make: Callable[[Arm], Step], expected: "torch.Tensor") -> Row | None:
    """Return an arm's row with its step, once its bits are right; None: the device cannot hold it."""
    import torch

    if (one := quick(partial(make, arm), load.num_sets)) is None:
        return None
    ns, step = one
    load.out.fill_(float("nan"))
    step(0)
    row = {"arm": arm.name, "side": arm.side, "quick_us": ns / 1000, "spec": arm}
    return row | ({"status": "ok", "step": step} if torch.equal(load.out, expected) else {"status": "wrong bits"})


def measure(shape: Shape, seconds: float, rounds: int, split: Partitions) -> list[Row]:
    """Return a row for each finalist and torch's product, then one that says what slicing gained."""
    import torch

    device = load_device(DEVICES[device_name()])
    load, sm_count = Load(shape), torch.cuda.get_device_properties(0).multi_processor_count
    floor_us = floor_ns(hbm_bytes=load.hbm_bytes, flops=load.flops, device=device, dtype="bf16") / 1000
    plain = next(tile for tile, _ in tiles() if not tile.pingpong)
    in_turn(load, load.route(one_tile(replace(plain, num_ctas=sm_count))))(0)
    expected, ranking = load.out.clone(), ranked(load, sm_count)
    shared = [torch.cuda.Stream() for _ in range(2)]
    attempt = partial(attempted, load=load, make=lambda arm: arm.step(load, sm_count, split, shared), expected=expected)
    near = partial(neighbours, load=load, ranking=ranking, sm_count=sm_count)
    arms = starts(ranking, sm_count)
    sides = [[arm for arm in arms if arm.side == side] for side in ("unsliced", "sliced")]
    found, tried = zip(*(search(one, near, attempt, seconds) for one in sides), strict=True)
    for row in itertools.chain(*found):
        del row["spec"]
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
        times += f", decode {row['decode_us_q50']:.0f} us beside {row['dense_tflops']:.0f} TFLOP/s, join {row['join']}"
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
    split = Partitions()
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
    parser.add_argument("--search", type=float, default=14.0, help="seconds that each side searches")
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
        manifest = device_manifest(meter, arguments.commit)
        refuse_other_machine(arguments.out, manifest)
        path = arguments.out / "manifest.json"
        held = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
        asked = {name: value for name, value in vars(arguments).items() if name not in ("out", "commit")}
        run = {"commit": manifest["commit"], "asked": asked, "before": manifest.pop("before")}
        path.write_text(to_json({**manifest, "regime": REGIME, "runs": [*held, run]}) + "\n", encoding="utf-8")
        run_all(arguments, say)
    rows = [json.loads(text) for text in (arguments.out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    write_parquet(arguments.out / "rows.parquet", rows)


if __name__ == "__main__":
    main()
