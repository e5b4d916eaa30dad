"""A stream on SimPy: jobs in the order of submission, as on the device's launch queue; held against queueing theory."""

from collections import deque
from collections.abc import Generator
from typing import Any

import simpy

Job = Generator[simpy.Event, Any, None]


class Stream:
    """Starts jobs in the order of submission, each as soon as one of `lanes` is free; one lane is a CUDA stream."""

    def __init__(self, env: simpy.Environment, lanes: int = 1) -> None:
        self._env = env
        self._jobs: deque[tuple[Job, simpy.Event]] = deque()
        self._idle: list[simpy.Event] = []
        for _ in range(lanes):
            env.process(self._serve())

    @property
    def waiting(self) -> int:
        """Return the number of jobs that have not started."""
        return len(self._jobs)

    def submit(self, job: Job) -> simpy.Event:
        """Append a job; the event returned triggers when it has ended."""
        done = self._env.event()
        self._jobs.append((job, done))
        if self._idle:
            self._idle.pop().succeed()
        return done

    def _serve(self) -> Job:
        while True:
            while not self._jobs:
                wake = self._env.event()
                self._idle.append(wake)
                yield wake
            job, done = self._jobs.popleft()
            yield from job
            done.succeed()
