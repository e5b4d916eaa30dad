"""The device's slices on SimPy: one event per change of what runs, never one per CTA or token."""

from collections.abc import Sequence

import simpy

from ..policies.fluid import Fluid, Segment


class Machine:
    """Steps a `Fluid` in an environment's time.

    A completion is armed with the version of the state it was computed from; pushing more work makes it stale, and a
    stale completion does nothing.
    """

    def __init__(self, env: simpy.Environment, fluid: Fluid) -> None:
        self.fluid = fluid
        self._env = env
        self._since_ns: int = int(env.now)
        self._version = 0
        self._idle: simpy.Event | None = None

    def load(self, chains: Sequence[Sequence[Segment]]) -> simpy.Event | None:
        """Start every slice's chain at once; return the event of the last one's end, None when there is no work."""
        self._since_ns = int(self._env.now)
        self.fluid.load(chains)
        return self._arm()

    def push(self, slice_id: int, segments: Sequence[Segment]) -> simpy.Event | None:
        """Append to one slice's queue while others may run; return the event of the end of all work."""
        self._catch_up()
        self.fluid.push(slice_id, segments)
        return self._arm()

    def _catch_up(self) -> None:
        now = int(self._env.now)
        if now > self._since_ns:
            self.fluid.advance(now - self._since_ns)
            self._since_ns = now

    def _arm(self) -> simpy.Event | None:
        self._version += 1
        dt_ns = self.fluid.next_ns()
        if dt_ns is None:
            return None
        if self._idle is None:
            self._idle = self._env.event()
        version = self._version
        due = self._env.timeout(dt_ns)
        assert due.callbacks is not None
        due.callbacks.append(lambda _: self._complete(version))
        return self._idle

    def _complete(self, version: int) -> None:
        if version != self._version:
            return
        self._catch_up()
        if self._arm() is None and self._idle is not None:
            self._idle.succeed()
            self._idle = None
