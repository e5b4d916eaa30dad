"""Routing on the device: logits to experts, weights, counts, a stable order of rows, and tile queues.

A batch that fits one block (64 tokens of up to 128 experts) takes one launch of one CTA, larger ones take two launches.
Nothing is counted with atomics and nothing is read back, so that order and bits depend on the logits and the plan
alone. `reference.route`, `dispatch` and `queues` define the result.

Shape letters: T tokens, E experts, K top-k, N routed rows, B blocks of tokens.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .choice import choose
from .queues import build_queues, load_plan
from .spec import INTERPRET, LayerLaunch, RouterSpec

if TYPE_CHECKING:
    from .workspace import Workspace

MAX_BLOCK_TOKENS = 64
BLOCK_SCORES = 8192
"""Scores that one CTA holds at once: 64 tokens of 128 experts."""
QUEUE_PARTS = 8
SCORES_PER_WARP = 512
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
def members_of(slot, BT: tl.constexpr):
    """Return each expert's tokens of a block [E], a bit each in int64."""
    bit_T = tl.full([BT], 1, tl.int64) << tl.arange(0, BT).to(tl.int64)
    return tl.sum(tl.where(slot >= 0, bit_T[:, None], 0), axis=0)


@triton.jit
def place_rows(slot, members_E, first_token, starts_E, row_slot_ptr, TOP_K: tl.constexpr, BT: tl.constexpr):
    """Store each routed row's place t * K + slot, expert by expert, tokens in order."""
    t_T = tl.arange(0, BT)
    below_T = (tl.full([BT], 1, tl.int64) << t_T.to(tl.int64)) - 1
    rank = popcount(members_E[None, :] & below_T[:, None])
    token_T = first_token + t_T
    tl.store(row_slot_ptr + starts_E[None, :] + rank, token_T[:, None] * TOP_K + slot, mask=slot >= 0)


@triton.jit
def store_counts(counts_E, ends_E, e_E, num_experts, counts_ptr, offsets_ptr):
    """Store tokens per expert [E] and where each expert's rows start [E + 1]."""
    tl.store(counts_ptr + e_E, counts_E, mask=e_E < num_experts)
    tl.store(offsets_ptr + 1 + e_E, ends_E, mask=e_E < num_experts)
    tl.store(offsets_ptr, 0)


@triton.jit
def live_tokens(num_tokens_ptr, num_rows, PADDED: tl.constexpr):
    """Return how many of the rows are tokens; the rest is padding."""
    if PADDED:
        return tl.minimum(tl.load(num_tokens_ptr), num_rows)
    return num_rows


