"""Routing on the device: logits to experts, weights, counts, a stable order of rows, and tile queues.

Up to `SMALL_TOKENS` tokens take one launch of one CTA, more take two launches. Nothing is counted with atomics and
nothing is read back, so that order and bits depend on the logits and the plan alone. `reference.route` and
`reference.dispatch` define the result.

Shape letters: T tokens, E experts, K top-k, N routed rows, B blocks of tokens.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .queues import build_queues
from .spec import INTERPRET, LayerLaunch, RouterSpec

if TYPE_CHECKING:
    from .workspace import Workspace

SMALL_TOKENS = 64
BLOCK_TOKENS = 64
QUEUE_PARTS = 8

FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
NOTHING = tl.constexpr(-0x7FFFFFFFFFFFFFFF)
"""Below the key of every score."""


@triton.jit
def expf(x):
    """Return the exponential as torch computes it on the device, not the fast one."""
    if INTERPRET:
        return tl.exp(x)
    return libdevice.exp(x)


@triton.jit
def finite(x):
    """Return x with NaN and infinities replaced by the outermost finite numbers."""
    x = tl.where(x != x, -FLOAT_MAX, x)  # noqa: PLR0124
    return tl.minimum(tl.maximum(x, -FLOAT_MAX), FLOAT_MAX)


@triton.jit
def sortable(x):
    """Return int32 that sort like the floats; its own inverse on bits."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def make_keys(x, place):
    """Return int64 keys that rise with the score and, among equals, with falling place."""
    x = tl.where(x == 0.0, 0.0, x)
    return (sortable(x).to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)


