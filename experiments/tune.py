"""The search for the launches of a layer shape: candidates from a model of the load, times from a clock that is given.

Every range of tokens is timed at its most, under uniform and Zipf routing; the launch with the least geometric mean
wins. Tiles are tried for both products at once, then other ways to launch the best, then tiles and ways to load for one
product alone.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from ..kernels.launches import FP32_TILES, PINGPONG, TILES, default_launch, rows_per_expert
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
WAYS = (
    {"descriptors": False, "flatten": False},
    {"descriptors": True, "flatten": False},
    {"descriptors": True, "flatten": True},
)
KEPT = 3
"""Launches whose tiles are tried with each other's."""

Times = Mapping[str, float]
Clock = Callable[[LayerLaunch], Times | None]
"""ns of a launch by skew; None: the device cannot hold it."""


def heights(rows: float) -> tuple[int, ...]:
    """Return the tile heights worth trying for so many rows of an expert."""
    return (16,) if rows <= 4 else (16, 32, 64) if rows <= 40 else (64, 128) if rows <= 300 else (128,)


def tiles_for(spec: MoeSpec, num_tokens: int, sm_count: int) -> list[LaunchSpec]:
    """Return the tiles worth trying for a load, each by pointers, by descriptors, and pipelined across tiles."""
    _, rows = rows_per_expert(spec, num_tokens)
    fp32 = spec.dtype == "fp32"
    tiles = FP32_TILES if fp32 else TILES
    spread = [replace(tile, num_ctas=sm_count * n) for height in heights(rows) for tile, n in tiles.get(height, ())]
    # Without matrix instructions operands wait in registers, and those that come by descriptors spill.
    return [replace(tile, **way) for tile in spread for way in (WAYS[:1] if fp32 else WAYS)]


def gathered_tiles(spec: MoeSpec, num_tokens: int, sm_count: int) -> list[LaunchSpec]:
    """Return the tiles worth trying on rows that were gathered first: none where experts have few rows."""
    _, rows = rows_per_expert(spec, num_tokens)
    if rows < LEAST_GATHERED_ROWS or spec.dtype == "fp32" or len(set(spec.d_ff)) > 1:
        return []
    piped = [tile for tile in tiles_for(spec, num_tokens, sm_count) if tile.flatten and tile.block_m >= 64]
    return piped + [replace(tile, num_ctas=sm_count) for tile in PINGPONG]


def candidates(spec: MoeSpec, num_tokens: int, sm_count: int) -> list[LayerLaunch]:
    """Return the launches of one tile for both products, fused where that may pay: what a search meets is among them.

    But for whether launches overlap: what is to be compiled ahead.
    """
    _, rows = rows_per_expert(spec, num_tokens)
    found = [default_launch(spec, num_tokens, sm_count=sm_count)]
    for tile in tiles_for(spec, num_tokens, sm_count):
        found.append(unsliced(tile, tile))
        if fusable(spec, num_tokens, tile):
            found += [unsliced(tile, down, fused=True) for down in narrower(tile, rows)]
    found += [unsliced(tile, tile, gathered=True) for tile in gathered_tiles(spec, num_tokens, sm_count)]
    return list(dict.fromkeys(found))


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
    spec: MoeSpec,
    num_tokens: int,
    clock: Clock,
    *,
    sm_count: int,
    expired: Callable[[], bool],
    known: Sequence[LayerLaunch] = (),
) -> tuple[LayerLaunch, dict[LayerLaunch, Times]]:
    """Return the best launch for a load, and what each one tried took; at least one is timed, whatever the time.

    Args:
        spec: the layer's shape.
        num_tokens: of the load.
        clock: what times a launch.
        sm_count: of the device.
        expired: whether time is over.
        known: launches that were best for loads nearby, which are timed first.
    """
    found: dict[LayerLaunch, Times] = {}

    def time_all(launches: Iterable[LayerLaunch]) -> LayerLaunch:
        for launch in launches:
            if launch not in found and (not found or not expired()) and (times := clock(launch)):
                found[launch] = times
        if not found:
            raise ValueError(
                f"no launch of {spec.name!r} fits this device; its shared memory or registers are too small"
            )
        return _sorted(found)[0]

    best = time_all((*known, *starts(spec, num_tokens, sm_count)))
    best = time_all(ways(spec, num_tokens, best, sm_count))
    best = time_all(pairs(spec, num_tokens, _sorted(found)[:KEPT]))
    best = time_all(loads(best))
    return time_all(ways(spec, num_tokens, best, sm_count)), found


