"""Decode experts beside a dense product of another layer: work that no single launch can express, on a GPU.

Every arm tries the same launches of the decode part and keeps its best; the dense product is the matrix library's. All
arms are then timed in turn, and the stamps of both parts give the frontier: how long decode takes against the rate that
the dense product keeps.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..runtime.timer import BURST_IDLE_NS, Captured, capture, quantiles
from .slices_load import Load, Shape, Step, Streams, in_turn, one_tile, quick

if TYPE_CHECKING:
    import torch

    from ..kernels.spec import LaunchSpec
    from .slices import Splits

Row = dict[str, Any]
DECODE_SMS = (16, 24, 32, 40, 48, 64)
BOUNDED_SMS = (32, 64, 96)
DECODE_ROWS = 16
"""Of the decode part's tiles: its experts have fewer."""
STAMPED, STAMPED_AT_ONCE = 20, 5
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

    def __init__(self, mix: Mix, load: Load) -> None:
        import torch

        self.load, device = load, load.rows_ND.device
        generator = torch.Generator(device).manual_seed(1)
        a, b = (
            torch.randn(rows, columns, device=device, generator=generator).bfloat16()
            for rows, columns in ((mix.m, mix.k), (mix.k, mix.n))
        )
        self.product = torch.empty(mix.m, mix.n, dtype=torch.bfloat16, device=device)
        self._stamps = torch.zeros(4, dtype=torch.int64, device=device)
        self._multiply = partial(torch.mm, a, b, out=self.product)
        self.flops = 2 * mix.m * mix.n * mix.k

    def decode(self, launch_of: "Callable[[int], LaunchSpec]", sms: int) -> Step:
        """Return the decode part on a grid of so many SMs."""
        return self._stamped(0, in_turn(self.load, self.load.route(one_tile(launch_of(sms)))))

    def dense(self, _: int) -> None:
        """Enqueue the dense part."""
        self._stamped(2, lambda _: self._multiply())(0)

    def _stamped(self, at: int, step: Step) -> Step:
        from ..runtime.lanes import stamp_kernel

        def stamped(p: int) -> None:
            stamp_kernel[(1,)](self._stamps[at])
            step(p)
            stamp_kernel[(1,)](self._stamps[at + 1])

        return stamped

    def stamped_us(self, arm: Captured) -> list[tuple[float, float]]:
        """Return how long decode and dense took in replays of an arm, in bursts."""
        found = []
        for i in range(STAMPED):
            if i % STAMPED_AT_ONCE == 0:
                time.sleep(BURST_IDLE_NS / 1e9)
            arm.graph.replay()
            begin, end, dense_begin, dense_end = self._stamps.tolist()
            found.append(((end - begin) / 1000, (dense_end - dense_begin) / 1000))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to place the parts: streams for decode and dense, None for one after the other."""

    name: str
    side: str
    sms: int
    """Of the decode part's grid."""
    streams: "Callable[[], Streams] | None"

    def step(self, parts: Parts, launch_of: "Callable[[int], LaunchSpec]") -> Step:
        """Return the step under a launch of the decode part."""
        from .slices import beside

        decode = parts.decode(launch_of, self.sms)
        if self.streams is not None:
            return beside([decode, parts.dense], self.streams())

        def in_turn(p: int) -> None:
            decode(p)
            parts.dense(p)

        return in_turn


def ways(sm_count: int, split: "Splits") -> Iterator[Way]:
    """Yield the controls, then bounded grids beside the dense product, then SM sets of their own."""
    import torch

    def plain(*priorities: int) -> "Callable[[], Streams]":
        held = [torch.cuda.Stream(priority=priority) for priority in priorities]
        return lambda: held

    yield Way(name="one after the other", side="unsliced", sms=sm_count, streams=None)
    for name, priorities in (("plain streams", (0, 0)), ("decode first", (-1, 0)), ("dense first", (0, -1))):
        yield Way(name=name, side="unsliced", sms=sm_count, streams=plain(*priorities))
    for sms in BOUNDED_SMS:
        yield Way(name=f"bounded {sms}", side="sliced", sms=sms, streams=plain(-1, 0))
    for sms in DECODE_SMS:
        yield Way(name=f"green {sms}", side="sliced", sms=sms, streams=partial(split, sms))


def decode_launches() -> "list[tuple[str, Callable[[int], LaunchSpec]]]":
    """Return the launches that every arm tries: flat tiles, up to as many CTAs as an SM holds."""
    from .slices import tile_name, tiles

    return [
        (f"{tile_name(tile)} x{n}", partial(lambda tile, n, sms: replace(tile, num_ctas=sms * n), tile, n))
        for tile, ctas in tiles()
        if tile.block_m == DECODE_ROWS
        for n in range(1, ctas + 1)
    ]


def tune(parts: Parts, way: Way) -> Row:
    """Return a way's row with its best decode launch; without a step where the device has no such way."""
    best: Row = {"arm": way.name, "side": way.side, "quick_us": float("inf")}
    for name, launch_of in decode_launches():
        one = quick(partial(way.step, parts, launch_of), parts.load.num_sets)
        if one and one[0] / 1000 < best["quick_us"]:
            best |= {"quick_us": one[0] / 1000, "decode_launch": name, "step": one[1]}
    return best


def measure_mix(mix: Mix, rounds: int, split: "Splits") -> list[Row]:
    """Return a row for every way, each with its own best decode launch, then one that says what slicing gained."""
    import torch

    from .slices import duel, time_in_turn

    parts, sm_count = Parts(mix, Load(mix.decode)), torch.cuda.get_device_properties(0).multi_processor_count
    found = [row for way in ways(sm_count, split) if "step" in (row := tune(parts, way))]
    alone = _alone_us(parts, sm_count)
    bound_us = max(alone.values())
    expected = _outputs(parts, found[0]["step"])
    found = [row | _agreement(_outputs(parts, row["step"]), expected) for row in found]
    common = {"experiment": "beside", "name": mix.name, **asdict(mix), "floor_us": bound_us, **alone}
    wrong = [common | {k: v for k, v in row.items() if k != "step"} for row in found if row["status"] != "ok"]
    rows = time_in_turn([row for row in found if row["status"] == "ok"], parts.load.num_sets, rounds, bound_us)
    summary = duel(rows, parts.load.num_sets, rounds)
    rows = [row | _frontier(parts, row.pop("step")) for row in rows]
    return [*wrong, *(common | row for row in rows), common | {"arm": "gain", "side": "both", **summary}]


def _alone_us(parts: Parts, sm_count: int) -> Row:
    """Return each part's time by itself, decode by its fastest launch."""
    makes = [partial(parts.decode, launch_of, sm_count) for _, launch_of in decode_launches()]
    decode = [one[0] for make in makes if (one := quick(make, parts.load.num_sets))]
    dense = [one[0] for one in [quick(lambda: parts.dense, parts.load.num_sets)] if one]
    return {"decode_alone_us": min(decode) / 1000, "dense_alone_us": min(dense) / 1000}


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


def _frontier(parts: Parts, step: Step) -> Row:
    decode_us, dense_us = zip(*parts.stamped_us(capture(step, parts.load.num_sets)), strict=True)
    decode, dense = quantiles(decode_us), quantiles(dense_us)
    return {
        "decode_us_q50": decode.q50_ns, "decode_us_q95": decode.q95_ns, "dense_us_q50": dense.q50_ns,
        "dense_tflops": parts.flops / dense.q50_ns / 1e6,
    }  # fmt: skip
