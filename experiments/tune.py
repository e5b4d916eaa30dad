"""The search for the launches of a layer shape: candidates from a model of the load, times from a clock that is given.

Every range of tokens is timed at its most, under uniform and Zipf routing; the launch with the least geometric mean
wins. Tiles are tried for both products at once, then for each alone; whether launches overlap and prefetch comes last.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from ..kernels.launches import LONG_RUNS, PINGPONG, TILES, default_launch, rows_per_expert, tile_for
from ..kernels.spec import LaunchSpec, LayerLaunch, SliceLaunch
from ..traces.schema import MoeSpec

RANGES = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""The most tokens of each range."""
SKEWS = ("uniform", "zipf")
FUSED_ROWS = 8
FUSED_BYTES = 400_000_000
"""Layers that read more weights are not bound by launches: fusing is tried for few rows of an expert only."""
LEAST_GATHERED_ROWS = 24
"""Of an expert: with fewer, weights are what is read, and a launch that copies rows only costs."""
NARROW, NARROW_ROWS = (16, 32), 4
"""Columns of a fused launch's last tiles, and the rows of an expert up to which they are tried."""
PREFETCH_HIT, PREFETCH_BYTES = 0.9, (4 << 20, 8 << 20)
"""The share of experts that even routing must hit, and how much is asked for: about what memory gives meanwhile."""
KEPT = 3
"""Tiles of the joint search that are tried for each product alone."""

Times = Mapping[str, float]
Clock = Callable[[LayerLaunch], Times | None]
"""ns of a launch by skew; None: the device cannot hold it."""


def heights(rows: float) -> tuple[int, ...]:
    """Return the tile heights worth trying for so many rows of an expert."""
    return (16,) if rows <= 4 else (16, 32, 64) if rows <= 40 else (64, 128) if rows <= 300 else (128,)


def tiles_for(spec: MoeSpec, num_tokens: int, sm_count: int) -> list[LaunchSpec]:
    """Return the tiles worth trying for a load, each by pointers, by descriptors, and pipelined across tiles."""
    _, rows = rows_per_expert(spec, num_tokens)
    tiles = [one for height in heights(rows) for one in (*TILES[height], *LONG_RUNS.get(height, ()))]
    spread = [replace(tile, num_ctas=sm_count * n) for tile, n in tiles]
    ways = ({}, {"descriptors": True}, {"descriptors": True, "flatten": True})
    return [replace(tile, **way) for tile in spread for way in ways]


def gathered_tiles(spec: MoeSpec, num_tokens: int, sm_count: int) -> list[LaunchSpec]:
    """Return the tiles worth trying on rows that were gathered first: none where experts have few rows."""
    _, rows = rows_per_expert(spec, num_tokens)
    if rows < LEAST_GATHERED_ROWS or spec.dtype == "fp32" or len(set(spec.d_ff)) > 1:
        return []
    piped = [tile for tile in tiles_for(spec, num_tokens, sm_count) if tile.flatten and tile.block_m >= 64]
    return piped + [replace(tile, num_ctas=sm_count) for tile in PINGPONG]


def candidates(spec: MoeSpec, num_tokens: int, sm_count: int) -> list[LayerLaunch]:
    """Return the launches of one tile for both products, after the modelled ones; fused where that may pay."""
    hit, rows = rows_per_expert(spec, num_tokens)
    products = spec.products(max(spec.d_ff))
    found = [default_launch(spec, num_tokens, sm_count=sm_count)]
    for height in heights(rows):
        up, down = (tile_for(height, hit, rows, products[i].n_dim, sm_count=sm_count) for i in (0, -1))
        found.append(unsliced(up, down))
    fusable = (rows <= FUSED_ROWS or hit * spec.expert_bytes() < FUSED_BYTES) and len(set(spec.d_ff)) == 1
    for tile in tiles_for(spec, num_tokens, sm_count):
        found.append(unsliced(tile, tile))
        if fusable and tile.block_m < 128 and not tile.flatten:
            found += [unsliced(tile, down, fused=True) for down in narrower(tile, rows)]
    found += [unsliced(tile, tile, gathered=True) for tile in gathered_tiles(spec, num_tokens, sm_count)]
    return list(dict.fromkeys(found))


def prefetching(spec: MoeSpec, num_tokens: int, launches: Iterable[LayerLaunch]) -> list[LayerLaunch]:
    """Return dependent launches that ask for weights while they wait: for loads that will need nearly all of them."""
    hit, _ = rows_per_expert(spec, num_tokens)
    worth = hit >= PREFETCH_HIT * spec.num_experts
    return [replace(one, dependent=True, prefetch_bytes=size) for one in launches for size in PREFETCH_BYTES if worth]


def narrower(tile: LaunchSpec, rows: float) -> list[LaunchSpec]:
    """Return a fused tile for the last product, also narrower where experts have few rows.

    The last product has fewer columns than the first: wide tiles of few experts would leave SMs without one.
    """
    widths = (tile.block_n, *NARROW) if rows <= NARROW_ROWS else (tile.block_n,)
    return [replace(tile, block_n=n) for n in sorted(set(widths)) if n <= tile.block_n]


def unsliced(up: LaunchSpec, down: LaunchSpec, *, fused: bool = False, gathered: bool = False) -> LayerLaunch:
    """Return the launch of one slice."""
    return LayerLaunch(slices=(SliceLaunch(up=up, down=down),), fused=fused, gathered=gathered)


def mean_ns(times: Times) -> float:
    """Return the geometric mean over skews."""
    return math.exp(sum(math.log(ns) for ns in times.values()) / len(times))


def search(
    spec: MoeSpec, num_tokens: int, clock: Clock, *, sm_count: int, expired: Callable[[], bool]
) -> tuple[LayerLaunch, dict[LayerLaunch, Times]]:
    """Return the best launch for a load, and what each one tried took; at least one is timed, whatever the time."""
    found: dict[LayerLaunch, Times] = {}

    def time_all(launches: Iterable[LayerLaunch]) -> None:
        for launch in launches:
            if launch not in found and (not found or not expired()) and (times := clock(launch)):
                found[launch] = times

    time_all(candidates(spec, num_tokens, sm_count))
    if not found:
        raise ValueError(f"no launch of {spec.name!r} fits this device; its shared memory or registers are too small")
    leaders = _sorted(found)[:KEPT]
    time_all(split(leaders))
    time_all(replace(launch, dependent=True) for launch in _sorted(found)[:KEPT])
    time_all(prefetching(spec, num_tokens, _sorted(found)[:KEPT]))
    return _sorted(found)[0], found


def split(leaders: Sequence[LayerLaunch]) -> list[LayerLaunch]:
    """Return the launches that take up and down from different leaders; a fused one has one tile."""
    whole = [launch for launch in leaders if not launch.fused]
    return [unsliced(a.slices[0].up, b.slices[0].down, gathered=a.gathered) for a in whole for b in whole if a != b]


def _sorted(found: Mapping[LayerLaunch, Times]) -> list[LayerLaunch]:
    return sorted(found, key=lambda launch: mean_ns(found[launch]))
