"""The device's slices on SimPy: one event per change of what runs, never one per CTA or token."""

from collections.abc import Sequence

import simpy

from ..policies.fluid import Fluid, Segment


class Machine:
    """Steps a `Fluid` in an environment's time.

    The next completion is armed from the state of the moment; pushing more work arms another one, and a completion
    that is no longer the armed one does nothing.
    """

    def __init__(self, env: simpy.Environment, fluid: Fluid) -> None:
        self.fluid = fluid
        self._env = env
        self._since_ns = int(env.now)
        self._due: simpy.Event | None = None
        self._idle: simpy.Event | None = None

    def load(self, chains: Sequence[Sequence[Segment]]) -> simpy.Event | None:
        """Start every slice's chain at once; return the event of the last one's end, None when there is no work."""
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
        dt_ns = self.fluid.next_ns()
        if dt_ns is None:
            self._due = None
            return None
        if self._idle is None:
            self._idle = self._env.event()
        self._due = due = self._env.timeout(dt_ns)
        due.callbacks.append(self._complete)  # type: ignore[union-attr]
        return self._idle

    def _complete(self, due: simpy.Event) -> None:
        if due is not self._due:
            return
        self._catch_up()
        if self._arm() is None and self._idle is not None:
            self._idle.succeed()
            self._idle = None
