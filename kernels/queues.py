"""Tile queues on the device: from a step's true counts and a plan to what each slice drains.

A queue is a run of a list of row tiles, each one int32: the expert in the low 12 bits, above it the place in the list
of that expert's first row tile. Column tiles are not listed: a slice whose products have `n_tiles` of them drains
tiles 0 .. n_tiles * row tiles - 1, and tile i belongs to the expert of the row tile at i // n_tiles. Within an expert
all row tiles of one column tile come before the next column, so that its weights are read from memory once.

Shape letters: E experts, S slices, Q lists of row tiles (up, down).
"""

import triton
import triton.language as tl

from .spec import BLOCK_M_AT, BOUNDS_AT, NUM_BOUNDS_AT, ORDER_AT, PINNED_AT, SLICE_IDS_AT, SLICES

EXPERT_BITS = tl.constexpr(12)
EXPERT_MASK = tl.constexpr((1 << 12) - 1)
LOAD_MASK = tl.constexpr((1 << 21) - 1)
MAX_TILES = 1 << 19
"""Row tiles of a list: what an int32 entry can hold beside the expert."""
NUM_COUNTERS = 4
"""Ticket counters a slice has: one for each product, and one to spare."""
COUNTERS = tl.constexpr(NUM_COUNTERS)


def tile_capacity(num_rows: int, num_experts: int, block_m: int) -> int:
    """Return how many row tiles any routing of `num_rows` rows can need."""
    return num_rows // block_m + min(num_experts, num_rows)


@triton.jit
def load_plan(plan_ptr, sizes_ptr, e_E, NUM_EXPERTS: tl.constexpr):
    """Return a plan: tile order, number of bounds, bounds [S], slice ids [S], pinned slices [E], block_m [S] of lists.

    Loaded before a kernel chooses experts, they cost nothing.
    """
    s_S = tl.arange(0, SLICES)
    bounds_S = tl.load(plan_ptr + BOUNDS_AT + s_S)
    slice_ids_S = tl.load(plan_ptr + SLICE_IDS_AT + s_S)
    pinned_E = tl.load(plan_ptr + PINNED_AT + e_E, mask=e_E < NUM_EXPERTS, other=0)
    up_m_S = tl.load(sizes_ptr + BLOCK_M_AT + s_S)
    down_m_S = tl.load(sizes_ptr + BLOCK_M_AT + SLICES + s_S)
    return (
        tl.load(plan_ptr + ORDER_AT), tl.load(plan_ptr + NUM_BOUNDS_AT), bounds_S, slice_ids_S, pinned_E, up_m_S,
        down_m_S,
    )  # fmt: skip


@triton.jit
def slice_of_experts(counts_E, num_bounds, bounds_S, slice_ids_S, pinned_E, num_slices):
    """Return the slice of each expert: pinned by the plan, or found from its tokens; the last one if it is too high."""
    slices_E = tl.zeros_like(counts_E)
    if num_slices > 1:
        slices_E = pinned_E
        if num_bounds >= 0:
            reached = (counts_E[:, None] >= bounds_S[None, :]) & (tl.arange(0, SLICES) < num_bounds)[None, :]
            slices_E = tl.gather(slice_ids_S, tl.sum(reached.to(tl.int32), axis=1), 0)
    return tl.minimum(slices_E, num_slices - 1)


@triton.jit
def order_experts(counts_E, slices_E, e_E, order):
    """Return counts, slices and ids of the experts, sorted by slice, then load, then id unless `order` is 0."""
    if order > 0:
        load_E = tl.where(order == 1, LOAD_MASK - counts_E, counts_E)
        # One number holds all three: slice above load (21 bits) above id (12 bits).
        key_E = (slices_E.to(tl.int64) << 33) | (load_E.to(tl.int64) << EXPERT_BITS) | e_E.to(tl.int64)
        key_E = tl.sort(key_E)
        e_E = (key_E & EXPERT_MASK).to(tl.int32)
        load_E = ((key_E >> EXPERT_BITS) & LOAD_MASK).to(tl.int32)
        counts_E = tl.where(order == 1, LOAD_MASK - load_E, load_E)
        slices_E = (key_E >> 33).to(tl.int32)
    return counts_E, slices_E, e_E