@triton.jit
def key_score(key):
    """Return the score of a key."""
    order = (key >> 32).to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def keep_best_groups(
    keys, SOFTMAX: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr
):
    """Blank the keys of experts outside the best groups."""
    grouped = tl.reshape(keys, [BT, GROUPS, BE // GROUPS])
    first = tl.max(grouped, axis=2)
    score = key_score(first)
    if not SOFTMAX:
        score += key_score(tl.max(tl.where(grouped == first[:, :, None], NOTHING, grouped), axis=2))
    group_keys = make_keys(score, tl.arange(0, GROUPS)[None, :])
    chosen = tl.zeros([BT, GROUPS], tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        hit = group_keys == tl.max(group_keys, axis=1)[:, None]
        chosen = tl.where(hit, 1, chosen)
        group_keys = tl.where(hit, NOTHING, group_keys)
    return tl.reshape(tl.where(chosen[:, :, None] > 0, grouped, NOTHING), [BT, BE])


@triton.jit
def pair_tree_sum(x, BT: tl.constexpr, BE: tl.constexpr):
    """Sum rows over adjacent pairs, so that the order is the same in every launch."""
    width: tl.constexpr = BE // 2
    if width == 0:
        return tl.reshape(x, [BT])
    left, right = tl.split(tl.reshape(x, [BT, width, 2]))
    return pair_tree_sum(left + right, BT, width)


@triton.jit
def choose(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    t_T,
    e_E,
    num_tokens,
    num_rows,
    num_experts,
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALISE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
):
    """Store ids and weights of a block of tokens; return the slot of each chosen expert [T, E], -1 elsewhere."""
    known = (e_E < num_experts)[None, :]
    live = (t_T < num_tokens)[:, None]
    at = t_T.to(tl.int64)[:, None] * num_experts + e_E[None, :]
    logits = finite(tl.load(logits_ptr + at, mask=live & known, other=0.0).to(tl.float32))
    top = tl.max(tl.where(known, logits, -FLOAT_MAX), axis=1)
    score = logits if SOFTMAX else tl.div_rn(tl.full([BT, BE], 1.0, tl.float32), 1.0 + expf(-logits))
    choice = score
    if HAS_BIAS:
        choice = finite(score + tl.load(bias_ptr + e_E, mask=e_E < num_experts, other=0.0)[None, :])
    keys = tl.where(known, make_keys(choice, e_E[None, :]), NOTHING)
    if GROUPS > 1:
        keys = keep_best_groups(keys, SOFTMAX, GROUPS, TOP_GROUPS, BT, BE)
    slot = tl.full([BT, BE], -1, tl.int32)
    k_K = tl.arange(0, BK)[None, :]
    ids = tl.full([BT, BK], -1, tl.int32)
    picked = tl.zeros([BT, BK], tl.float32)
    total = tl.zeros([BT], tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.max(keys, axis=1)
        hit = keys == best[:, None]
        weight = tl.sum(tl.where(hit, score, 0.0), axis=1) if HAS_BIAS else key_score(best)
        if SOFTMAX:
            weight = expf(weight - top)
        total += weight
        picked = tl.where(k_K == k, weight[:, None], picked)
        ids = tl.where(k_K == k, (0x7FFFFFFF - (best & 0xFFFFFFFF)).to(tl.int32)[:, None], ids)
        slot = tl.where(hit & live, k, slot)
        keys = tl.where(hit, NOTHING, keys)
    if RENORMALISE:
        picked = tl.div_rn(picked, tl.broadcast_to((total if SOFTMAX else total + 1e-20)[:, None], [BT, BK]))
    elif SOFTMAX:
        whole = pair_tree_sum(tl.where(known, expf(logits - top[:, None]), 0.0), BT, BE)
        picked = tl.div_rn(picked, tl.broadcast_to(whole[:, None], [BT, BK]))
    out = t_T.to(tl.int64)[:, None] * TOP_K + k_K
    inside = (t_T < num_rows)[:, None] & (k_K < TOP_K)
    tl.store(ids_ptr + out, tl.where(live, ids, -1), mask=inside)
    tl.store(weights_ptr + out, tl.where(live, picked * SCALE, 0.0), mask=inside)
    return slot


@triton.jit
def place_rows(slot, t_T, starts_E, row_slot_ptr, TOP_K: tl.constexpr):
    """Store each routed row's place t * K + slot, expert by expert, tokens in order."""
    member = (slot >= 0).to(tl.int32)
    rank = tl.cumsum(member, axis=0) - member
    tl.store(row_slot_ptr + starts_E[None, :] + rank, t_T[:, None] * TOP_K + slot, mask=slot >= 0)


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


@triton.jit
def route_small_kernel(
    logits_ptr, bias_ptr, num_tokens_ptr, plan_ptr, ids_ptr, weights_ptr, counts_ptr, offsets_ptr, row_slot_ptr,
    tiles_ptr, begins_ptr, tickets_ptr, ready_ptr, num_rows, num_experts, capacity,
    PADDED: tl.constexpr, DEPENDENT: tl.constexpr, NUM_LISTS: tl.constexpr, BLOCK_C: tl.constexpr,
    TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Route a small batch in one CTA."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    num_tokens = live_tokens(num_tokens_ptr, num_rows, PADDED)
    t_T, e_E = tl.arange(0, BT), tl.arange(0, BE)
    slot = choose(
        logits_ptr, bias_ptr, ids_ptr, weights_ptr, t_T, e_E, num_tokens, num_rows, num_experts,
        TOP_K, SOFTMAX, RENORMALISE, GROUPS, TOP_GROUPS, SCALE, HAS_BIAS, BT, BE, BK,
    )  # fmt: skip
    counts_E = tl.sum((slot >= 0).to(tl.int32), axis=0)
    ends_E = tl.cumsum(counts_E, axis=0)
    place_rows(slot, t_T, ends_E - counts_E, row_slot_ptr, TOP_K)
    store_counts(counts_E, ends_E, e_E, num_experts, counts_ptr, offsets_ptr)
    build_queues(
        counts_E, e_E, num_experts, plan_ptr, tiles_ptr, begins_ptr, tickets_ptr, ready_ptr, capacity, 0, 1,
        NUM_LISTS, BE, BLOCK_C,
    )  # fmt: skip


@triton.jit
def route_block_kernel(
    logits_ptr, bias_ptr, num_tokens_ptr, ids_ptr, weights_ptr, block_counts_ptr, num_rows, num_experts,
    PADDED: tl.constexpr, DEPENDENT: tl.constexpr,
    TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
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
        TOP_K, SOFTMAX, RENORMALISE, GROUPS, TOP_GROUPS, SCALE, HAS_BIAS, BT, BE, BK,
    )  # fmt: skip
    tl.store(block_counts_ptr + block * BE + e_E, tl.sum((slot >= 0).to(tl.int32), axis=0))


@triton.jit
def place_block_kernel(
    plan_ptr, ids_ptr, block_counts_ptr, counts_ptr, offsets_ptr, row_slot_ptr,
    tiles_ptr, begins_ptr, tickets_ptr, ready_ptr, num_rows, num_experts, num_blocks, capacity,
    DEPENDENT: tl.constexpr, NUM_LISTS: tl.constexpr, NUM_PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
    TOP_K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Place one block's rows; the programs past the blocks write the queues. Each adds up all blocks for itself."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    block = tl.program_id(0)
    e_E = tl.arange(0, BE)
    counts_E = tl.zeros([BE], tl.int32)
    before_E = tl.zeros([BE], tl.int32)
    for start in range(0, num_blocks, BLOCK_B):
        b_B = (start + tl.arange(0, BLOCK_B))[:, None]
        part = tl.load(block_counts_ptr + b_B * BE + e_E[None, :], mask=b_B < num_blocks, other=0)
        counts_E += tl.sum(part, axis=0)
        before_E += tl.sum(tl.where(b_B < block, part, 0), axis=0)
    ends_E = tl.cumsum(counts_E, axis=0)
    if block < num_blocks:
        t_T = block * BT + tl.arange(0, BT)
        slot = tl.full([BT, BE], -1, tl.int32)
        for k in tl.static_range(TOP_K):
            id_T = tl.load(ids_ptr + t_T.to(tl.int64) * TOP_K + k, mask=t_T < num_rows, other=-1)
            slot = tl.where(id_T[:, None] == e_E[None, :], k, slot)
        place_rows(slot, t_T, ends_E - counts_E + before_E, row_slot_ptr, TOP_K)
    else:
        build_queues(
            counts_E, e_E, num_experts, plan_ptr, tiles_ptr, begins_ptr, tickets_ptr, ready_ptr, capacity,
            block - num_blocks, NUM_PARTS, NUM_LISTS, BE, BLOCK_C,
        )  # fmt: skip
    if block == 0:
        store_counts(counts_E, ends_E, e_E, num_experts, counts_ptr, offsets_ptr)


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
    num_rows, block_e = logits_TE.shape[0], max(16, triton.next_power_of_2(router.num_experts))
    block_t = min(triton.next_power_of_2(max(num_rows, 1)), BLOCK_TOKENS)
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
        "BK": triton.next_power_of_2(router.top_k),
        "num_warps": 16 if block_t * block_e > 8192 else 8 if block_t * block_e > 1024 else 4,
        "enable_fp_fusion": False,
        "launch_pdl": launch.dependent and not INTERPRET.value,
    }
    rows = (ws.counts_E, ws.offsets_E1, ws.row_slot_N)
    queues = (ws.tiles_QC, ws.begins_QS, ws.tickets, ws.ready_2C)
    inputs = (logits_TE, bias_E, num_tokens)
    sizes = (num_rows, router.num_experts)
    lists = {"NUM_LISTS": launch.num_lists, "BLOCK_C": 64}
    if num_blocks == 1:
        route_small_kernel[(1,)](
            *inputs, ws.plan, ws.ids_TK, ws.weights_TK, *rows, *queues, *sizes, ws.capacity, **choice, **lists
        )
        return
    route_block_kernel[(num_blocks,)](*inputs, ws.ids_TK, ws.weights_TK, ws.block_counts_BE, *sizes, **choice)
    place_block_kernel[(num_blocks + QUEUE_PARTS,)](
        ws.plan, ws.ids_TK, ws.block_counts_BE, *rows, *queues, *sizes, num_blocks, ws.capacity,
        NUM_PARTS=QUEUE_PARTS, BLOCK_B=16, **lists,
        **{k: choice[k] for k in ("DEPENDENT", "TOP_K", "BT", "BE", "num_warps", "launch_pdl")},
    )  # fmt: skip
