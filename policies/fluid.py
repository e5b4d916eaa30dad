"""Kernels as fluids: how fast segments progress beside each other, and when the next one ends.

A segment is a stretch of a kernel with constant demands. Alone it runs at speed 1. Beside others, each resource that
is asked for more than it has is divided max-min fairly, weighted by CTAs in flight: a slice that asks for less than
its fair part gets all it asks for. The closed form and the simulator both call `rates` and step a `Fluid`, so that
they agree to the nanosecond when nothing else happens.
"""

from collections.abc import Sequence
from heapq import heappop, heappush
from math import ceil, inf
from typing import NamedTuple

from .shares import Shares

GAP = -1
"""`kernel` of a segment that occupies nothing: a graph node's gap, a hop through the host."""
EPSILON_NS = 1e-6


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
    if sum(demands) <= capacity:
        return inf
    order = sorted(range(len(demands)), key=lambda i: demands[i] / weights[i])
    left, weight = capacity, sum(weights)
    for i in order:
        level = left / weight
        if demands[i] > weights[i] * level:
            return level
        left -= demands[i]
        weight -= weights[i]
    return inf


def rates(ids: Sequence[int], segments: Sequence[Segment], shares: Shares) -> list[float]:
    """Return each running segment's speed, 0..1, in the order given; `ids` are their slices."""
    count = len(ids)
    if count == 1:
        return [1.0]
    over: list[tuple[list[float], float]] = []
    if shares.pooled:
        pipe = [s.pipe for s in segments]
        if sum(pipe) > 1.0:
            over.append((pipe, 1.0))
    flops = [s.flops for s in segments]
    if sum(flops) > 1.0:
        over.append((flops, 1.0))
    if not shares.own_memory:
        l2 = [s.l2 for s in segments]
        if sum(l2) > 1.0:
            over.append((l2, 1.0))
        mask = 0
        for i in ids:
            mask |= 1 << i
        dram, cap = [s.dram for s in segments], shares.read_cap(mask)
        if sum(dram) > cap:
            over.append((dram, cap))
    if not over:
        return [1.0] * count
    weights = [shares.weights[i] for i in ids]
    return _divide(over, weights, count)


def _divide(over: list[tuple[list[float], float]], weights: list[float], count: int) -> list[float]:
    """Divide overloaded resources: what one resource withholds, the others need not give."""
    limits = [[1.0] * count for _ in over]
    for _ in range(1 if len(over) == 1 else 4):
        for r, (demands, capacity) in enumerate(over):
            asked = [
                d * min((limits[q][i] for q in range(len(over)) if q != r), default=1.0) for i, d in enumerate(demands)
            ]
            level = water_level(asked, weights, capacity)
            limits[r] = [min(1.0, w * level / d) if d else 1.0 for d, w in zip(demands, weights, strict=True)]
    speeds = [min(column) for column in zip(*limits, strict=True)]
    for demands, capacity in over:
        used = sum(d * y for d, y in zip(demands, speeds, strict=True))
        if used > capacity:
            # The division above converges from outside: what is left over is scaled away.
            speeds = [y * capacity / used if d else y for d, y in zip(demands, speeds, strict=True)]
    return speeds


class Fluid:
    """The slices of one layout, each draining a queue of segments in integer nanoseconds; no clock of its own."""

    def __init__(self, shares: Shares) -> None:
        count = len(shares.slices)
        self.shares = shares
        self.busy_ns = [0] * count
        self.first_ns: list[int | None] = [None] * count
        """When each slice's first kernel started."""
        self._now = 0
        self._queue: list[list[Segment]] = [[] for _ in range(count)]
        self._left = [0.0] * count
        self._speed = [0.0] * count
        self._running: list[int] = []
        self._blocked: list[tuple[int, int, int]] = []
        self._holds = 0
        """Bit mask of slices whose CTAs are on the SMs."""
        self._arrivals = 0

    @property
    def idle(self) -> bool:
        """Return whether nothing runs or waits."""
        return not self._running and not self._blocked

    def push(self, slice_id: int, segments: Sequence[Segment]) -> None:
        """Append segments to a slice's queue; it starts at once if the slice is idle."""
        queue = self._queue[slice_id]
        was_idle = not queue
        queue.extend(reversed(segments)) if was_idle else queue.__setitem__(slice(0, 0), list(reversed(segments)))
        if was_idle:
            self._start(slice_id, GAP)
            self._solve()

    def load(self, chains: Sequence[Sequence[Segment]]) -> None:
        """Give every slice a queue at once; all slices must be idle."""
        for i, chain in enumerate(chains):
            if chain:
                self._queue[i] = list(reversed(chain))
        for i, chain in enumerate(chains):
            if chain:
                self._start(i, GAP)
        self._solve()

    def next_ns(self) -> int | None:
        """Return the time until some segment ends; None when nothing runs."""
        if not self._running:
            return None
        soonest = min(self._left[i] / self._speed[i] for i in self._running)
        return max(1, ceil(soonest - EPSILON_NS))

    def advance(self, dt_ns: int) -> None:
        """Let time pass, at most until the next segment ends, and start what follows."""
        self._now += dt_ns
        ended: list[int] = []
        for i in self._running:
            self._left[i] -= self._speed[i] * dt_ns
            if self._queue[i][-1].kernel >= 0:
                self.busy_ns[i] += dt_ns
            if self._left[i] <= EPSILON_NS:
                ended.append(i)
        if ended:
            for i in ended:
                self._end(i)
            self._solve()

    def _end(self, i: int) -> None:
        self._running.remove(i)
        kernel = self._queue[i].pop().kernel
        if self.shares.queues and (not self._queue[i] or self._queue[i][-1].kernel != kernel):
            self._holds &= ~(1 << i)
            self._unblock()
        if self._queue[i]:
            self._start(i, kernel)

    def _start(self, i: int, previous_kernel: int) -> None:
        segment = self._queue[i][-1]
        starts_kernel = segment.kernel not in (GAP, previous_kernel)
        if starts_kernel and self.shares.queues:
            if not self.shares.admits(self._holds & ~(1 << i), i):
                self._arrivals += 1
                heappush(self._blocked, (self.shares.slices[i].priority, self._arrivals, i))
                return
            self._holds |= 1 << i
        self._run(i, segment)

    def _run(self, i: int, segment: Segment) -> None:
        if segment.kernel >= 0 and self.first_ns[i] is None:
            self.first_ns[i] = self._now
        self._left[i] = segment.solo_ns
        self._running.append(i)

    def _unblock(self) -> None:
        while self._blocked and self.shares.admits(self._holds, self._blocked[0][2]):
            i = heappop(self._blocked)[2]
            self._holds |= 1 << i
            self._run(i, self._queue[i][-1])

    def _solve(self) -> None:
        # Order by slice, so that equal states give equal sums whatever happened before.
        self._running.sort()
        speeds = rates(self._running, [self._queue[i][-1] for i in self._running], self.shares) if self._running else []
        for i, speed in zip(self._running, speeds, strict=True):
            self._speed[i] = speed
