"""Which experts a block of tokens chooses, and their weights: the part of routing that looks at scores.

`reference.route` defines the result. Ids do not depend on rounding; every sum has one order, whatever the launch.

Shape letters: T tokens of a block, E experts, K top-k.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .spec import INTERPRET

FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
NOTHING = tl.constexpr(-0x7FFFFFFF)
"""Below the order of every finite score, as are the 2^23 - 1 numbers after it: an expert that took slot k has
NOTHING + 1 + k."""


@triton.jit
def expf(x):
    """Return the exponential as torch computes it on the device, not the fast one."""
    if INTERPRET:
        return tl.exp(x)
    return libdevice.exp(x)


@triton.jit
def finite(x):
    """Return x with infinities replaced by the outermost finite numbers, and NaN by the lowest."""
    x = tl.where(x != x, -FLOAT_MAX, x)  # noqa: PLR0124
    return tl.minimum(tl.maximum(x, -FLOAT_MAX), FLOAT_MAX)


@triton.jit
def sigmoid(x):
    """Return the logistic function by IEEE operations."""
    return tl.div_rn(1.0 + tl.zeros_like(x), 1.0 + expf(-x))


@triton.jit
def order_of(x):
    """Return int32 that sort like the floats."""
    # Adding 0 makes -0 equal to 0.
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_of(order):
    """Return the float of an order."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def best_of(order, place, axis: tl.constexpr):
    """Return the largest order along an axis and where it is; of equals, the lowest place."""
    # Two 32-bit reductions: a warp has an instruction for each, and none for 64 bits.
    best = tl.max(order, axis=axis)
    return best, tl.min(tl.where(order == tl.expand_dims(best, axis), place, 0x7FFFFFFF), axis=axis)


@triton.jit
def keep_best_groups(
    order, SOFTMAX: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr
):
    """Blank the orders of experts outside the best groups."""
    size: tl.constexpr = BE // GROUPS
    grouped = tl.reshape(order, [BT, GROUPS, size])
    member = tl.arange(0, size)[None, None, :]
    first, place = best_of(grouped, member, 2)
    score = score_of(first)
    if not SOFTMAX:
        second, _ = best_of(tl.where(member == place[:, :, None], NOTHING, grouped), member, 2)
        score += score_of(second)
    group = tl.arange(0, GROUPS)[None, :]
    group_order = order_of(score)
    for _ in range(TOP_GROUPS):
        _score, chosen = best_of(group_order, group, 1)
        group_order = tl.where(group == chosen[:, None], NOTHING, group_order)
    return tl.reshape(tl.where(group_order[:, :, None] == NOTHING, grouped, NOTHING), [BT, BE])


@triton.jit
def exact_sum(x):
    """Sum rows of numbers from 0 to 1 in fixed point, so that no order of adding matters."""
    return tl.sum((x * 1099511627776.0).to(tl.int64), axis=1).to(tl.float32) * 9.094947017729282e-13


