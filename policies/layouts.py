"""Occupancy and the common layouts, so that policies and backends count CTAs the same way.

Shape letters: S slices.
"""

from collections.abc import Sequence

from .contract import ByTokens, DeviceSpec, Mechanism, Plan, Setup, Slice, SliceLayout, TileVariant

SMEM_RESERVED_BYTES = 1024
"""The driver keeps this of every CTA's shared memory (CUDA programming guide, compute capability 8.0 and later)."""


def fits_together(variants: Sequence[TileVariant], device: DeviceSpec) -> bool:
    """Return whether one CTA of each variant (repeats allowed) fits on one SM."""
    return (
        sum(v.smem_bytes + SMEM_RESERVED_BYTES for v in variants) <= device.smem_per_sm_bytes + SMEM_RESERVED_BYTES
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


def unsliced_layout(setup: Setup, tile: str, ctas_per_sm: int = 1) -> SliceLayout:
    """Return the layout of one shared slice over all SMs."""
    return SliceLayout(slices=(uniform_slice("shared", setup.device.sm_count, tile, ctas_per_sm),))


def one_slice_plan(layout: SliceLayout) -> Plan:
    """Return the plan that sends every expert to slice 0."""
    return Plan(layout=layout, placement=ByTokens(bounds=(), slice_ids=(0,)))


def default_variant(variants: Sequence[TileVariant]) -> TileVariant:
    """Return the tile of the unsliced fallback: 64 rows by 128 columns where there is one, else the nearest to it."""
    if not variants:
        raise ValueError("setup.variants is empty; give at least one tile variant")
    return min(variants, key=lambda v: (abs(v.block_m - 64), abs(v.block_n - 128), v.name))


def fallback_plan(setup: Setup) -> Plan:
    """Return the plan every backend can fall back to: unsliced, default tile."""
    return one_slice_plan(unsliced_layout(setup, default_variant(setup.variants).name))


def co_resident_layout(setup: Setup, tiles: Sequence[str]) -> SliceLayout:
    """Return bounded grids that share every SM, one CTA of each tile variant per SM."""
    return SliceLayout(slices=tuple(uniform_slice("sm_budget", setup.device.sm_count, tile) for tile in tiles))


def switch_ns(old: SliceLayout, new: SliceLayout, device: DeviceSpec) -> int:
    """Return what the device takes to run the graph of another captured layout next; nothing for the same."""
    if old == new:
        return 0
    contexts = any(one.mechanism == "green_context" for one in new.slices)
    relayout_ns = device.mig_relayout_ns if old.mig != new.mig else 0
    return device.layout_switch_ns + contexts * device.green_context_switch_ns + relayout_ns
