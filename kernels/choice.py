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
"""Below the order of every finite score."""


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
def order_of(x):
    """Return int32 that sort like the floats."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def score_of(order):
    """Return the float of an order."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def best_of(order, place, axis: tl.constexpr):
    """Return the largest order along an axis and where it is; of equals, the lowest place."""
    key = tl.max((order.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64), axis=axis)
    return (key >> 32).to(tl.int32), (0x7FFFFFFF - (key & 0xFFFFFFFF)).to(tl.int32)


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
def pair_tree_sum(x, BT: tl.constexpr, BE: tl.constexpr):
    """Sum rows over adjacent pairs, so that the order is the same in every launch."""
    if BE == 1:
        total = tl.reshape(x, [BT])
    else:
        left, right = tl.split(tl.reshape(x, [BT, BE // 2, 2]))
        total = pair_tree_sum(left + right, BT, BE // 2)
    return total


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
    order = tl.where(known, order_of(choice), NOTHING)
    if GROUPS > 1:
        order = keep_best_groups(order, SOFTMAX, GROUPS, TOP_GROUPS, BT, BE)
    slot = tl.full([BT, BE], -1, tl.int32)
    k_K = tl.arange(0, BK)[None, :]
    ids = tl.full([BT, BK], -1, tl.int32)
    picked = tl.zeros([BT, BK], tl.float32)
    total = tl.zeros([BT], tl.float32)
    for k in range(TOP_K):
        best, expert = best_of(order, e_E[None, :], 1)
        hit = e_E[None, :] == expert[:, None]
        weight = tl.sum(tl.where(hit, score, 0.0), axis=1) if HAS_BIAS else score_of(best)
        if SOFTMAX:
            weight = expf(weight - top)
        total += weight
        picked = tl.where(k_K == k, weight[:, None], picked)
        ids = tl.where(k_K == k, expert[:, None], ids)
        slot = tl.where(hit & live, k, slot)
        order = tl.where(hit, NOTHING, order)
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
