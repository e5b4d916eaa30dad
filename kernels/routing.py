"""Routing on the device: logits to experts, weights, counts, a stable order of rows, and tile queues.

A batch of up to 64 tokens takes one launch, whose last CTA to arrive counts and places what all of them chose; larger
ones take two launches. Nothing is read back, and what CTAs add up commutes, so that order and bits depend on the logits
and the plan alone. `reference.route`, `dispatch` and `queues` define the result.

Shape letters: T tokens of a block, E experts, K top-k, N routed rows, B blocks of tokens.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..traces.schema import next_power_of_two
from .choice import choose, weigh
from .queues import build_queues, load_plan
from .spec import INTERPRET, SMALLEST_BLOCK_M, LayerLaunch, RouterSpec

if TYPE_CHECKING:
    from .workspace import Workspace

MASK_TOKENS = 64
"""Tokens whose experts one int64 a expert can name: the most of a block, and of a batch that takes one launch."""
WARP_SCORES = 128
"""Scores that a warp holds at once: four a lane, so that rows load in 16 bytes and no row spans two warps."""
SMALL_WARPS = 2
LARGE_WARPS = 8
PLACE_WARPS = 8
MIN_BLOCK_TOKENS = 16
"""Of a batch that takes two launches."""
WAVE_BLOCKS = 128
"""Blocks that a large batch is cut into if it can be: about one for each SM."""
COUNTS_AT_ONCE = 8192
QUEUE_PARTS = 4
ENTRIES = 1024
"""Entries of a queue that one CTA writes at once."""


@triton.jit
def popcount(x):
    """Return how many bits of int64 are set."""
    if INTERPRET:
        x = x.to(tl.uint64)
        x = x - ((x >> 1) & 0x5555555555555555)
        x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
        x += x >> 8
        x += x >> 16
        return ((x + (x >> 32)) & 0x7F).to(tl.int32)
    return libdevice.popc(x)


@triton.jit
def members_of(chosen, t_T, BT: tl.constexpr, BE: tl.constexpr, ROWS_AT_ONCE: tl.constexpr):
    """Return each expert's tokens of a block [E], a bit each in int64; rows are in the order of `choose`."""
    # A warp's tokens lie in one 32-bit word: warps meet in shared memory, where 64 bits take twice as long.
    WORDS: tl.constexpr = 2 if BT > 32 else 1
    bit_T = tl.full([BT], 1, tl.int32) << (t_T % 32)
    bits = tl.where(chosen, bit_T[:, None], 0)
    warps = tl.sum(tl.reshape(bits, [BT // ROWS_AT_ONCE, ROWS_AT_ONCE, BE]), axis=0)
    words = tl.sum(tl.reshape(warps, [WORDS, ROWS_AT_ONCE // WORDS, BE]), axis=1).to(tl.uint32, bitcast=True)
    return tl.sum(words.to(tl.int64) << (32 * tl.arange(0, WORDS).to(tl.int64))[:, None], axis=0)


@triton.jit
def load_ids(ids_ptr, first_token, tokens_stop, TOP_K: tl.constexpr, BN: tl.constexpr):
    """Return the expert of each routed row of a block's tokens, -1 for none: loaded before what they wait for."""
    place_N = first_token * TOP_K + tl.arange(0, BN)
    return tl.load(ids_ptr + place_N, mask=(place_N >= 0) & (place_N < tokens_stop * TOP_K), other=-1)


@triton.jit
def place_rows(expert_N, row_slot_ptr, members_E, starts_E, first_token, TOP_K: tl.constexpr, BN: tl.constexpr):
    """Store the place t * K + slot of each routed row of a block's tokens, expert by expert, tokens in order."""
    n_N = tl.arange(0, BN)
    place_N = first_token * TOP_K + n_N
    at_N = tl.maximum(expert_N, 0)
    below_N = (tl.full([BN], 1, tl.int64) << (n_N // TOP_K).to(tl.int64)) - 1
    rank_N = popcount(tl.gather(members_E, at_N, 0) & below_N)
    tl.store(row_slot_ptr + tl.gather(starts_E, at_N, 0) + rank_N, place_N, mask=expert_N >= 0)


@triton.jit
def store_counts(counts_E, ends_E, e_E, counts_ptr, offsets_ptr, NUM_EXPERTS: tl.constexpr):
    """Store tokens per expert [E] and where each expert's rows start [E + 1]."""
    tl.store(counts_ptr + e_E, counts_E, mask=e_E < NUM_EXPERTS)
    tl.store(offsets_ptr + 1 + e_E, ends_E, mask=e_E < NUM_EXPERTS)
    tl.store(offsets_ptr, 0)


@triton.jit
def live_tokens(num_tokens_ptr, num_rows, PADDED: tl.constexpr):
    """Return how many of the rows are tokens; the rest is padding."""
    if PADDED:
        return tl.minimum(tl.load(num_tokens_ptr), num_rows)
    return num_rows


@triton.jit
def arrive_last(arrivals_ptr):
    """Return whether every other CTA of the launch arrived before, and their stores can be read; clear the counter."""
    # All warps have stored before one thread says so.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(arrivals_ptr, 0)
    return last


@triton.jit(do_not_specialize=["num_rows", "num_slices", "capacity"])
def route_kernel(
    logits_ptr, bias_ptr, num_tokens_ptr, plan_ptr, sizes_ptr, ids_ptr, weights_ptr, tops_ptr, totals_ptr, counts_ptr,
    offsets_ptr, row_slot_ptr, tiles_ptr, begins_ptr, tickets_ptr, ready_ptr, members_ptr, block_counts_ptr,
    arrivals_ptr, num_rows, num_slices, capacity, block_pitch,
    PADDED: tl.constexpr, DEPENDENT: tl.constexpr, CHAINED: tl.constexpr, PLACES: tl.constexpr, ALONE: tl.constexpr,
    NUM_LISTS: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, ROWS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Route one block of tokens; the last CTA of a small batch goes on to place rows and write queues."""
    if CHAINED or DEPENDENT:
        gdc_launch_dependents()
    if DEPENDENT:
        gdc_wait()
    block = tl.program_id(0)
    num_tokens = live_tokens(num_tokens_ptr, num_rows, PADDED)
    e_E, row_T = tl.arange(0, BE), tl.arange(0, BT)
    # A warp's rows are neighbours among the tokens.
    t_T = row_T % ROWS_AT_ONCE * (BT // ROWS_AT_ONCE) + row_T // ROWS_AT_ONCE
    if PLACES:
        plan = load_plan(plan_ptr, sizes_ptr, e_E, NUM_EXPERTS)
    chosen = choose(
        logits_ptr, bias_ptr, ids_ptr, weights_ptr, tops_ptr, totals_ptr, block * BT, num_tokens, num_rows, t_T, e_E,
        PLACES, NUM_EXPERTS, TOP_K, SOFTMAX, RENORMALISE, GROUPS, TOP_GROUPS, SCALE, HAS_BIAS, BT, BE,
    )  # fmt: skip
    members_E = members_of(chosen, t_T, BT, BE, ROWS_AT_ONCE)
    if PLACES:
        last = True
        if ALONE:
            tl.debug_barrier()
        else:
            tl.atomic_or(members_ptr + e_E, members_E << (block * BT), mask=members_E != 0, sem="relaxed")
            last = arrive_last(arrivals_ptr)
        if last:
            expert_N = load_ids(ids_ptr, 0, num_rows, TOP_K, BN)
            if not ALONE:
                members_E = tl.load(members_ptr + e_E)
                # Several warps hold the same experts: all must have read before one clears.
                tl.debug_barrier()
                tl.store(members_ptr + e_E, tl.zeros([BE], tl.int64))
            counts_E = popcount(members_E)
            ends_E = tl.cumsum(counts_E, axis=0)
            place_rows(expert_N, row_slot_ptr, members_E, ends_E - counts_E, 0, TOP_K, BN)
            store_counts(counts_E, ends_E, e_E, counts_ptr, offsets_ptr, NUM_EXPERTS)
            build_queues(
                counts_E, e_E, plan, num_slices, tiles_ptr, begins_ptr, tickets_ptr, ready_ptr, capacity, 0, 1,
                NUM_LISTS, True, BJ,
            )  # fmt: skip
    else:
        tl.store(members_ptr + (1 + block) * BE + e_E, members_E)
        tl.store(block_counts_ptr + e_E.to(tl.int64) * block_pitch + block, popcount(members_E).to(tl.uint8))


@triton.jit(do_not_specialize=["num_rows", "num_slices", "num_blocks", "capacity"])
def place_kernel(
    logits_ptr, plan_ptr, sizes_ptr, ids_ptr, weights_ptr, tops_ptr, totals_ptr, counts_ptr, offsets_ptr, row_slot_ptr,
    tiles_ptr, begins_ptr, tickets_ptr, ready_ptr, members_ptr, block_counts_ptr,
    num_rows, num_slices, num_blocks, capacity, block_pitch,
    DEPENDENT: tl.constexpr, CHAINED: tl.constexpr, NUM_LISTS: tl.constexpr, NUM_PARTS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr,
    SCALE: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr,
    BN: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Place one block's rows; the programs before the blocks write the queues. Each adds up all blocks for itself."""
    if DEPENDENT:
        gdc_launch_dependents()
    if CHAINED:
        gdc_wait()
    block = tl.program_id(0) - NUM_PARTS
    e_E = tl.arange(0, BE)
    plan = load_plan(plan_ptr, sizes_ptr, e_E, NUM_EXPERTS)
    # What a block's rows need is on its way while the counts of all blocks add up.
    tokens_stop = tl.minimum(num_rows, (block + 1) * BT)
    expert_N = load_ids(ids_ptr, block * BT, tokens_stop, TOP_K, BN)
    members_E = tl.load(members_ptr + tl.maximum(1 + block, 0) * BE + e_E)
    counts_E = tl.zeros([BE], tl.int32)
    before_E = tl.zeros([BE], tl.int32)
    for start in range(0, num_blocks, BB):
        b_B = (start + tl.arange(0, BB))[None, :]
        at = e_E[:, None] * block_pitch + b_B
        # A mask that is even over 16 counts lets them load at once.
        part = tl.load(block_counts_ptr + at, mask=b_B < tl.cdiv(num_blocks, 16) * 16, other=0).to(tl.int32)
        part = tl.where(b_B < num_blocks, part, 0)
        counts_E += tl.sum(part, axis=1)
        before_E += tl.sum(tl.where(b_B < block, part, 0), axis=1)
    ends_E = tl.cumsum(counts_E, axis=0)
    if block >= 0:
        weigh(
            logits_ptr, ids_ptr, weights_ptr, tops_ptr, totals_ptr, block * BT, tokens_stop, NUM_EXPERTS, TOP_K,
            SOFTMAX, RENORMALISE, SCALE, BT, BK,
        )  # fmt: skip
        starts_E = ends_E - counts_E + before_E
        place_rows(expert_N, row_slot_ptr, members_E, starts_E, block * BT, TOP_K, BN)
    else:
        build_queues(
            counts_E, e_E, plan, num_slices, tiles_ptr, begins_ptr, tickets_ptr, ready_ptr, capacity,
            block + NUM_PARTS, NUM_PARTS, NUM_LISTS, False, BJ,
        )  # fmt: skip
        if block + NUM_PARTS == 0:
            store_counts(counts_E, ends_E, e_E, counts_ptr, offsets_ptr, NUM_EXPERTS)


def padded_experts(num_experts: int) -> int:
    """Return the columns of a block of scores."""
    return max(16, next_power_of_two(num_experts))


@dataclass(frozen=True, slots=True)
class Blocking:
    """How a batch is cut: tokens and warps of a CTA, and how many CTAs."""

    block_t: int
    rows_at_once: int
    """Of a block, over its warps."""
    num_warps: int
    num_blocks: int
    one_launch: bool


@lru_cache(maxsize=4096)
def blocking(num_rows: int, num_experts: int) -> Blocking:
    """Return how a batch is cut into blocks of tokens."""
    block_e, padded = padded_experts(num_experts), next_power_of_two(max(1, num_rows))
    one_launch = num_rows <= MASK_TOKENS
    if one_launch:
        # A row of 64 scores fills a warp by two a lane: reductions over whole warps are single instructions.
        rows_of_warp = 1 if block_e >= 64 else WARP_SCORES // block_e
        block_t, most_warps = min(padded, SMALL_WARPS * rows_of_warp), SMALL_WARPS
    else:
        rows_of_warp = max(1, WARP_SCORES // block_e)
        block_t, most_warps = min(MASK_TOKENS, max(MIN_BLOCK_TOKENS, padded // WAVE_BLOCKS)), LARGE_WARPS
    num_warps = min(most_warps, max(1, block_t // rows_of_warp))
    rows_at_once = min(block_t, num_warps * rows_of_warp)
    return Blocking(block_t, rows_at_once, num_warps, max(1, -(-num_rows // block_t)), one_launch)


def route(
    logits_TE: Tensor,
    router: RouterSpec,
    launch: LayerLaunch,
    ws: "Workspace",
    *,
    bias_E: Tensor | None = None,
    num_tokens: Tensor | None = None,
) -> None:
    """Fill a workspace with ids, weights, counts, row order and tile queues for a batch of logits.

    `num_tokens`, one int32 on the device, says how many leading rows are tokens; None: all of them.
    """
    num_rows, block_e = logits_TE.shape[0], padded_experts(router.num_experts)
    cut = blocking(num_rows, router.num_experts)
    dependent = launch.dependent and not INTERPRET.value
    tokens_placed = next_power_of_two(max(1, num_rows)) if cut.one_launch else cut.block_t
    shared = {
        "DEPENDENT": dependent, "CHAINED": ws.chains and not cut.one_launch, "NUM_LISTS": launch.num_lists,
        "NUM_EXPERTS": router.num_experts, "TOP_K": router.top_k, "SOFTMAX": router.score == "softmax",
        "RENORMALISE": router.renormalise, "SCALE": router.scale, "BT": cut.block_t, "BE": block_e,
        "BN": tokens_placed * next_power_of_two(router.top_k),
        "BJ": max(1, tokens_placed // SMALLEST_BLOCK_M if cut.one_launch else ENTRIES // block_e),
        "enable_fp_fusion": False,
    }  # fmt: skip
    plan, block_pitch = (ws.plan, ws.tile_sizes(launch)), ws.block_counts_EB.stride(0)
    rows = (ws.ids_TK, ws.weights_TK, ws.tops_T, ws.totals_T, ws.counts_E, ws.offsets_E1, ws.row_slot_N)
    queues = (ws.tiles_QC, ws.begins_QS, ws.tickets, ws.ready_2C)
    blocks = (ws.members_BE, ws.block_counts_EB)
    route_kernel[(cut.num_blocks,)](
        logits_TE, bias_E, num_tokens, *plan, *rows, *queues, *blocks, ws.arrivals,
        num_rows, len(launch.slices), ws.capacity, block_pitch, PADDED=num_tokens is not None, PLACES=cut.one_launch,
        ALONE=cut.num_blocks == 1, ROWS_AT_ONCE=cut.rows_at_once,
        GROUPS=router.num_groups, TOP_GROUPS=router.top_groups, HAS_BIAS=bias_E is not None,
        num_warps=cut.num_warps, launch_pdl=dependent, **shared,
    )  # fmt: skip
    if cut.one_launch:
        return
    place_kernel[(cut.num_blocks + QUEUE_PARTS,)](
        logits_TE, *plan, *rows, *queues, *blocks,
        num_rows, len(launch.slices), cut.num_blocks, ws.capacity, block_pitch, NUM_PARTS=QUEUE_PARTS,
        BK=next_power_of_two(router.top_k),
        BB=min(max(16, next_power_of_two(cut.num_blocks)), COUNTS_AT_ONCE // block_e),
        num_warps=min(PLACE_WARPS, cut.num_warps), launch_pdl=ws.chains, **shared,
    )  # fmt: skip
