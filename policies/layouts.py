"""Occupancy and the common layouts, so that policies and backends count CTAs the same way.

Shape letters: S slices.
"""

from collections.abc import Sequence

from .contract import ByTokens, DeviceSpec, Mechanism, Plan, Setup, Slice, SliceLayout, TileVariant

SMEM_RESERVED_BYTES = 1024
"""The driver keeps this of every CTA's shared memory (CUDA programming guide, compute capability 8.0 and later)."""


def smem_held_bytes(variants: Sequence[TileVariant]) -> int:
    """Return the shared memory that one CTA of each variant holds on an SM."""
    return sum(v.smem_bytes + SMEM_RESERVED_BYTES for v in variants)


def fits_together(variants: Sequence[TileVariant], device: DeviceSpec) -> bool:
    """Return whether one CTA of each variant (repeats allowed) fits on one SM."""
    return (
        smem_held_bytes(variants) <= device.smem_per_sm_bytes + SMEM_RESERVED_BYTES
        and sum(v.regs_per_cta for v in variants) <= device.regs_per_sm
        and sum(v.num_warps * 32 for v in variants) <= device.threads_per_sm
    )


def max_ctas_per_sm(variant: TileVariant, device: DeviceSpec) -> int:
    """Return how many CTAs of a variant one SM holds; 0 when not even one fits."""
    ctas = 0
    while fits_together([variant] * (ctas + 1), device):
        ctas += 1
    return ctas


def uniform_slice(
    mechanism: Mechanism, sm_count: int, tile: str, ctas_per_sm: int = 1, *, instance: int | None = None
) -> Slice:
    """Return a slice that fills its SMs with `ctas_per_sm` CTAs each, of one tile variant for every product."""
    return Slice(
        mechanism=mechanism,
        sm_count=sm_count,
        num_ctas=sm_count * ctas_per_sm,
        ctas_per_sm=ctas_per_sm,
        up=tile,
        down=tile,
        instance=instance,
    )


def shared_slice(setup: Setup, up: str, down: str, *, ctas_per_sm: int = 1) -> Slice:
    """Return a slice over all SMs of the device, which it does not own."""
    sms = setup.device.sm_count
    return Slice(
        mechanism="shared", sm_count=sms, num_ctas=sms * ctas_per_sm, ctas_per_sm=ctas_per_sm, up=up, down=down
    )


def unsliced_layout(setup: Setup, up: str, down: str | None = None) -> SliceLayout:
    """Return the layout of one shared slice over all SMs."""
    return SliceLayout(slices=(shared_slice(setup, up, down or up),))


def one_slice_plan(layout: SliceLayout) -> Plan:
    """Return the plan that sends every expert to slice 0."""
    return Plan(layout=layout, placement=ByTokens(bounds=(), slice_ids=(0,)))


def default_variant(setup: Setup) -> TileVariant:
    """Return the tile of the unsliced fallback: 64 rows by 128 columns where there is one, else the middle one."""
    ranked = sorted(setup.variants, key=lambda v: (abs(v.block_m - 64), abs(v.block_n - 128), v.name))
    if not ranked:
        raise ValueError("setup.variants is empty; give at least one tile variant")
    return ranked[0]


def fallback_plan(setup: Setup) -> Plan:
    """Return the plan every backend can fall back to: unsliced, default tile."""
    return one_slice_plan(unsliced_layout(setup, default_variant(setup).name))


def split_layout(
    setup: Setup, sm_counts: Sequence[int], tiles: Sequence[str], mechanism: Mechanism = "green_context"
) -> SliceLayout:
    """Return slices that own `sm_counts` SMs each, slice s with tile variant tiles[s] for every product."""
    slices = [
        Slice(mechanism=mechanism, sm_count=sms, num_ctas=sms, ctas_per_sm=1, up=tile, down=tile)
        for sms, tile in zip(sm_counts, tiles, strict=True)
    ]
    return SliceLayout(slices=tuple(slices))


def co_resident_layout(setup: Setup, tiles: Sequence[str]) -> SliceLayout:
    """Return bounded grids that share every SM, one CTA of each tile variant per SM."""
    sms = setup.device.sm_count
    slices = [
        Slice(mechanism="sm_budget", sm_count=sms, num_ctas=sms, ctas_per_sm=1, up=tile, down=tile) for tile in tiles
    ]
    return SliceLayout(slices=tuple(slices))
