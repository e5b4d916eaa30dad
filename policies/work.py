"""From a plan and true counts to segments: the waves of each slice's persistent grids, all layers of a step at once.

A grid of C CTAs takes its queue C tiles at a time, and a wave lasts as long as the slowest of its tiles' arithmetic,
its L2 traffic and its DRAM traffic. Neighbours within a wave hide each other's traffic, neighbours in different waves
do not. Waves bound by arithmetic and waves bound by memory become one segment each, since they compete differently
with what runs beside them.

Shape letters: L MoE layers, E routed experts, S slices, P products, N queued experts (product, layer, slice, expert),
W waves, G groups (product, layer, slice).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..traces.schema import DTYPE_BYTES, MoeSpec, Product
from .contract import TileOrder
from .fluid import Segment
from .shares import Shares
from .tiles import Residual, TileCost, tile_cost

FIELDS = ("scaled_ns", "fixed_ns", "dram_ns", "pipe_ns", "l2_bytes", "dram_bytes", "flops")
"""Of a segment: time that scales with the clock, time that does not, time that its own DRAM bandwidth asks for, SM pipe
time over all its SMs, bytes, and FLOP as executed."""


@dataclass(frozen=True)
class Tables:
    """What every tile of a layout and model costs; D is 1 where experts are alike, else the number of experts."""

    rows_PS: NDArray[np.int64]
    columns_PSD: NDArray[np.int64]
    """Tiles across the columns."""
    pipe_ns_PSD: NDArray[np.float64]
    wait_ns_PSD: NDArray[np.float64]
    flops_PSD: NDArray[np.float64]
    weight_bytes_PD: NDArray[np.float64]
    row_bytes_PD: NDArray[np.float64]
    """Of one row, in and out."""
    in_bytes_PD: NDArray[np.float64]


def tables_of(model: MoeSpec, shares: Shares, residual: Residual | None) -> Tables:
    """Return the tables of a model under a layout."""
    experts = [model.products(width) for width in model.d_ff]
    num_products, size = len(experts[0]), DTYPE_BYTES[model.dtype]
    costs = [
        [[_cost(products[p], p == num_products - 1, shares, s, model.dtype, residual) for products in experts]
         for s in range(len(shares.slices))]
        for p in range(num_products)
    ]  # fmt: skip

    def per_product(value: "Sequence[Sequence[float]]") -> NDArray[np.float64]:
        return np.array(value, dtype=np.float64)

    by_p = [[products[p] for products in experts] for p in range(num_products)]
    return Tables(
        rows_PS=np.array([[c[0].block_m for c in of_s] for of_s in costs], dtype=np.int64),
        columns_PSD=np.array([[[d.column_tiles for d in c] for c in of_s] for of_s in costs], dtype=np.int64),
        pipe_ns_PSD=np.array([[[d.pipe_ns for d in c] for c in of_s] for of_s in costs]),
        wait_ns_PSD=np.array([[[d.wait_ns for d in c] for c in of_s] for of_s in costs]),
        flops_PSD=np.array([[[d.flops for d in c] for c in of_s] for of_s in costs]),
        weight_bytes_PD=per_product([[size * d.k_dim * d.n_dim for d in of_p] for of_p in by_p]),
        row_bytes_PD=per_product([[size * (d.k_dim + d.out_dim) for d in of_p] for of_p in by_p]),
        in_bytes_PD=per_product([[size * d.k_dim for d in of_p] for of_p in by_p]),
    )


def _cost(product: Product, is_last: bool, shares: Shares, s: int, dtype: str, residual: Residual | None) -> TileCost:
    variant = shares.slices[s].tiles[int(is_last)]
    return tile_cost(variant, product, shares.device, shares.constants, dtype, residual)


def queue_order(counts_LE: NDArray[np.integer], owner_LE: NDArray[np.integer], order: TileOrder) -> NDArray[np.intp]:
    """Return the experts of each layer by slice, and within a slice in the order of its queue; ties by expert."""
    key_LE = owner_LE.astype(np.int64) << 40
    if order != "expert":
        key_LE = key_LE + (counts_LE if order == "light" else -counts_LE.astype(np.int64))
    return np.argsort(key_LE, axis=1, kind="stable")


@dataclass(frozen=True)
class _Queue:
    """Experts with tokens, in queue order, once per product."""

    group_N: NDArray[np.int64]
    tiles_N: NDArray[np.int64]
    columns_CN: NDArray[np.float64]
    """Pipe ns, wait ns, L2 bytes, DRAM bytes, FLOP."""


def _queue(
    counts_LE: NDArray[np.integer],
    owner_LE: NDArray[np.integer],
    order: TileOrder,
    tables: Tables,
    cost_slice: int | None,
) -> _Queue:
    num_products, num_slices = tables.rows_PS.shape
    expert_LE = queue_order(counts_LE, owner_LE, order)
    queued_LE = np.take_along_axis(counts_LE, expert_LE, 1)
    layers, places = np.nonzero(queued_LE)
    n = queued_LE[layers, places].astype(np.int64)
    expert = expert_LE[layers, places]
    owner = owner_LE[layers, expert].astype(np.int64)
    kind = expert if tables.pipe_ns_PSD.shape[2] > 1 else 0
    cost = owner if cost_slice is None else np.full_like(owner, cost_slice)
    row_tiles_PN = -(-n // tables.rows_PS[:, cost])
    column_tiles_PN = tables.columns_PSD[:, cost, kind]
    tiles = row_tiles_PN * column_tiles_PN
    weights = tables.weight_bytes_PD[:, kind] if np.ndim(kind) else tables.weight_bytes_PD
    rows = tables.row_bytes_PD[:, kind] if np.ndim(kind) else tables.row_bytes_PD
    in_rows = tables.in_bytes_PD[:, kind] if np.ndim(kind) else tables.in_bytes_PD
    columns = np.stack(
        [
            tiles * tables.pipe_ns_PSD[:, cost, kind],
            tiles * tables.wait_ns_PSD[:, cost, kind],
            # Every column tile reads the rows again, every row tile the weights.
            column_tiles_PN * n * in_rows + row_tiles_PN * weights,
            weights + n * rows,
            tiles * tables.flops_PSD[:, cost, kind],
        ]
    )
    group = (np.arange(num_products)[:, None] * len(counts_LE) + layers) * num_slices + owner
    return _Queue(group_N=group.ravel(), tiles_N=tiles.ravel(), columns_CN=columns.reshape(5, -1))


def segment_sums(
    counts_LE: NDArray[np.integer],
    owner_LE: NDArray[np.integer],
    order: TileOrder,
    shares: Shares,
    tables: Tables,
    cost_slice: int | None = None,
) -> NDArray[np.float64]:
    """Return the sums that make each slice's segments.

    Args:
        counts_LE: true tokens of each expert.
        owner_LE: the slice of each expert.
        order: of the queue within a slice.
        shares: the layout.
        tables: costs of tiles.
        cost_slice: price all tiles, CTAs and bandwidth as this slice's instead of the owner's.

    Returns:
        [L, S, P, 2, 7]: layer, slice, product, 0 for waves bound by arithmetic and 1 for memory, `FIELDS`.
    """
    num_products, num_slices = tables.rows_PS.shape
    shape = (num_products, len(counts_LE), num_slices, 2)
    queue = _queue(counts_LE, owner_LE, order, tables, cost_slice)
    out = np.zeros((len(FIELDS), *shape))
    if len(queue.tiles_N):
        group_W, sums = _waves(queue, shares, num_slices, int(np.prod(shape[:3])), cost_slice)
        bound_W = group_W * 2 + (sums[2] > sums[0] + sums[1])
        size = out[0].size
        for i, column in enumerate(sums):
            out[i] = np.bincount(bound_W, column, size).reshape(shape)
    return out.transpose(2, 3, 1, 4, 0)


def _waves(
    queue: _Queue, shares: Shares, num_slices: int, num_groups: int, cost_slice: int | None
) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    """Return (group of each wave, its `FIELDS`)."""
    total_G = np.bincount(queue.group_N, queue.tiles_N, num_groups).astype(np.int64)
    group_G = np.nonzero(total_G)[0]
    total_G = total_G[group_G]
    slice_G = group_G % num_slices if cost_slice is None else np.full(len(group_G), cost_slice)
    ctas_G = np.array([share.ctas for share in shares.slices])[slice_G]
    waves_G = -(-total_G // ctas_G)
    first_G = np.cumsum(waves_G) - waves_G
    start_G = np.cumsum(total_G) - total_G
    of_W = np.repeat(np.arange(len(group_G)), waves_G)
    place_W = np.arange(len(of_W)) - first_G[of_W]
    end_W = start_G[of_W] + np.minimum((place_W + 1) * ctas_G[of_W], total_G[of_W])
    tiles_W = np.diff(end_W, prepend=0)
    pipe, wait, l2, dram, flops = _between(queue, end_W)
    slice_W = slice_G[of_W]
    sms_W = np.array([share.sms for share in shares.slices])[slice_W]
    tile_W, wait_W = pipe / tiles_W, wait / tiles_W
    # CTAs on one SM take turns at its pipe; a lone one also waits for its own loads and stores.
    stacked_W = tile_W * np.maximum(1.0, tiles_W / sms_W)
    lone = stacked_W < tile_W + wait_W
    l2_part_S = np.array([share.memory_part for share in shares.slices])
    l2_W = l2 / (shares.l2_bytes_per_ns * l2_part_S[slice_W])
    scaled_W, fixed_W = np.where(lone, tile_W, stacked_W), np.where(lone, wait_W, 0.0)
    scaled_W = np.maximum(scaled_W, np.maximum(l2_W, flops / shares.flops_per_ns) - fixed_W)
    dram_W = dram / shares.read_per_ns[slice_W, tiles_W]
    return group_G[of_W], [scaled_W, fixed_W, dram_W, pipe, l2, dram, flops]


def _between(queue: _Queue, end_W: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the columns of the queue that fall into each wave, an expert's spread evenly over its tiles."""
    tile_N = np.cumsum(queue.tiles_N)
    column_CN = np.cumsum(queue.columns_CN, axis=1)
    at_W = np.searchsorted(tile_N, end_W)
    rest_W = (tile_N[at_W] - end_W) / queue.tiles_N[at_W]
    reached = column_CN[:, at_W] - queue.columns_CN[:, at_W] * rest_W
    return np.diff(reached, axis=1, prepend=0.0)


def segments_of(sums: list[list[list[float]]], order: TileOrder, shares: Shares, clock: float) -> list[list[Segment]]:
    """Return each product's segments of one slice in one layer at a clock, a part of the burst clock.

    Args:
        sums: [P][2][7], as `segment_sums` orders them.
        order: of the slice's queue.
        shares: the layout.
        clock: 1 for a burst.
    """
    pipe_part = 1.0 / (clock * shares.device.sm_count)
    l2_part, flops_part = 1.0 / (clock * shares.l2_bytes_per_ns), 1.0 / (clock * shares.flops_per_ns)
    products: list[list[Segment]] = []
    for p, bounds in enumerate(sums):
        kernel: list[Segment] = []
        for scaled, fixed, dram_ns, pipe, l2, dram, flops in bounds:
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
    total = sum(s.solo_ns for s in kernel)
    pipe, l2, flops, dram = (sum(s[field] * s.solo_ns for s in kernel) / total for field in range(1, 5))
    return Segment(total, pipe, l2, flops, dram, kernel[0].kernel)