@triton.jit
def choose(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, tops_ptr, totals_ptr, first_token, num_tokens, num_rows, t_T, e_E,
    WEIGHS: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SOFTMAX: tl.constexpr,
    RENORMALISE: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Store the ids of a block of tokens; return which experts each chose [T, E].

    t_T: which token of the block a row is. WEIGHS: store the weights too, which takes the fewest steps. Else store what
    `weigh` needs: for many tokens it is less work to weigh the chosen experts alone.
    """
    known = (e_E < NUM_EXPERTS)[None, :]
    live = (t_T < num_tokens - first_token)[:, None]
    # A block's start is 64 bits wide; what is added to it fits 32.
    at = t_T[:, None] * NUM_EXPERTS + e_E[None, :]
    logits_ptr += first_token.to(tl.int64) * NUM_EXPERTS
    logits = finite(tl.load(logits_ptr + at, mask=live & known, other=0.0).to(tl.float32))
    score = logits if SOFTMAX else sigmoid(logits)
    choice = score
    if HAS_BIAS:
        choice = finite(score + tl.load(bias_ptr + e_E, mask=e_E < NUM_EXPERTS, other=0.0)[None, :])
    order = tl.where(known, order_of(choice), NOTHING)
    # Of softmax, which is never biased: the highest score is the highest logit, and always among the chosen.
    top = score_of(tl.max(order, axis=1))
    if GROUPS > 1:
        order = keep_best_groups(order, SOFTMAX, GROUPS, TOP_GROUPS, BT, BE)
    # Whatever is chosen stays where its expert is: moving it into rows of K would cost a barrier for each slot.
    total = tl.zeros([BT], tl.float32)
    for k in range(TOP_K):
        best, expert = best_of(order, e_E[None, :], 1)
        hit = e_E[None, :] == expert[:, None]
        if WEIGHS and RENORMALISE:
            weight = tl.sum(tl.where(hit, score, 0.0), axis=1) if HAS_BIAS else score_of(best)
            total += expf(weight - top) if SOFTMAX else weight
        order = tl.where(hit, NOTHING + 1 + k, order)
    slot = order - (NOTHING + 1)
    chosen = (slot >= 0) & (slot < TOP_K)
    # Not so, but the mask keeps stores apart, and without this they would move to another layout through shared memory.
    out = tl.max_contiguous(tl.multiple_of(t_T[:, None] * TOP_K + slot, [1, 4]), [1, 4])
    rows_T = t_T < num_rows - first_token
    inside = rows_T[:, None] & chosen
    ids_ptr += first_token.to(tl.int64) * TOP_K
    tl.store(ids_ptr + out, tl.where(live, tl.broadcast_to(e_E[None, :], [BT, BE]), -1), mask=inside)
    if SOFTMAX and not RENORMALISE:
        total = exact_sum(tl.where(known, expf(logits - top[:, None]), 0.0))
    if WEIGHS:
        weight = expf(logits - top[:, None]) if SOFTMAX else score
        if SOFTMAX or RENORMALISE:
            total = total if SOFTMAX else total + 1e-20
            weight = tl.div_rn(weight, tl.broadcast_to(total[:, None], [BT, BE]))
        weights_ptr += first_token.to(tl.int64) * TOP_K
        tl.store(weights_ptr + out, tl.where(live, weight * SCALE, 0.0), mask=inside)
    elif SOFTMAX:
        tl.store(tops_ptr + first_token + t_T, top, mask=rows_T)
        if not RENORMALISE:
            tl.store(totals_ptr + first_token + t_T, total, mask=rows_T)
    return live & chosen


@triton.jit
def weigh(
    logits_ptr, ids_ptr, weights_ptr, tops_ptr, totals_ptr, first_token, tokens_stop,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr,
    SCALE: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Store the weights of a block's tokens, whose experts are chosen."""
    token_T, k_K = first_token + tl.arange(0, BT), tl.arange(0, BK)[None, :]
    rows_T = token_T < tokens_stop
    inside = rows_T[:, None] & (k_K < TOP_K)
    place = token_T[:, None] * TOP_K + k_K
    expert = tl.load(ids_ptr + place, mask=inside, other=-1)
    live = expert >= 0
    at = token_T.to(tl.int64)[:, None] * NUM_EXPERTS + expert
    logit = finite(tl.load(logits_ptr + at, mask=live, other=0.0).to(tl.float32))
    top = tl.load(tops_ptr + token_T, mask=rows_T, other=0.0)[:, None] if SOFTMAX else 0.0
    weight = expf(logit - top) if SOFTMAX else sigmoid(logit)
    if RENORMALISE:
        total_T = tl.zeros([BT], tl.float32)
        for k in range(TOP_K):
            total_T += tl.sum(tl.where(k_K == k, weight, 0.0), axis=1)
        total_T = total_T if SOFTMAX else total_T + 1e-20
        weight = tl.div_rn(weight, tl.broadcast_to(total_T[:, None], [BT, BK]))
    elif SOFTMAX:
        total_T = tl.load(totals_ptr + token_T, mask=rows_T, other=1.0)
        weight = tl.div_rn(weight, tl.broadcast_to(total_T[:, None], [BT, BK]))
    tl.store(weights_ptr + place, tl.where(live, weight * SCALE, 0.0), mask=inside)
