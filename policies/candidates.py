"""The layouts and plans that the shipped policies choose among.

The set is small on purpose: every layout is captured before step 0, and every plan is priced at each decision.
"""

from collections.abc import Sequence
from dataclasses import replace

from .contract import ByTokens, DeviceSpec, Mechanism, Plan, Setup, Slice, SliceLayout, TileVariant
from .layouts import (
    co_resident_layout,
    default_variant,
    fits_together,
    max_ctas_per_sm,
    one_slice_plan,
    uniform_slice,
    unsliced_layout,
)

COLD_SM_SHARES = (0.25, 0.375, 0.5)
"""Shares of the SMs that exclusive splits give to the cold slice."""
BOUND_TILES = (1, 2, 4)
"""Rules by tokens call an expert cold below this many cold tiles of rows."""


def usable_variants(setup: Setup) -> tuple[TileVariant, ...]:
    """Return the tile variants of which an SM holds at least one CTA.

    Raises:
        ValueError: there is none.
    """
    usable = [v for v in setup.variants if max_ctas_per_sm(v, setup.device)]
    if not usable:
        names = ", ".join(v.name for v in setup.variants) or "no tiles"
        raise ValueError(f"{setup.device.name} holds none of {names}; give a smaller tile variant")
    return tuple(usable)


def _depth(*tiles: TileVariant) -> tuple[int, int]:
    """Return how much of K the tiles hold in flight, then their warps: an order of tiles of one shape."""
    return sum(v.num_stages * v.block_k for v in tiles), sum(v.num_warps for v in tiles)


def _up_to_two_ctas(tile: TileVariant, device: DeviceSpec) -> int:
    return min(2, max_ctas_per_sm(tile, device))


def auto_tiles(setup: Setup) -> tuple[TileVariant, ...]:
    """Return the tiles that "auto" stands for on slices that own SMs: 64 and 128 rows by 128 columns, where they fit.

    Of each, the one that fits an SM twice if any does, and has the deepest pipeline.
    """
    usable = usable_variants(setup)
    best: dict[int, TileVariant] = {}
    for tile in sorted(usable, key=lambda v: (_up_to_two_ctas(v, setup.device), _depth(v)), reverse=True):
        if tile.block_n == 128 and tile.block_m in (64, 128):
            best.setdefault(tile.block_m, tile)
    return tuple(best[rows] for rows in sorted(best)) or (default_variant(usable),)


def unsliced_plans(setup: Setup) -> tuple[Plan, ...]:
    """Return one plan for each shape of tile, once per SM and where that fits twice; the default tile comes first.

    Of tiles that differ only in warps or stages the one with the deepest pipeline is taken.
    """
    usable = usable_variants(setup)
    best: dict[tuple[int, int, int], str] = {}
    for tile in sorted(usable, key=_depth, reverse=True):
        for ctas in range(1, 1 + _up_to_two_ctas(tile, setup.device)):
            best.setdefault((tile.block_m, tile.block_n, ctas), tile.name)
    first = default_variant(usable)
    shapes = sorted(best, key=lambda shape: (shape[:2] != (first.block_m, first.block_n), shape))
    return tuple(one_slice_plan(unsliced_layout(setup, best[shape], shape[2])) for shape in shapes)


def tile_pairs(setup: Setup) -> tuple[tuple[TileVariant, TileVariant], ...]:
    """Return (cold, hot) tiles that share an SM: of each pair of shapes the one with the deepest pipelines.

    Cold tiles have 128 columns and as few rows as any, or 64; hot ones have more rows, and no fewer columns. The
    largest come first.
    """
    usable = usable_variants(setup)
    cold_rows = {min(v.block_m for v in usable), 64}
    pairs = [
        (cold, hot)
        for cold in (v for v in usable if v.block_m in cold_rows and v.block_n == 128)
        for hot in (v for v in usable if v.block_m > cold.block_m and v.block_m >= 64 and v.block_n >= 128)
        if fits_together((cold, hot), setup.device)
    ]
    best: dict[tuple[int, ...], tuple[TileVariant, TileVariant]] = {}
    for cold, hot in sorted(pairs, key=lambda pair: _depth(*pair), reverse=True):
        best.setdefault((-cold.block_m, -hot.block_m, hot.block_n), (cold, hot))
    return tuple(best[shape] for shape in sorted(best))


def sharing_plans(setup: Setup) -> tuple[Plan, ...]:
    """Return hot beside cold on every SM, for each pair of tiles and bound."""
    if "sm_budget" not in setup.mechanisms:
        return ()
    return tuple(
        _by_tokens(co_resident_layout(setup, (cold.name, hot.name)), tiles * cold.block_m)
        for cold, hot in tile_pairs(setup)
        for tiles in BOUND_TILES
    )


def helping_plans(setup: Setup) -> tuple[Plan, ...]:
    """Return `sharing_plans` whose slices drain each other's queues when their own are empty."""
    return tuple(replace(plan, steal=True) for plan in sharing_plans(setup))


def splitting_plans(setup: Setup) -> tuple[Plan, ...]:
    """Return hot and cold on SMs of their own, cold first, for a few splits and bounds."""
    if "green_context" not in setup.mechanisms:
        return ()
    device, tiles = setup.device, auto_tiles(setup)
    cold, hot = tiles[0], tiles[-1]
    plans: list[Plan] = []
    for cold_sms in sorted({snap_sms(share * device.sm_count, device) for share in COLD_SM_SHARES}):
        layout = split_layout(device, cold, cold_sms, hot)
        plans += [_by_tokens(layout, rows * cold.block_m) for rows in BOUND_TILES[:2]]
    return tuple(plans)


def _by_tokens(layout: SliceLayout, bound: int) -> Plan:
    return Plan(layout=layout, placement=ByTokens(bounds=(bound,), slice_ids=(0, 1)))


def snap_sms(sms: float, device: DeviceSpec) -> int:
    """Return the nearest number of SMs that a green context may own, leaving room for one more context."""
    step, least = device.sm_partition_step, device.sm_partition_min
    most = (device.sm_count - least) // step * step
    return int(min(max(round(sms / step) * step, least), most))


def exclusive_slice(
    device: DeviceSpec, tile: TileVariant, sm_count: int, mechanism: Mechanism = "green_context"
) -> Slice:
    """Return a slice that owns `sm_count` SMs, with two CTAs of its tile on each where they fit."""
    return uniform_slice(mechanism, sm_count, tile.name, _up_to_two_ctas(tile, device))


def split_layout(device: DeviceSpec, first: TileVariant, sm_count: int, rest: TileVariant) -> SliceLayout:
    """Return a slice that owns `sm_count` SMs beside one that owns all others, as far as the device splits."""
    left = (device.sm_count - sm_count) // device.sm_partition_step * device.sm_partition_step
    return SliceLayout(slices=(exclusive_slice(device, first, sm_count), exclusive_slice(device, rest, left)))


def layouts_of(plans: Sequence[Plan]) -> tuple[SliceLayout, ...]:
    """Return the layouts of the plans, each once, in order."""
    return tuple(dict.fromkeys(plan.layout for plan in plans))
