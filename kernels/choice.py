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
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, t_T, e_E, num_tokens, num_rows, num_experts,
    TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
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
    # Whatever is chosen stays where its expert is: moving it into rows of K would cost a barrier for each slot.
    slot = tl.full([BT, BE], -1, tl.int32)
    total = tl.zeros([BT], tl.float32)
    for k in range(TOP_K):
        best, expert = best_of(order, e_E[None, :], 1)
        hit = e_E[None, :] == expert[:, None]
        weight = tl.sum(tl.where(hit, score, 0.0), axis=1) if HAS_BIAS else score_of(best)
        total += expf(weight - top) if SOFTMAX else weight
        slot = tl.where(hit, k, slot)
        order = tl.where(hit, NOTHING, order)
    picked = expf(logits - top[:, None]) if SOFTMAX else score
    if RENORMALISE:
        picked = tl.div_rn(picked, tl.broadcast_to((total if SOFTMAX else total + 1e-20)[:, None], [BT, BE]))
    elif SOFTMAX:
        whole = exact_sum(tl.where(known, picked, 0.0))
        picked = tl.div_rn(picked, tl.broadcast_to(whole[:, None], [BT, BE]))
    out = t_T.to(tl.int64)[:, None] * TOP_K + slot
    inside = (t_T < num_rows)[:, None] & (slot >= 0)
    tl.store(ids_ptr + out, tl.where(live, tl.broadcast_to(e_E[None, :], [BT, BE]), -1), mask=inside)
    tl.store(weights_ptr + out, tl.where(live, picked * SCALE, 0.0), mask=inside)
    return tl.where(live, slot, -1)
