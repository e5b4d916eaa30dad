"""Decode experts beside a dense product of another layer: work that no single launch can express, on a GPU.

Every arm tries the same launches of the decode part, then with its best one the matrix library's dense product and our
own on exactly the SMs that it has, and keeps the best. Co-resident parts are bounded grids that share every SM, so that
their launches are chosen as pairs: what one takes of an SM the other has not. SM sets of their own may then take a
share of the other part, once theirs has ended. All arms are timed in turn at last, and the stamps of both parts give
the frontier: how long decode takes against the rate that the dense product keeps.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..runtime.partition import Partitions
from ..runtime.timer import BURST_IDLE_NS, Captured, capture
from .slices_arms import Row, duel, tile_name, tiles, time_in_turn
from .slices_load import Load, Shape, Step, Streams, beside, in_turn, one_tile, quick, slices_of

if TYPE_CHECKING:
    import torch

    from ..kernels.spec import LaunchSpec

LaunchOf = Callable[[int], "LaunchSpec"]
"""A tile's launch on so many SMs."""
DECODE_SMS = tuple(range(16, 112, 8))
BOUNDED_SMS = (32, 64, 96)
DECODE_ROWS = 16
"""Of the decode part's tiles: its experts have fewer."""
DENSE_ROWS, LIBRARY = 128, "torch.mm"
JOINS = (0.06, 0.12, 0.18, 0.25, 0.32, 0.4, 0.5, -0.06, -0.12, -0.2, -0.3)
STAMPED, STAMPED_AT_ONCE = 105, 15
MOST_REL_DIFFERENCE = 5e-3
"""Of the dense product: on fewer SMs the library may pick another kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """A decode step's experts, and a dense product [m, k] times [k, n]."""

    decode: Shape
    m: int
    n: int
    k: int

    @property
    def name(self) -> str:
        """Return both parts in a few letters."""
        return f"{self.decode.name}-{self.m}x{self.n}x{self.k}"

    @property
    def dense(self) -> Shape:
        """Return the dense product as that of one expert, for our own launches."""
        return Shape(name="dense", d_model=self.k, d_ff=self.n, num_experts=1, top_k=1, tokens=self.m, zipf_s=0)


_LARGE = Shape(
    name="large", d_model=2048, d_ff=4096, num_experts=32, top_k=4, tokens=64, zipf_s=0, kind="relu3", products=3
)
_MIXTRAL = Shape(name="mixtral", d_model=4096, d_ff=14336, num_experts=8, top_k=2, tokens=32, zipf_s=0, kind="swiglu")
_QWEN3 = Shape(
    name="qwen3", d_model=2048, d_ff=768, num_experts=128, top_k=8, tokens=128, zipf_s=0, kind="swiglu", sets_at_once=4
)
MIXES = (
    Mix(decode=_LARGE, m=8192, n=8192, k=4096),
    Mix(decode=_MIXTRAL, m=8192, n=8192, k=8192),
    Mix(decode=_QWEN3, m=8192, n=4096, k=4096),
    Mix(decode=_LARGE, m=4096, n=4096, k=4096),
)