@triton.jit
def build_queues(
    counts_E, e_E, plan, num_slices, tiles_ptr, begins_ptr, tickets_ptr, ready_ptr, capacity, part, num_parts,
    NUM_LISTS: tl.constexpr, ONE_PASS: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Write the lists of row tiles [Q, capacity] and where each slice's run begins [Q, S + 1]; clear the counters.

    Part `part` of `num_parts` writes its share of the entries; each part works out the whole order for itself.
    """
    order, num_bounds, bounds_S, slice_ids_S, pinned_E, up_m_S, down_m_S = plan
    slices_E = slice_of_experts(counts_E, num_bounds, bounds_S, slice_ids_S, pinned_E, num_slices)
    counts_E, slices_E, e_E = order_experts(counts_E, slices_E, e_E, order)
    if part == 0:
        tl.store(tickets_ptr + tl.arange(0, COUNTERS * SLICES), tl.zeros([COUNTERS * SLICES], tl.int32))
    for q in tl.static_range(NUM_LISTS):
        num_E = tl.cdiv(counts_E, tl.gather(up_m_S if q == 0 else down_m_S, slices_E, 0))
        first_E = tl.zeros_like(num_E)
        begin = 0
        for s in range(num_slices):
            ours_E = tl.where(slices_E == s, num_E, 0)
            first_E = tl.where(slices_E == s, begin + tl.cumsum(ours_E, axis=0) - ours_E, first_E)
            begin += tl.sum(ours_E)
            if part == 0:
                tl.store(begins_ptr + q * (SLICES + 1) + s + 1, begin)
        if part == 0:
            tl.store(begins_ptr + q * (SLICES + 1), 0)
        if ONE_PASS:
            write_tiles(num_E, first_E, e_E, q, 0, tiles_ptr, ready_ptr, capacity, BJ)
        else:
            for start in range(part * BJ, tl.max(num_E), num_parts * BJ):
                write_tiles(num_E, first_E, e_E, q, start, tiles_ptr, ready_ptr, capacity, BJ)


@triton.jit
def write_tiles(num_E, first_E, e_E, q: tl.constexpr, start, tiles_ptr, ready_ptr, capacity, BJ: tl.constexpr):
    """Write row tiles `start` to `start + BJ` of every expert to a list, and that nothing of them is ready."""
    j_JE = start + tl.arange(0, BJ)[:, None] + 0 * e_E[None, :]
    ours = j_JE < num_E[None, :]
    place = q * capacity + first_E[None, :] + j_JE
    tl.store(tiles_ptr + place, (first_E[None, :] << EXPERT_BITS) | (e_E[None, :] + 0 * j_JE), mask=ours)
    if q == 0:
        tl.store(ready_ptr + place, 0 * j_JE, mask=ours)
        tl.store(ready_ptr + capacity + place, 0 * j_JE, mask=ours)


@triton.jit
def locate_tile(i, begin, tiles_ptr, offsets_ptr, n_tiles, block_m):
    """Return what tile i of the queue that starts at `begin` is.

    That is its expert, its first row, the end of the expert's rows, its column tile, its row tile's place in the list.
    """
    entry = tl.load(tiles_ptr + begin + i // n_tiles)
    expert = entry & EXPERT_MASK
    row_start = tl.load(offsets_ptr + expert)
    row_end = tl.load(offsets_ptr + expert + 1)
    num_m = tl.cdiv(row_end - row_start, block_m)
    first = entry >> EXPERT_BITS
    local = i - (first - begin) * n_tiles
    m = local % num_m
    return expert, row_start + m * block_m, row_end, local // num_m, first + m
