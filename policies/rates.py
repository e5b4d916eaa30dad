"""How fast stretches of kernels progress beside each other.

Alone, a segment runs at speed 1. Beside others, each resource that is asked for more than it has is divided max-min
fairly, weighted by CTAs in flight: a slice that asks for less than its fair part gets all it asks for. Where limits
blunt each other, requests to memory wait longer the more of them there are instead.
"""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from .shares import Shares

GAP = -1
"""`kernel` of a segment that occupies nothing: a graph node's gap, a hop through the host."""


class Segment(NamedTuple):
    """A stretch of a kernel; demands are those at speed 1."""

    solo_ns: float
    pipe: float
    """Part of the device's SM pipes."""
    l2: float
    """Part of the device's L2 bandwidth."""
    flops: float
    """Part of the device's burst matrix rate, padding included."""
    dram: float
    """Bytes per ns."""
    kernel: int
    """Place of the kernel in its chain; `GAP` for none."""


def gap(ns: float) -> Segment:
    """Return a stretch of time that occupies nothing."""
    return Segment(ns, 0.0, 0.0, 0.0, 0.0, GAP)


def water_level(demands: Sequence[float], weights: Sequence[float], capacity: float) -> float:
    """Return the level at which min(demand, weight * level) fills the capacity; inf when all demands fit."""
    left, weight = capacity, sum(weights)
    level_of = [demand / own for demand, own in zip(demands, weights, strict=True)]
    for i in sorted(range(len(demands)), key=level_of.__getitem__):
        level = left / weight
        if demands[i] > weights[i] * level:
            return level
        left -= demands[i]
        weight -= weights[i]
    return inf


def _level_of_two(d0: float, d1: float, w0: float, w1: float, capacity: float) -> float:
    if d0 + d1 <= capacity:
        return inf
    level = capacity / (w0 + w1)
    if d0 <= w0 * level:
        return (capacity - d0) / w1
    return (capacity - d1) / w0 if d1 <= w1 * level else level


Load = tuple[list[float], float]
"""What each slice asks of a resource, and how much there is."""


def _overloads(ids: Sequence[int], segments: Sequence[Segment], shares: Shares) -> list[Load]:
    pipe, l2, flops, dram, mask = 0.0, 0.0, 0.0, 0.0, 0
    # One pass by hand: four sums over columns cost twice as much.
    for i, (_, of_pipe, of_l2, of_flops, of_dram, _) in zip(ids, segments, strict=True):
        mask |= 1 << i
        pipe += of_pipe
        l2 += of_l2
        flops += of_flops
        dram += of_dram
    over: list[Load] = []
    if shares.pooled and pipe > 1.0:
        over.append(([one.pipe for one in segments], 1.0))
    if flops > 1.0:
        over.append(([one.flops for one in segments], 1.0))
    if not shares.own_memory:
        if l2 > 1.0:
            over.append(([one.l2 for one in segments], 1.0))
        if not shares.constants.overlap and dram > (cap := shares.read_cap(mask)):
            over.append(([one.dram for one in segments], cap))
    return over


def rates(ids: Sequence[int], segments: Sequence[Segment], shares: Shares) -> list[float] | None:
    """Return each running segment's speed, 0..1, in the order given; None: all run at speed 1.

    `ids` are their slices.
    """
    over = _overloads(ids, segments, shares)
    soft = shares.constants.overlap and not shares.own_memory
    memory = memory_speeds(ids, [one.dram for one in segments], shares) if soft else None
    if not over:
        return memory
    weights = [shares.reach_S[i] for i in ids]
    speeds = _pair(over, *weights) if len(ids) == 2 else _shared(over, weights)
    return speeds if memory is None else [min(a, b) for a, b in zip(speeds, memory, strict=True)]


ROUNDS = 3
"""Until requests in flight, which depend on the speeds, have settled: to 1.4 % of a speed in the worst case seen."""


def memory_speeds(ids: Sequence[int], dram: Sequence[float], shares: Shares) -> list[float] | None:
    """Return the speeds at which slices run while they read beside each other; `dram` bytes per ns alone, at speed 1.

    A request takes as long as all requests in flight take at the rate that the memory gives them together (Little). A
    slice whose memory takes a part m of its time alone, and whose requests take x times as long, takes
    (1 - m^p + (m x)^p)^(1/p) times as long, as limits blunt each other within a wave.
    """
    part = [min(1.0, d / shares.read_per_ns_S[i]) for i, d in zip(ids, dram, strict=True)]
    if part.count(0.0) > len(part) - 2:
        return None
    overlap, power = shares.constants.overlap, 1 / shares.constants.overlap
    hidden = [1.0 - m**power for m in part]
    waiting, speeds = part.copy(), [1.0] * len(ids)
    # By index: lists over zips cost twice as much.
    for _ in range(ROUNDS):
        in_flight = 0.0
        for k, i in enumerate(ids):
            in_flight += waiting[k] * shares.reach_S[i]
        for k, i in enumerate(ids):
            together = in_flight + (1.0 - waiting[k]) * shares.reach_S[i]
            longer = together / shares.read(together) / shares.latency_S[i]
            stalled = part[k] * longer if longer > 1.0 else part[k]
            speed = speeds[k] = (hidden[k] + stalled**power) ** -overlap
            waiting[k] = min(1.0, stalled * speed)
    return speeds


def _shared(over: list[Load], weights: Sequence[float]) -> list[float]:
    speeds = [1.0] * len(weights)
    for demands, capacity in over:
        asked = [d * y for d, y in zip(demands, speeds, strict=True)]
        level = water_level(asked, weights, capacity)
        for i, ask in enumerate(asked):
            if ask > (most := weights[i] * level):
                speeds[i] *= most / ask
    if len(over) > 1:
        _grow(speeds, over)
    return speeds


def _pair(over: list[Load], w0: float, w1: float) -> list[float]:
    """Return the speeds of two segments, as the general way has them: most runs have two slices, and it is slow."""
    y0 = y1 = 1.0
    for (d0, d1), capacity in over:
        ask0, ask1 = d0 * y0, d1 * y1
        level = _level_of_two(ask0, ask1, w0, w1, capacity)
        if ask0 > w0 * level:
            y0 *= w0 * level / ask0
        if ask1 > w1 * level:
            y1 *= w1 * level / ask1
    if len(over) > 1:
        y0 = max(y0, min([1.0] + [(c - (d0 * y0 + d1 * y1 - d0 * y0)) / d0 for (d0, d1), c in over if d0]))
        y1 = max(y1, min([1.0] + [(c - (d0 * y0 + d1 * y1 - d1 * y1)) / d1 for (d0, d1), c in over if d1]))
    return [y0, y1]


def _grow(speeds: list[float], over: list[Load]) -> None:
    """Hand on what one resource has left because another holds its users back."""
    for i, own_speed in enumerate(speeds):
        room = 1.0
        for demands, capacity in over:
            if own := demands[i]:
                used = 0.0
                for d, y in zip(demands, speeds, strict=True):
                    used += d * y
                room = min(room, (capacity - (used - own * own_speed)) / own)
        speeds[i] = max(own_speed, room)