class Parts:
    """Both parts of a mix, stamped where they begin and end."""

    def __init__(self, load: Load, dense: Load) -> None:
        import torch

        self.load, self.own = load, dense
        self.flops, self.product = dense.flops, dense.out
        self._rows, self._weight = dense.rows_ND[: len(self.product)], dense.weight.mT
        self._stamps = torch.zeros(6, dtype=torch.int64, device=self._rows.device)

    def decode(self, launch_of: LaunchOf, sms: int) -> Step:
        """Return the decode part on a grid of so many SMs."""
        return self._stamped(0, in_turn(self.load, self.load.route(one_tile(launch_of(sms)))))

    def dense(self, launch_of: LaunchOf | None, sms: int) -> Step:
        """Return the dense part: the library's, or ours on a grid of so many SMs."""
        if launch_of is None:
            return self._stamped(2, self._library(0, len(self._rows)))
        own = in_turn(self.own, self.own.route(one_tile(launch_of(sms))))
        return self._stamped(2, lambda _: own(0))

    def decode_shared(self, launch_of: LaunchOf, sms: int, later_sms: int, later: float) -> tuple[Step, Step]:
        """Return the decode part without the last share of its experts, and those alone on other SMs."""
        experts = self.load.spec.num_experts
        first = min(experts - 1, max(1, round(experts * (1 - later))))
        queues = self.load.route(one_tile(launch_of(sms), launch_of(later_sms)), first=first)
        now, then = slices_of(self.load, queues)
        return self._stamped(0, now), self._stamped(4, then)

    def dense_shared(self, later: float) -> tuple[Step, Step]:
        """Return the library's dense part without the last share of its rows, and those alone."""
        rows = len(self._rows)
        first = max(1, round(rows * (1 - later) / DENSE_ROWS)) * DENSE_ROWS
        return self._stamped(2, self._library(0, first)), self._stamped(4, self._library(first, rows))

    def _library(self, first: int, end: int) -> Step:
        import torch

        return lambda _: torch.mm(self._rows[first:end], self._weight, out=self.product[first:end])

    def _stamped(self, at: int, step: Step) -> Step:
        from ..runtime.lanes import stamp_kernel

        def stamped(p: int) -> None:
            stamp_kernel[(1,)](self._stamps[at])
            step(p)
            stamp_kernel[(1,)](self._stamps[at + 1])

        return stamped

    def stamped_us(self, arm: Captured, join: float) -> list[tuple[float, float]]:
        """Return how long decode and dense took in replays of an arm, in bursts; what joined counts with its own."""
        found = []
        for i in range(STAMPED):
            if i % STAMPED_AT_ONCE == 0:
                time.sleep(BURST_IDLE_NS / 1e9)
            arm.graph.replay()
            begin, end, dense_begin, dense_end, _, joined_end = self._stamps.tolist()
            if join > 0:
                end = joined_end
            elif join < 0:
                dense_end = joined_end
            found.append(((end - begin) / 1000, (dense_end - dense_begin) / 1000))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to place the parts: streams for decode and dense, None for one after the other."""

    name: str
    side: str
    sms: int
    """Of the decode part's grid."""
    dense_sms: int
    streams: "Callable[[], Streams] | None"
    joint: bool = False
    """Launches of both parts are chosen together, ours on either side: for parts that share every SM."""

    def step(self, parts: Parts, decode_of: LaunchOf, dense_of: LaunchOf | None, join: float = 0.0) -> Step:
        """Return the step under launches of both parts.

        Above 0, `join` is the share of decode's experts that run on the dense part's SMs once that has ended; below 0
        it is the share of dense rows that run on decode's: what a split leaves idle.
        """
        if join > 0:
            decode, joining = parts.decode_shared(decode_of, self.sms, self.dense_sms, join)
            dense = _one_after_other(parts.dense(dense_of, self.dense_sms), joining)
        elif join < 0:
            dense, joining = parts.dense_shared(-join)
            decode = _one_after_other(parts.decode(decode_of, self.sms), joining)
        else:
            decode, dense = parts.decode(decode_of, self.sms), parts.dense(dense_of, self.dense_sms)
        if self.streams is None:
            return _one_after_other(decode, dense)
        return beside([decode, dense], self.streams())


def _one_after_other(*steps: Step) -> Step:
    def step(p: int) -> None:
        for one in steps:
            one(p)

    return step


def ways(sm_count: int, split: Partitions) -> Iterator[Way]:
    """Yield the controls, then bounded grids beside the dense product, then SM sets of their own."""
    import torch

    def plain(*priorities: int) -> "Callable[[], Streams]":
        held = [torch.cuda.Stream(priority=priority) for priority in priorities]
        return lambda: held

    way = partial(Way, dense_sms=sm_count)
    yield way(name="one after the other", side="unsliced", sms=sm_count, streams=None)
    for name, priorities in (("plain streams", (0, 0)), ("decode first", (-1, 0)), ("dense first", (0, -1))):
        yield way(name=name, side="unsliced", sms=sm_count, streams=plain(*priorities))
    for name, priorities in (("decode first", (-1, 0)), ("dense first", (0, -1))):
        streams = plain(*priorities)
        yield way(name=f"co-resident, {name}", side="sliced", sms=sm_count, streams=streams, joint=True)
    for sms in BOUNDED_SMS:
        yield way(name=f"bounded {sms}", side="sliced", sms=sms, streams=plain(-1, 0))
    for sms in DECODE_SMS:
        rest = sm_count - sms
        yield Way(name=f"green {sms}", side="sliced", sms=sms, dense_sms=rest, streams=partial(split, sms, rest))


def launches_of(block_m: int) -> dict[str, LaunchOf]:
    """Return launches of tiles of a height, up to as many CTAs as an SM holds."""
    return {
        f"{tile_name(tile)} x{n}": partial(lambda tile, n, sms: replace(tile, num_ctas=sms * n), tile, n)
        for tile, ctas in tiles()
        if tile.block_m == block_m
        for n in range(1, ctas + 1)
    }


