"""The slices of a layer as fluids: which segments run, and when the next one ends.

The closed form and the simulator both run a `Fluid`, so that they agree to the nanosecond when nothing else happens.
"""

from bisect import insort
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from math import ceil
from typing import NamedTuple

from .rates import GAP, Segment, rates
from .shares import Shares

EPSILON_NS = 1e-6


class Theft(NamedTuple):
    """One slice's offer to drain another's queue of one product."""

    segment: Segment
    """The whole queue at the thief's own cost."""
    victim_ns: float
    """The whole queue alone at its owner's."""
    least_ns: float
    """Nothing smaller is worth taking: one tile."""


Thefts = Callable[[int, int, int], Theft | None]
"""What a thief offers a victim for a kernel; None where the victim's queue is empty."""


class Fluid:
    """The slices of one layout, each draining a queue of segments in integer nanoseconds; no clock of its own."""

    def __init__(self, shares: Shares, thefts: Thefts | None = None) -> None:
        count = len(shares.slices)
        self.shares = shares
        self.now_ns = 0
        self.busy_ns = [0] * count
        """Of each slice's kernels, gaps between them left out."""
        self.first_ns: list[int | None] = [None] * count
        """When each slice's first kernel started."""
        self._thefts = thefts
        self._contested = shares.queues or thefts is not None
        """Whether the end of a kernel concerns other slices."""
        self._queue: list[list[Segment]] = [[] for _ in range(count)]
        """Last first."""
        self._left = [0.0] * count
        self._since = [0] * count
        """When each slice's current segment started."""
        self._running: list[int] = []
        """Rising, so that equal states give equal sums whatever happened before."""
        self._blocked: list[tuple[int, int, int]] = []
        self._holds = 0
        """Bit mask of slices whose CTAs are on the SMs."""
        self._arrivals = 0

    def run(self, chains: Sequence[Sequence[Segment]]) -> int:
        """Drain a chain on every slice, all from now on, and return how long it takes."""
        if len(chains) == 1:
            return self._run_alone(chains[0])
        for i, chain in enumerate(chains):
            self._queue[i] = list(chain[::-1])
        for i, chain in enumerate(chains):
            if chain:
                self._start(i, GAP)
        while self._running:
            self.now_ns += self._pass()
            for i in [i for i in self._running if self._left[i] <= EPSILON_NS]:
                self._end(i)
        return self.now_ns

    def _run_alone(self, chain: Sequence[Segment]) -> int:
        """Drain the only chain: nobody shares, waits or steals, so that each segment takes what it takes alone."""
        for segment in chain:
            dt_ns = ceil(segment.solo_ns - EPSILON_NS) or 1
            if segment.kernel >= 0:
                if self.first_ns[0] is None:
                    self.first_ns[0] = self.now_ns
                self.busy_ns[0] += dt_ns
            self.now_ns += dt_ns
        return self.now_ns

    def _pass(self) -> int:
        """Let time pass until the next segment ends, and return how much."""
        running, left, speeds = self._running, self._left, self._speeds()
        # Lists, because min over a generator costs twice as much.
        if speeds is None:
            dt_ns = ceil(min([left[i] for i in running]) - EPSILON_NS) or 1
            for i in running:
                left[i] -= dt_ns
        else:
            dt_ns = ceil(min([left[i] / y for i, y in zip(running, speeds, strict=True)]) - EPSILON_NS) or 1
            for i, y in zip(running, speeds, strict=True):
                left[i] -= y * dt_ns
        return dt_ns

    def _end(self, i: int) -> None:
        queue = self._queue[i]
        kernel = queue.pop().kernel
        if kernel >= 0:
            self.busy_ns[i] += self.now_ns - self._since[i]
        if not self._contested and queue:
            self._begin(i)
            return
        self._running.remove(i)
        if self._contested and kernel >= 0 and (not queue or queue[-1].kernel != kernel):
            self._end_kernel(i, kernel)
        if queue:
            self._start(i, kernel)

    def _end_kernel(self, i: int, kernel: int) -> None:
        if self._thefts:
            self._steal(i, kernel, self._thefts)
            if self._queue[i] and self._queue[i][-1].kernel == kernel:
                return
        if self.shares.queues:
            self._holds &= ~(1 << i)
            self._unblock()

    def _steal(self, i: int, kernel: int, thefts: Thefts) -> None:
        """Take a part of the longest queue left of the same product, so that both slices end together."""
        rest, victim, theft = 0.0, i, None
        for j in self._running:
            if self._queue[j][-1].kernel == kernel:
                left = self._left[j] + sum(s.solo_ns for s in self._queue[j][:-1] if s.kernel == kernel)
                if left > rest and (offer := thefts(i, j, kernel)):
                    rest, victim, theft = left, j, offer
        if theft is None:
            return
        whole = theft.segment.solo_ns * rest / theft.victim_ns
        part = rest / (rest + whole)
        if part * rest < theft.least_ns:
            return
        self._left[victim] *= 1 - part
        queue = self._queue[victim]
        for at, segment in enumerate(queue[:-1]):
            if segment.kernel == kernel:
                queue[at] = segment._replace(solo_ns=segment.solo_ns * (1 - part))
        self._queue[i].append(theft.segment._replace(solo_ns=whole * part))

    def _start(self, i: int, previous_kernel: int) -> None:
        if self._contested and self.shares.queues and self._queue[i][-1].kernel not in (GAP, previous_kernel):
            if self._blocked or not self.shares.admits(self._holds & ~(1 << i), i):
                self._arrivals += 1
                heappush(self._blocked, (self.shares.slices[i].stream_priority, self._arrivals, i))
                return
            self._holds |= 1 << i
        self._run(i)

    def _run(self, i: int) -> None:
        insort(self._running, i)
        self._begin(i)

    def _begin(self, i: int) -> None:
        segment = self._queue[i][-1]
        if segment.kernel >= 0 and self.first_ns[i] is None:
            self.first_ns[i] = self.now_ns
        self._left[i] = segment.solo_ns
        self._since[i] = self.now_ns

    def _unblock(self) -> None:
        while self._blocked and self.shares.admits(self._holds, self._blocked[0][2]):
            i = heappop(self._blocked)[2]
            self._holds |= 1 << i
            self._run(i)

    def _speeds(self) -> list[float] | None:
        """Return the speed of each running segment; None: all run at speed 1."""
        queue, running = self._queue, self._running
        working = [i for i in running if queue[i][-1].kernel >= 0]
        if len(working) < 2:
            return None
        speeds = rates(working, [queue[i][-1] for i in working], self.shares)
        if speeds is None or len(working) == len(running):
            return speeds
        of_slice = dict(zip(working, speeds, strict=True))
        return [of_slice.get(i, 1.0) for i in running]
