"""From a plan and true counts to segments: the waves of each slice's persistent grids, all layers of a step at once.

A grid of C CTAs takes its queue C tiles at a time, and a wave lasts as long as the slowest of its tiles' arithmetic,
its L2 traffic and its DRAM traffic. Neighbours within a wave hide each other's traffic, neighbours in different waves
do not. Waves bound by arithmetic and waves bound by memory become one segment each, since they compete differently
with what runs beside them. Weights always come from DRAM: what other layers read has flushed L2 since.

Shape letters: L MoE layers, E routed experts, S slices, P products, D widths (1 where experts are alike), N queued
experts (product, layer, slice, expert), W waves, G groups (product, layer, slice).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..traces.schema import F64, I64, Ints
from .contract import TileOrder
from .rates import Segment
from .shares import Shares

FIELDS = ("scaled_ns", "fixed_ns", "dram_ns", "pipe_ns", "l2_bytes", "flops", "dram_bytes")
"""Of a segment: time that scales with the clock, time that does not, time that its own DRAM bandwidth asks for, SM pipe
time over all its SMs, L2 bytes, FLOP as executed, and DRAM bytes."""


def queue_order(counts_LE: Ints, owner_LE: Ints, order: TileOrder) -> NDArray[np.intp]:
    """Return the experts of each layer by slice, and within a slice in the order of its queue; ties by expert."""
    key_LE = owner_LE
    if order != "expert":
        key_LE = (owner_LE.astype(np.int64) << 40) + (counts_LE if order == "light" else -counts_LE.astype(np.int64))
    return np.argsort(key_LE, axis=1, kind="stable")


class _Queue(NamedTuple):
    """Experts with tokens, in queue order, once per product; `columns_CN` as `tiles.demands` has them."""

    group_N: I64
    tiles_N: I64
    columns_CN: F64


def _queue(counts_LE: Ints, owner_LE: Ints, order: TileOrder, shares: Shares, cost_slice: int | None) -> _Queue:
    num_layers, num_experts = counts_LE.shape
    num_products, num_slices = shares.tables.rows_PS.shape
    place_LE = queue_order(counts_LE, owner_LE, order) + np.arange(num_layers)[:, None] * num_experts
    place_N = place_LE.ravel()
    n = counts_LE.ravel()[place_N]
    place_N, n = place_N[n > 0], n[n > 0].astype(np.int64)
    owner = owner_LE.ravel()[place_N].astype(np.int64)
    cost = owner if cost_slice is None else np.full_like(owner, cost_slice)
    tiles_PN, columns_CPN = shares.demands(n, cost, place_N % num_experts)
    group_PN = (np.arange(num_products)[:, None] * num_layers + place_N // num_experts) * num_slices + owner
    return _Queue(group_N=group_PN.ravel(), tiles_N=tiles_PN.ravel(), columns_CN=columns_CPN.reshape(5, -1))


def segment_sums(
    counts_LE: Ints, owner_LE: Ints, order: TileOrder, shares: Shares, cost_slice: int | None = None
) -> F64:
    """Return the sums that make each slice's segments when experts with `counts_LE` tokens run on `owner_LE`.

    With `cost_slice` all tiles, CTAs and bandwidth are priced as that slice's instead of the owner's.

    Returns:
        [L, S, P, 2, 7]: layer, slice, product, 0 for waves bound by arithmetic and 1 for memory, `FIELDS`.
    """
    num_products, num_slices = shares.tables.rows_PS.shape
    shape = (num_products, len(counts_LE), num_slices)
    queue = _queue(counts_LE, owner_LE, order, shares, cost_slice)
    out = np.zeros((2, len(FIELDS), int(np.prod(shape))))
    if len(queue.tiles_N):
        group_G, first_G, fields_7W = _waves(queue, shares, num_slices, out.shape[2], cost_slice)
        by_memory_W = fields_7W[2] > fields_7W[0] + fields_7W[1]
        out[0][:, group_G] = np.add.reduceat(fields_7W * ~by_memory_W, first_G, axis=1)
        out[1][:, group_G] = np.add.reduceat(fields_7W * by_memory_W, first_G, axis=1)
    return out.reshape(2, len(FIELDS), *shape).transpose(3, 4, 2, 0, 1)


def _waves(
    queue: _Queue, shares: Shares, num_slices: int, num_groups: int, cost_slice: int | None
) -> tuple[NDArray[np.intp], I64, F64]:
    """Return (groups with tiles, the first wave of each, `FIELDS` of each wave)."""
    total_G = np.bincount(queue.group_N, queue.tiles_N, num_groups).astype(np.int64)
    group_G = np.nonzero(total_G)[0]
    total_G = total_G[group_G]
    slice_G = group_G % num_slices if cost_slice is None else np.full(len(group_G), cost_slice)
    ctas_G = shares.ctas_S[slice_G]
    waves_G = -(-total_G // ctas_G)
    first_G = np.cumsum(waves_G) - waves_G
    of_W = np.repeat(np.arange(len(group_G)), waves_G)
    place_W = np.arange(1, len(of_W) + 1) - first_G[of_W]
    end_W = (np.cumsum(total_G) - total_G)[of_W] + np.minimum(place_W * ctas_G[of_W], total_G[of_W])
    tiles_W = end_W.copy()
    tiles_W[1:] -= end_W[:-1]
    pipe, wait, flops, l2, dram = columns = _between(queue, end_W)
    slice_W = slice_G[of_W]
    tile_W, wait_W = pipe / tiles_W, wait / tiles_W
    # CTAs on one SM take turns at its pipe; a lone one also waits for its own loads and stores.
    stacked_W = tile_W * np.maximum(1.0, tiles_W / shares.sms_S[slice_W])
    lone_W = stacked_W < tile_W + wait_W
    fields_7W = np.empty((len(FIELDS), len(of_W)))
    fixed_W = fields_7W[1] = np.where(lone_W, wait_W, 0.0)
    device_W = np.maximum(l2 / shares.l2_per_ns_S[slice_W], flops / shares.flops_per_ns)
    fields_7W[0] = np.maximum(np.where(lone_W, tile_W, stacked_W), device_W - fixed_W)
    fields_7W[2] = dram / shares.read_per_ns_SC[slice_W, tiles_W]
    fields_7W[:3] *= _blunted(fields_7W[0] + fixed_W, fields_7W[2], shares.constants.overlap)
    fields_7W[3:] = columns[[0, 3, 2, 4]]
    return group_G, first_G, fields_7W


def _blunted(a_W: F64, b_W: F64, overlap: float) -> F64:
    """Return how much longer than the longer of two limits it takes until both are met."""
    longer_W = np.maximum(a_W, b_W)
    return (1.0 + (np.minimum(a_W, b_W) / longer_W) ** (1 / overlap)) ** overlap if overlap else np.ones_like(a_W)


def _between(queue: _Queue, end_W: I64) -> F64:
    """Return the columns of the queue that fall into each wave, an expert's spread evenly over its tiles."""
    tile_N = np.cumsum(queue.tiles_N)
    at_W = np.searchsorted(tile_N, end_W)
    rest_W = (tile_N[at_W] - end_W) / queue.tiles_N[at_W]
    # By take: indexing two axes costs three times as much.
    reached = np.take(np.cumsum(queue.columns_CN, axis=1), at_W, axis=1)
    reached -= np.take(queue.columns_CN, at_W, axis=1) * rest_W
    # By hand: np.diff with a prepended column costs more than all that stands above.
    reached[:, 1:] -= reached[:, :-1].copy()
    return reached


