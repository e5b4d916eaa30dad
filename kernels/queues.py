"""Tile queues on the device: from a step's true counts and a plan to what each slice drains.

A queue is a run of a list of row tiles, each one int32: the expert in the low 12 bits, above it the place in the list
of that expert's first row tile. Column tiles are not listed: a slice whose products have `n_tiles` of them drains
tiles 0 .. n_tiles * row tiles - 1, and tile i belongs to the expert of the row tile at i // n_tiles. Within an expert
all row tiles of one column tile come before the next column, so that its weights are read from memory once.

Shape letters: E experts, S slices, Q lists of row tiles (up, down), C row tiles of a chunk.
"""

import triton
import triton.language as tl

from .spec import BLOCK_M_AT, BOUNDS_AT, NUM_BOUNDS_AT, ORDER_AT, PINNED_AT, SLICE_IDS_AT, SLICES

EXPERT_BITS = tl.constexpr(12)
EXPERT_MASK = tl.constexpr(4095)
MAX_TILES = 1 << 19
"""Row tiles of a list: what an int32 entry can hold beside the expert."""
NUM_COUNTERS = 4
"""Ticket counters a slice has: one for each product, and one to spare."""
COUNTERS = tl.constexpr(NUM_COUNTERS)


def tile_capacity(num_rows: int, num_experts: int, block_m: int) -> int:
    """Return how many row tiles any routing of `num_rows` rows can need."""
    return num_rows // block_m + min(num_experts, num_rows)


@triton.jit
def slice_of_experts(counts_E, e_E, num_experts, plan_ptr):
    """Return the slice of each expert: pinned by the plan, or found from its tokens."""
    num_bounds = tl.load(plan_ptr + NUM_BOUNDS_AT)
    slices_E = tl.load(plan_ptr + PINNED_AT + e_E, mask=(e_E < num_experts) & (num_bounds < 0), other=0)
    if num_bounds >= 0:
        place_E = tl.zeros_like(counts_E)
        for j in range(num_bounds):
            place_E += (counts_E >= tl.load(plan_ptr + BOUNDS_AT + j)).to(tl.int32)
        slices_E = tl.load(plan_ptr + SLICE_IDS_AT + place_E)
    return slices_E


@triton.jit
def build_queues(
    counts_E,
    e_E,
    num_experts,
    plan_ptr,
    tiles_ptr,
    begins_ptr,
    tickets_ptr,
    ready_ptr,
    capacity,
    part,
    num_parts,
    NUM_LISTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the lists of row tiles [Q, capacity] and where each slice's run begins [Q, S + 1]; clear the counters.

    Part `part` of `num_parts` writes every num_parts-th chunk; each part works out the whole order for itself.
    """
    slices_E = slice_of_experts(counts_E, e_E, num_experts, plan_ptr)
    order = tl.load(plan_ptr + ORDER_AT)
    by_load_E = tl.where(order == 0, 0, tl.where(order == 1, 0x7FFFFFFF - counts_E, counts_E))
    # One number orders experts: slice (6 bits), load (31), expert (12).
    key_E = (slices_E.to(tl.int64) << 43) | (by_load_E.to(tl.int64) << 12) | e_E.to(tl.int64)
    s_S = tl.arange(0, 2 * SLICES)
    if part == 0:
        tl.store(tickets_ptr + tl.arange(0, COUNTERS * SLICES), tl.zeros([COUNTERS * SLICES], tl.int32))
    for q in tl.static_range(NUM_LISTS):
        block_m_E = tl.load(plan_ptr + BLOCK_M_AT + q * SLICES + slices_E)
        num_E = tl.cdiv(counts_E, block_m_E)
        first_E = tl.sum(tl.where(key_E[None, :] < key_E[:, None], num_E[None, :], 0), axis=1)
        if part == 0:
            begin_S = tl.sum(tl.where(slices_E[None, :] < s_S[:, None], num_E[None, :], 0), axis=1)
            tl.store(begins_ptr + q * (SLICES + 1) + s_S, begin_S, mask=s_S <= SLICES)
        entry_E = tl.where(num_E > 0, (first_E << EXPERT_BITS) | e_E, -1)
        total = tl.sum(num_E)
        for start in range(part * BLOCK_C, total, num_parts * BLOCK_C):
            tile_C = start + tl.arange(0, BLOCK_C)
            # Entries grow with the first tile, so the owner of a tile is the largest entry that starts at or before it.
            owner_C = tl.max(tl.where(first_E[None, :] <= tile_C[:, None], entry_E[None, :], -1), axis=1)
            tl.store(tiles_ptr + q * capacity + tile_C, owner_C, mask=tile_C < total)
            if q == 0:
                for stage in tl.static_range(2):
                    zero_C = tl.zeros([BLOCK_C], tl.int32)
                    tl.store(ready_ptr + stage * capacity + tile_C, zero_C, mask=tile_C < total)


@triton.jit
def locate_tile(i, begin, tiles_ptr, offsets_ptr, n_tiles, block_m):
    """Return (expert, first row, end of the expert's rows, column tile) of tile i of the queue that starts at begin."""
    entry = tl.load(tiles_ptr + begin + i // n_tiles)
    expert = entry & EXPERT_MASK
    row_start = tl.load(offsets_ptr + expert)
    row_end = tl.load(offsets_ptr + expert + 1)
    num_m = tl.cdiv(row_end - row_start, block_m)
    local = i - ((entry >> EXPERT_BITS) - begin) * n_tiles
    return expert, row_start + local % num_m * block_m, row_end, local // num_m