@triton.jit(do_not_specialize=["num_rows", "num_experts", "num_slices", "capacity"])
def route_small_kernel(
    logits_ptr, bias_ptr, num_tokens_ptr, plan_ptr, sizes_ptr, ids_ptr, weights_ptr, counts_ptr, offsets_ptr,
    row_slot_ptr, tiles_ptr, begins_ptr, tickets_ptr, ready_ptr, num_rows, num_experts, num_slices, capacity,
    PADDED: tl.constexpr, DEPENDENT: tl.constexpr, NUM_LISTS: tl.constexpr,
    TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Route a small batch in one CTA."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    num_tokens = live_tokens(num_tokens_ptr, num_rows, PADDED)
    t_T, e_E = tl.arange(0, BT), tl.arange(0, BE)
    order, num_bounds, pinned_E = load_plan(plan_ptr, e_E, num_experts)
    slot = choose(
        logits_ptr, bias_ptr, ids_ptr, weights_ptr, t_T, e_E, num_tokens, num_rows, num_experts,
        TOP_K, SOFTMAX, RENORMALISE, GROUPS, TOP_GROUPS, SCALE, HAS_BIAS, BT, BE,
    )  # fmt: skip
    members_E = members_of(slot, BT)
    counts_E = popcount(members_E)
    ends_E = tl.cumsum(counts_E, axis=0)
    place_rows(slot, members_E, 0, ends_E - counts_E, row_slot_ptr, TOP_K, BT)
    store_counts(counts_E, ends_E, e_E, num_experts, counts_ptr, offsets_ptr)
    build_queues(
        counts_E, e_E, order, num_bounds, pinned_E, num_slices, plan_ptr, sizes_ptr, tiles_ptr, begins_ptr,
        tickets_ptr, ready_ptr, capacity, 0, 1, NUM_LISTS, BJ,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def route_block_kernel(
    logits_ptr, bias_ptr, num_tokens_ptr, ids_ptr, weights_ptr, slots_ptr, block_counts_ptr, num_rows, num_experts,
    PADDED: tl.constexpr, DEPENDENT: tl.constexpr,
    TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Route one block of tokens and count its experts [B, BE]."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    block = tl.program_id(0)
    num_tokens = live_tokens(num_tokens_ptr, num_rows, PADDED)
    t_T, e_E = block * BT + tl.arange(0, BT), tl.arange(0, BE)
    slot = choose(
        logits_ptr, bias_ptr, ids_ptr, weights_ptr, t_T, e_E, num_tokens, num_rows, num_experts,
        TOP_K, SOFTMAX, RENORMALISE, GROUPS, TOP_GROUPS, SCALE, HAS_BIAS, BT, BE,
    )  # fmt: skip
    tl.store(slots_ptr + t_T.to(tl.int64)[:, None] * BE + e_E[None, :], slot.to(tl.int16))
    tl.store(block_counts_ptr + block * BE + e_E, popcount(members_of(slot, BT)))


@triton.jit(do_not_specialize=["num_experts", "num_slices", "num_blocks", "capacity"])
def place_block_kernel(
    plan_ptr, sizes_ptr, slots_ptr, block_counts_ptr, counts_ptr, offsets_ptr, row_slot_ptr,
    tiles_ptr, begins_ptr, tickets_ptr, ready_ptr, num_experts, num_slices, num_blocks, capacity,
    DEPENDENT: tl.constexpr, NUM_LISTS: tl.constexpr, NUM_PARTS: tl.constexpr,
    TOP_K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BLOCK_B: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Place one block's rows; the programs before the blocks write the queues. Each adds up all blocks for itself."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    block = tl.program_id(0) - NUM_PARTS
    e_E = tl.arange(0, BE)
    order, num_bounds, pinned_E = load_plan(plan_ptr, e_E, num_experts)
    counts_E = tl.zeros([BE], tl.int32)
    before_E = tl.zeros([BE], tl.int32)
    for start in range(0, num_blocks, BLOCK_B):
        b_B = (start + tl.arange(0, BLOCK_B))[:, None]
        part = tl.load(block_counts_ptr + b_B * BE + e_E[None, :], mask=b_B < num_blocks, other=0)
        # Both sums at once: no count reaches 2^31.
        both = part.to(tl.int64) + (tl.where(b_B < block, part, 0).to(tl.int64) << 32)
        both_E = tl.sum(both, axis=0)
        counts_E += both_E.to(tl.int32)
        before_E += (both_E >> 32).to(tl.int32)
    ends_E = tl.cumsum(counts_E, axis=0)
    if block >= 0:
        t_T = block * BT + tl.arange(0, BT)
        slot = tl.load(slots_ptr + t_T.to(tl.int64)[:, None] * BE + e_E[None, :]).to(tl.int32)
        starts_E = ends_E - counts_E + before_E
        place_rows(slot, members_of(slot, BT), block * BT, starts_E, row_slot_ptr, TOP_K, BT)
    else:
        build_queues(
            counts_E, e_E, order, num_bounds, pinned_E, num_slices, plan_ptr, sizes_ptr, tiles_ptr, begins_ptr,
            tickets_ptr, ready_ptr, capacity, block + NUM_PARTS, NUM_PARTS, NUM_LISTS, BJ,
        )  # fmt: skip
        if block + NUM_PARTS == 0:
            store_counts(counts_E, ends_E, e_E, num_experts, counts_ptr, offsets_ptr)


def padded_experts(num_experts: int) -> int:
    """Return the columns of a block of scores."""
    return max(16, triton.next_power_of_2(num_experts))


def block_tokens(num_experts: int) -> int:
    """Return the most tokens that one CTA routes at once."""
    return min(MAX_BLOCK_TOKENS, BLOCK_SCORES // padded_experts(num_experts))


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
    block_t = min(triton.next_power_of_2(max(num_rows, 1)), block_tokens(router.num_experts))
    num_blocks = max(1, triton.cdiv(num_rows, block_t))
    choice = {
        "PADDED": num_tokens is not None,
        "DEPENDENT": launch.dependent and not INTERPRET.value,
        "TOP_K": router.top_k,
        "SOFTMAX": router.score == "softmax",
        "RENORMALISE": router.renormalise,
        "GROUPS": router.num_groups,
        "TOP_GROUPS": router.top_groups,
        "SCALE": router.scale,
        "HAS_BIAS": bias_E is not None,
        "BT": block_t,
        "BE": block_e,
        "num_warps": min(32, max(4, block_t * block_e // SCORES_PER_WARP)),
        "enable_fp_fusion": False,
        "launch_pdl": launch.dependent and not INTERPRET.value,
    }
    plan = (ws.plan, ws.tile_sizes(launch))
    rows = (ws.counts_E, ws.offsets_E1, ws.row_slot_N)
    queues = (ws.tiles_QC, ws.begins_QS, ws.tickets, ws.ready_2C)
    inputs = (logits_TE, bias_E, num_tokens)
    sizes = (num_rows, router.num_experts)
    block_j = max(1, ENTRIES // block_e)
    num_slices, num_lists = len(launch.slices), launch.num_lists
    if num_blocks == 1:
        route_small_kernel[(1,)](
            *inputs, *plan, ws.ids_TK, ws.weights_TK, *rows, *queues, *sizes, num_slices, ws.capacity,
            NUM_LISTS=num_lists, BJ=block_j, **choice,
        )  # fmt: skip
        return
    route_block_kernel[(num_blocks,)](
        *inputs, ws.ids_TK, ws.weights_TK, ws.slots_TE, ws.block_counts_BE, *sizes, **choice,
    )  # fmt: skip
    place_block_kernel[(num_blocks + QUEUE_PARTS,)](
        *plan, ws.slots_TE, ws.block_counts_BE, *rows, *queues, router.num_experts, num_slices, num_blocks,
        ws.capacity, NUM_LISTS=num_lists, NUM_PARTS=QUEUE_PARTS, BLOCK_B=min(64, BLOCK_SCORES // block_e), BJ=block_j,
        **{k: choice[k] for k in ("DEPENDENT", "TOP_K", "BT", "BE", "num_warps", "launch_pdl")},
    )  # fmt: skip
