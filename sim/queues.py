"""Queueing primitives on SimPy: a stream that runs jobs in order, and a pool of slots handed out by priority.

Both are what the backend runs on, and both are held against queueing theory in the tests. SimPy's own
`PriorityResource` sorts its whole queue on every request; here a heap keeps the order.
"""

from collections import deque
from collections.abc import Generator
from heapq import heappop, heappush
from typing import Any

import simpy

Job = Generator[simpy.Event, Any, None]


class Stream:
    """Runs jobs one after another in the order of submission, as a CUDA stream does."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._jobs: deque[tuple[Job, simpy.Event]] = deque()
        self._wake: simpy.Event | None = None
        env.process(self._run())

    @property
    def waiting(self) -> int:
        """Return the number of jobs that have not started."""
        return len(self._jobs)

    def submit(self, job: Job) -> simpy.Event:
        """Append a job; the event returned triggers when it has ended."""
        done = self._env.event()
        self._jobs.append((job, done))
        if self._wake is not None:
            self._wake.succeed()
            self._wake = None
        return done

    def _run(self) -> Job:
        while True:
            if not self._jobs:
                self._wake = self._env.event()
                yield self._wake
            job, done = self._jobs.popleft()
            yield from job
            done.succeed()


class SlotPool:
    """A number of equal slots; who waits is served by priority (lower first), then by arrival."""

    def __init__(self, env: simpy.Environment, slots: int) -> None:
        self._env = env
        self._free = slots
        self._waiting: list[tuple[int, int, simpy.Event]] = []
        self._arrivals = 0

    @property
    def waiting(self) -> int:
        """Return the number of requests that hold no slot yet."""
        return len(self._waiting)

    def request(self, priority: int = 0) -> simpy.Event:
        """Ask for a slot; the event returned triggers when it is granted."""
        granted = self._env.event()
        if self._free:
            self._free -= 1
            granted.succeed()
        else:
            self._arrivals += 1
            heappush(self._waiting, (priority, self._arrivals, granted))
        return granted

    def release(self) -> None:
        """Give a slot back."""
        if self._waiting:
            heappop(self._waiting)[2].succeed()
        else:
            self._free += 1