def starts(spec: MoeSpec, num_tokens: int, sm_count: int) -> list[LayerLaunch]:
    """Return the modelled launch, then each tile for both products, by the loads that suit its height."""
    modelled = default_launch(spec, num_tokens, sm_count=sm_count)
    fp32 = spec.dtype == "fp32"
    tiles = [
        t for t in tiles_for(spec, num_tokens, sm_count) if t.flatten == t.descriptors == (t.block_m >= 64 and not fp32)
    ]
    return [modelled, *(unsliced(tile, tile) for tile in tiles)]


def ways(spec: MoeSpec, num_tokens: int, launch: LayerLaunch, sm_count: int) -> list[LayerLaunch]:
    """Return the other ways to launch the same tiles: fused, overlapping, prefetching, on gathered rows."""
    up, down = launch.slices[0].up, launch.slices[0].down
    launch = replace(launch, dependent=False, prefetch_bytes=0)
    found = [launch]
    one_tile = replace(up, **WAYS[0]) == replace(down, **WAYS[0])
    if one_tile and fusable(spec, num_tokens, up) and not launch.gathered:
        found = [replace(launch, fused=fused) for fused in (launch.fused, not launch.fused)]
    gathered = gathered_tiles(spec, num_tokens, sm_count)
    found += [unsliced(tile, tile, gathered=True) for tile in gathered]
    if {up, down} <= {*gathered}:
        found.append(unsliced(up, down, gathered=True))
    hit, _ = rows_per_expert(spec, num_tokens)
    sizes = (0, *PREFETCH_BYTES) if hit >= PREFETCH_HIT * spec.num_experts else (0,)
    return found + [replace(one, dependent=True, prefetch_bytes=size) for one in found[:2] for size in sizes]


def fusable(spec: MoeSpec, num_tokens: int, tile: LaunchSpec) -> bool:
    """Return whether one launch for all products may pay, and can be."""
    hit, rows = rows_per_expert(spec, num_tokens)
    bound_by_launches = rows <= FUSED_ROWS or hit * spec.expert_bytes() < FUSED_BYTES
    return bound_by_launches and len(set(spec.d_ff)) == 1 and tile.block_m < 128 and not tile.flatten


def pairs(spec: MoeSpec, num_tokens: int, leaders: Sequence[LayerLaunch]) -> list[LayerLaunch]:
    """Return the best launch with tiles of the others for one product, or with a narrower last tile."""
    best = leaders[0]
    up, down = best.slices[0].up, best.slices[0].down
    _, rows = rows_per_expert(spec, num_tokens)
    others = [one.slices[0] for one in leaders if one.gathered == best.gathered]
    chosen = [(up, other.down) for other in others] + [(other.up, down) for other in others]
    if best.fused:
        tiles = [one.up for one in others if fusable(spec, num_tokens, one.up)]
        chosen = [(tile, one) for tile in tiles for one in narrower(tile, rows)]
    return [replace(best, slices=(SliceLaunch(up=a, down=b),)) for a, b in dict.fromkeys(chosen)]


def loads(launch: LayerLaunch) -> list[LayerLaunch]:
    """Return the launch with other ways to load, by pointers or descriptors; gathered rows have one."""
    up, down = launch.slices[0].up, launch.slices[0].down
    chosen = [(replace(up, **way), down) for way in WAYS] + [(up, replace(down, **way)) for way in WAYS]
    if launch.fused:
        chosen = [(replace(up, **way), replace(down, **way)) for way in WAYS]
    kept = [(a, b) for a, b in chosen if not launch.gathered and not (launch.fused and a.flatten)]
    return [replace(launch, slices=(SliceLaunch(up=a, down=b),)) for a, b in kept]


def _sorted(found: Mapping[LayerLaunch, Times]) -> list[LayerLaunch]:
    return sorted(found, key=lambda launch: mean_ns(found[launch]))