def tune(parts: Parts, way: Way) -> Row:
    """Return a way's row with its best launches of both parts; without a step where the device has no such way."""
    best: Row = {"arm": way.name, "side": way.side, "quick_us": float("inf"), "join": 0.0}
    decode, own = launches_of(DECODE_ROWS), launches_of(DENSE_ROWS)
    dense = {LIBRARY: None, **own}

    def attempt(decode_name: str, dense_name: str, join: float = 0.0) -> None:
        make = partial(way.step, parts, decode[decode_name], dense[dense_name], join)
        one = quick(make, parts.load.num_sets)
        if one and one[0] / 1000 < best["quick_us"]:
            names = {"decode_launch": decode_name, "dense_launch": dense_name, "join": join}
            best.update({"quick_us": one[0] / 1000, "step": one[1], **names})

    for pair in itertools.product(decode, own if way.joint else (LIBRARY,)):
        attempt(*pair)
    if "step" in best and not way.joint:
        for name in own:
            attempt(best["decode_launch"], name)
        if way.name.startswith("green"):
            for join in JOINS:
                attempt(best["decode_launch"], best["dense_launch"] if join > 0 else LIBRARY, join)
    return best


def measure_mix(mix: Mix, rounds: int, split: Partitions) -> list[Row]:
    """Return a row for every way, each with its own best decode launch, then one that says what slicing gained."""
    import torch

    parts, sm_count = (
        Parts(Load(mix.decode), Load(mix.dense, cold=False)),
        torch.cuda.get_device_properties(0).multi_processor_count,
    )
    found = [row for way in ways(sm_count, split) if "step" in (row := tune(parts, way))]
    alone = _alone_us(parts, sm_count)
    bound_us = max(alone.values())
    expected = _outputs(parts, found[0]["step"])
    found = [row | _agreement(_outputs(parts, row["step"]), expected) for row in found]
    common = {"experiment": "beside", "name": mix.name, **asdict(mix), "floor_us": bound_us, **alone}
    wrong = [common | {k: v for k, v in row.items() if k != "step"} for row in found if row["status"] != "ok"]
    rows = time_in_turn([row for row in found if row["status"] == "ok"], parts.load.num_sets, rounds, bound_us)
    summary = duel(rows, parts.load.num_sets, rounds)
    rows = [row | _frontier(parts, row.pop("step"), row["join"]) for row in rows]
    return [*wrong, *(common | row for row in rows), common | {"arm": "gain", "side": "both", **summary}]


def _alone_us(parts: Parts, sm_count: int) -> Row:
    """Return each part's time by itself, by its fastest launch."""
    makes = [partial(parts.decode, launch_of, sm_count) for launch_of in launches_of(DECODE_ROWS).values()]
    dense = [partial(parts.dense, launch_of, sm_count) for launch_of in (None, *launches_of(DENSE_ROWS).values())]
    alone = [
        min(one[0] for make in some if (one := quick(make, parts.load.num_sets))) / 1000 for some in (makes, dense)
    ]
    return dict(zip(("decode_alone_us", "dense_alone_us"), alone, strict=True))


def _outputs(parts: Parts, step: Step) -> "tuple[torch.Tensor, torch.Tensor]":
    for out in (parts.load.out, parts.product):
        out.fill_(float("nan"))
    step(0)
    return parts.load.out.clone(), parts.product.clone()


def _agreement(found: "Sequence[torch.Tensor]", expected: "Sequence[torch.Tensor]") -> Row:
    """Return whether the decode bits are equal and the dense product is near enough to be timed."""
    import torch

    off = float((found[1].float() - expected[1].float()).norm() / expected[1].float().norm())
    right = torch.equal(found[0], expected[0]) and off <= MOST_REL_DIFFERENCE
    return {"status": "ok" if right else "wrong bits", "dense_same_bits": torch.equal(found[1], expected[1])}


def _frontier(parts: Parts, step: Step, join: float) -> Row:
    decode_us, dense_us = np.array(parts.stamped_us(capture(step, parts.load.num_sets), join)).T
    dense_us_q50 = float(np.median(dense_us))
    return {
        "decode_us_q50": float(np.median(decode_us)), "decode_us_q99": float(np.quantile(decode_us, 0.99)),
        "dense_us_q50": dense_us_q50, "dense_tflops": parts.flops / dense_us_q50 / 1e6,
    }  # fmt: skip
