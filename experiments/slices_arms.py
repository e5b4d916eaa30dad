"""What both slice experiments share: tiles, green contexts, times of finalists in turn and of the best two alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..runtime.timer import capture, interleave, paired_ratio, quantiles
from .bench_rows import in_us

if TYPE_CHECKING:
    from ..kernels.spec import LaunchSpec

LEAST_ROUNDS = 6
NEIGHBOURS = (
    (128, 256, 64, 8, 3, 1), (16, 64, 128, 4, 3, 4), (16, 128, 64, 4, 3, 4),
    (32, 64, 128, 4, 3, 3), (64, 64, 64, 4, 2, 4),
)  # fmt: skip
"""Tiles beyond those of launches that are small enough to share an SM: the widest one, and what fits beside it."""
Row = dict[str, Any]


def tiles() -> "list[tuple[LaunchSpec, int]]":
    """Return the tiles that both sides choose from, with the CTAs of each that an SM holds."""
    from ..kernels.launches import PINGPONG, TILES
    from ..kernels.spec import LaunchSpec

    found = [pair for by_height in TILES.values() for pair in by_height]
    for m, n, k, warps, stages, ctas in NEIGHBOURS:
        tile = LaunchSpec(block_m=m, block_n=n, block_k=k, num_warps=warps, num_stages=stages, num_ctas=1)
        found.append((tile, ctas))
    found = [(replace(tile, descriptors=tile.block_m >= 64, flatten=tile.block_m >= 64), n) for tile, n in found]
    return [*found, *((tile, 1) for tile in PINGPONG)]


def smem_bytes(tile: "LaunchSpec") -> int:
    """Return about what shared memory the compiler gives a CTA of two-byte numbers: operands, and the way of a result.

    Loads by pointers hold one stage less than they are ahead. A pair that this lets through and an SM does not is
    merely slow.
    """
    stage_bytes = 2 * (tile.block_m + tile.block_n) * tile.block_k
    if not tile.descriptors:
        return (tile.num_stages - 1) * stage_bytes
    return tile.num_stages * stage_bytes + max(8192, tile.block_m * tile.block_n)


def tile_name(tile: "LaunchSpec") -> str:
    """Return a tile in a few letters."""
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k}w{tile.num_warps}s{tile.num_stages}" + "p" * tile.pingpong


def time_in_turn(final: list[Row], num_sets: int, rounds: int, floor_us: float) -> list[Row]:
    """Return the rows with quantiles of all arms timed in turn, the fastest first."""
    samples = interleave([capture(row["step"], num_sets) for row in final], rounds, "burst").samples_ns
    for row, samples_ns in zip(final, samples, strict=True):
        row |= {"samples": len(samples_ns), **in_us("", samples_ns)}
        row["of_floor"] = floor_us / row["us_q50"]
    return sorted(final, key=lambda row: row["us_q50"])


def duel(rows: Sequence[Row], num_sets: int, rounds: int) -> Row:
    """Return the ratio of the best control to the best sliced arm, timed again by themselves; empty without both."""
    best = {row["side"]: row for row in reversed(rows)}
    control = min((row for side, row in best.items() if side != "sliced"), key=lambda row: row["us_q50"], default=None)
    if control is None or "sliced" not in best:
        return {"status": "one side has no arm of right bits"}
    arms = [capture(row["step"], num_sets) for row in (control, best["sliced"])]
    samples = interleave(arms, max(LEAST_ROUNDS, rounds), "burst").samples_ns
    ratio = paired_ratio(*samples)
    unsliced, cut = (quantiles(samples_ns).q50_ns / 1000 for samples_ns in samples)
    return {
        "status": "ok", "unsliced": control["arm"], "sliced": best["sliced"]["arm"], "unsliced_us": unsliced,
        "sliced_us": cut, "gain": ratio.median, "gain_low": ratio.low, "gain_high": ratio.high,
    }  # fmt: skip