def segments_of(sums: list[list[list[float]]], order: TileOrder, shares: Shares, clock: float) -> list[list[Segment]]:
    """Return each product's segments of one slice in one layer; `sums` [P][2][7] as `segment_sums` has them.

    `clock` is a part of the burst clock.
    """
    pipe_part = 1.0 / (clock * shares.device.sm_count)
    l2_part, flops_part = 1.0 / (clock * shares.l2_bytes_per_ns), 1.0 / (clock * shares.flops_per_ns)
    products: list[list[Segment]] = []
    for p, bounds in enumerate(sums):
        kernel: list[Segment] = []
        for scaled, fixed, dram_ns, pipe, l2, flops, dram in bounds:
            solo = max(scaled / clock + fixed, dram_ns)
            if solo > 0.0:
                per = 1.0 / solo
                kernel.append(
                    Segment(solo, pipe * pipe_part * per, l2 * l2_part * per, flops * flops_part * per, dram * per, p)
                )
        products.append(_ordered(kernel, order))
    return products


def _ordered(kernel: list[Segment], order: TileOrder) -> list[Segment]:
    if len(kernel) < 2 or order == "heavy":
        return kernel
    if order == "light":
        return kernel[::-1]
    # Both kinds of waves alternate in such a queue, and what runs beside it meets their mean.
    return [merged(kernel)]


def merged(kernel: list[Segment]) -> Segment:
    """Return one segment that does the work of several, with their mean demands."""
    # In one loop: five sums over generators cost six times as much.
    total = pipe = l2 = flops = dram = 0.0
    for one in kernel:
        solo = one.solo_ns
        total += solo
        pipe += one.pipe * solo
        l2 += one.l2 * solo
        flops += one.flops * solo
        dram += one.dram * solo
    return Segment(total, pipe / total, l2 / total, flops / total, dram / total, kernel[0].kernel)
