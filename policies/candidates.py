"""The layouts and plans that the shipped policies choose among.

The set is small on purpose: every layout is captured before step 0, and every plan is priced at each decision.
"""

from collections.abc import Sequence
from dataclasses import replace

from .contract import ByTokens, DeviceSpec, Mechanism, Plan, Setup, Slice, SliceLayout, TileVariant
from .layouts import co_resident_layout, default_variant, fits_together, max_ctas_per_sm, one_slice_plan, shared_slice

COLD_SM_SHARES = (0.25, 0.375, 0.5)
"""Shares of the SMs that exclusive splits give to the cold slice."""
BOUND_TILES = (1, 2, 4)
"""Rules by tokens call an expert cold below this many cold tiles of rows."""


def usable_variants(setup: Setup) -> tuple[TileVariant, ...]:
    """Return the tile variants of which the device holds at least one CTA per SM.

    Raises:
        ValueError: there is none.
    """
    usable = tuple(v for v in setup.variants if max_ctas_per_sm(v, setup.device))
    if not usable:
        names = ", ".join(v.name for v in setup.variants) or "no tiles"
        raise ValueError(f"{setup.device.name} holds none of {names}; give a smaller tile variant")
    return usable


def default_tile(setup: Setup) -> str:
    """Return the tile that fits the device and comes nearest to 64 by 128."""
    return default_variant(replace(setup, variants=usable_variants(setup))).name


def auto_tiles(setup: Setup) -> tuple[str, ...]:
    """Return the tiles that "auto" stands for on slices that own SMs: 64 and 128 rows by 128 columns, where they fit.

    Of each, the one that fits an SM twice if any does, and has the deepest pipeline.
    """
    best: dict[int, TileVariant] = {}
    for tile in (v for v in usable_variants(setup) if v.block_n == 128 and v.block_m in (64, 128)):
        known = best.get(tile.block_m)
        if known is None or _worth(tile, setup.device) > _worth(known, setup.device):
            best[tile.block_m] = tile
    return tuple(best[rows].name for rows in sorted(best)) or (default_tile(setup),)


def _worth(tile: TileVariant, device: DeviceSpec) -> tuple[int, tuple[int, int]]:
    return min(2, max_ctas_per_sm(tile, device)), _depth(tile)


def snap_sms(sms: float, device: DeviceSpec) -> int:
    """Return the nearest number of SMs that a green context may own, leaving room for one more context."""
    step, least = device.sm_partition_step, device.sm_partition_min
    most = (device.sm_count - least) // step * step
    return int(min(max(round(sms / step) * step, least), most))


def unsliced_plans(setup: Setup) -> tuple[Plan, ...]:
    """Return one plan for each shape of tile, once per SM and where that fits twice; the default tile comes first.

    Of tiles that differ only in warps or stages the one with the deepest pipeline is taken.
    """
    best: dict[tuple[int, int, int], TileVariant] = {}
    for tile in usable_variants(setup):
        for ctas in range(1, 1 + min(2, max_ctas_per_sm(tile, setup.device))):
            shape = (tile.block_m, tile.block_n, ctas)
            if shape not in best or _depth(tile) > _depth(best[shape]):
                best[shape] = tile
    first = setup.variant(default_tile(setup))
    shapes = sorted(best, key=lambda shape: (shape[:2] != (first.block_m, first.block_n), shape))
    slices = [shared_slice(setup, best[shape].name, best[shape].name, ctas_per_sm=shape[2]) for shape in shapes]
    return tuple(one_slice_plan(SliceLayout(slices=(one,))) for one in slices)


def tile_pairs(setup: Setup) -> tuple[tuple[TileVariant, TileVariant], ...]:
    """Return (cold, hot) tiles that share an SM: of each pair of shapes the one with the deepest pipelines.

    Cold tiles have 128 columns and as few rows as any, or 64; hot ones have more rows, and no fewer columns. The
    largest come first.
    """
    usable = usable_variants(setup)
    cold_rows = {min(v.block_m for v in usable), 64}
    best: dict[tuple[int, ...], tuple[TileVariant, TileVariant]] = {}
    for cold in (v for v in usable if v.block_m in cold_rows and v.block_n == 128):
        for hot in (v for v in usable if v.block_m > cold.block_m and v.block_m >= 64 and v.block_n >= 128):
            shape = (-cold.block_m, -hot.block_m, hot.block_n)
            known = best.get(shape)
            if fits_together((cold, hot), setup.device) and (not known or _depth(cold, hot) > _depth(*known)):
                best[shape] = (cold, hot)
    return tuple(best[shape] for shape in sorted(best))


def _depth(*tiles: TileVariant) -> tuple[int, int]:
    """Return how much of K the tiles hold in flight, then their warps: an order of tiles of one shape."""
    return sum(v.num_stages * v.block_k for v in tiles), sum(v.num_warps for v in tiles)


def sharing_plans(setup: Setup) -> tuple[Plan, ...]:
    """Return hot beside cold on every SM, for each pair of tiles and bound."""
    if "sm_budget" not in setup.mechanisms:
        return ()
    return tuple(
        by_tokens_plan(co_resident_layout(setup, (cold.name, hot.name)), tiles * cold.block_m)
        for cold, hot in tile_pairs(setup)
        for tiles in BOUND_TILES
    )


def splitting_plans(setup: Setup) -> tuple[Plan, ...]:
    """Return hot and cold on SMs of their own, for a few splits and bounds."""
    if "green_context" not in setup.mechanisms:
        return ()
    names = auto_tiles(setup)
    cold, hot = setup.variant(names[0]), setup.variant(names[-1])
    sms = setup.device.sm_count
    splits = sorted({snap_sms(share * sms, setup.device) for share in COLD_SM_SHARES})
    layouts = [hot_cold_split(setup, cold, hot, cold_sms) for cold_sms in splits]
    return tuple(by_tokens_plan(layout, tiles * cold.block_m) for layout in layouts for tiles in BOUND_TILES[:2])


def hot_cold_split(setup: Setup, cold: TileVariant, hot: TileVariant, cold_sms: int) -> SliceLayout:
    """Return two green contexts, cold first, which between them own all SMs that the partition step allows."""
    device = setup.device
    hot_sms = (device.sm_count - cold_sms) // device.sm_partition_step * device.sm_partition_step
    return SliceLayout(
        slices=(exclusive_slice(device, cold, cold_sms), exclusive_slice(device, hot, hot_sms)),
    )


def exclusive_slice(
    device: DeviceSpec, tile: TileVariant, sm_count: int, mechanism: Mechanism = "green_context"
) -> Slice:
    """Return a slice that owns `sm_count` SMs, with two CTAs of its tile on each where they fit."""
    ctas = min(2, max_ctas_per_sm(tile, device))
    return Slice(
        mechanism=mechanism,
        sm_count=sm_count,
        num_ctas=ctas * sm_count,
        ctas_per_sm=ctas,
        up=tile.name,
        down=tile.name,
    )


def by_tokens_plan(layout: SliceLayout, bound: int) -> Plan:
    """Return the plan that runs experts below `bound` tokens on slice 0 and the others on slice 1."""
    return Plan(layout=layout, placement=ByTokens(bounds=(bound,), slice_ids=(0, 1)))


def layouts_of(plans: Sequence[Plan]) -> tuple[SliceLayout, ...]:
    """Return the layouts of the plans, each once, in order."""
    return tuple(dict.fromkeys(plan.layout for plan in plans))
