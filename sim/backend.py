"""The simulated GPU: a `Backend` whose truth is a `CostModel` and whose clock is SimPy's.

The host is the caller: its waits, decisions and launches pass by running the environment, while the device's stream
runs what was launched before. Time is integer nanoseconds; nothing here reads a clock, so equal inputs give equal
records.

Shape letters: H steps of history, L MoE layers, E routed experts, S slices.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar

import simpy

from ..policies.contract import EnergyWindow, Observation, Plan, Setup, SliceLayout, StepRecord
from ..policies.control import ControlState, Graphs
from ..policies.cost import CostModel
from ..policies.layouts import fallback_plan
from ..traces.schema import RoutedStep, next_power_of_two
from .device import Device, Launch
from .queues import Stream

MAX_AHEAD = 64
"""Steps launched and not finished; a full launch queue makes the host wait."""


class SimBackend:
    """Carries plans out in simulated time."""

    foresight: ClassVar[bool] = True

    def __init__(self, truth: CostModel, *, bucket_of: Callable[[int], int] = next_power_of_two) -> None:
        if truth.detail != "tiles":
            raise ValueError(f"truth has detail {truth.detail!r}; the simulator needs 'tiles', pass such a CostModel")
        self.truth = truth
        self.bucket_of = bucket_of

    def open(self, setup: Setup, layouts: Sequence[SliceLayout]) -> None:
        """Start at time 0 with the layouts captured and the unsliced plan in effect.

        Raises:
            ValueError: the setup's model or device is not the one that the truth describes.
        """
        if (setup.model, setup.device.name) != (self.truth.model, self.truth.device.name):
            raise ValueError(
                f"setup has model {setup.model.name!r} on {setup.device.name}, the truth describes "
                f"{self.truth.model.name!r} on {self.truth.device.name}; build both from the same model and device"
            )
        self._setup = setup
        self._control = ControlState(setup)
        self._env = simpy.Environment()
        self._stream = Stream(self._env)
        self._graphs = Graphs(setup, (*layouts, fallback_plan(setup).layout))
        self._device = Device(self._env, self.truth, self._ended)
        self._running: deque[Launch] = deque()
        self._finished: list[StepRecord] = []
        self._newest: StepRecord | None = None
        self._broken = False
        self._control_ns = 0

    @property
    def now_ns(self) -> int:
        """Return the host's time since step 0."""
        return int(self._env.now)

    def observe(self) -> Observation:
        """Return what the policy may see, once the counts it is due are there."""
        before = self.now_ns
        if not self._setup.control.free_switches:
            self._wait_for(self._control.newest_visible)
        self._control_ns += self.now_ns - before
        return self._control.observation(
            now_ns=self.now_ns,
            newest=self._newest,
            power_w=self._device.power_w(),
            queued_tokens=sum(launch.step.num_tokens for launch in self._running),
        )

    def _wait_for(self, step: int) -> None:
        """Let time pass until a step has finished."""
        while self._running and self._running[0].step.step <= step:
            self._run_until(self._running[0].done)

    def _run_until(self, until: simpy.Event | int | None) -> None:
        try:
            self._env.run(until=until)
        except BaseException:
            # A step that failed or was interrupted never ends: closing must not wait for it.
            self._broken = True
            raise

    def apply(self, plan: Plan) -> None:
        """Check a plan, charge its decision, and let it take effect `delay_steps` after the step it was decided at.

        Raises:
            ValueError: the device cannot hold the plan.
        """
        self._control.decide(plan)
        plan_ns = self._setup.control.plan_ns
        self._control_ns += plan_ns
        self._pass_ns(plan_ns)

    def _pass_ns(self, ns: int) -> None:
        if ns > 0:
            self._run_until(self.now_ns + ns)

    def submit(self, step: RoutedStep) -> None:
        """Launch one step; the host waits for its arrival, and for room in the launch queue.

        Raises:
            ValueError: the step's counts are not those of the setup's model.
        """
        plan, fallback = self._control.submit(step.counts_LE, step.step)
        if step.arrival_ns is not None:
            self._pass_ns(step.arrival_ns - self.now_ns)
        if len(self._running) >= MAX_AHEAD:
            self._run_until(self._running[0].done)
        bucket = self.bucket_of(step.num_tokens)
        reconfigure_ns, capture_ns = self._graphs.change_to(plan, bucket)
        self._pass_ns(capture_ns + self._setup.device.graph_launch_ns)
        launch = Launch(
            step=step,
            plan=plan,
            bucket=bucket,
            submit_ns=self.now_ns,
            control_ns=self._control_ns,
            reconfigure_ns=reconfigure_ns,
            capture_ns=capture_ns,
            fallback=fallback,
        )
        self._running.append(launch)
        launch.done = self._stream.submit(self._device.run(launch))
        self._control_ns = 0

    def drain(self, *, wait: bool = False) -> list[StepRecord]:
        """Return the finished steps, in order; all of them when `wait`."""
        if wait:
            self._wait_for(self._control.num_submitted)
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> list[EnergyWindow]:
        """Finish and return the energy windows; only a run of less than 2 s has a shorter one."""
        if not self._broken:
            self._wait_for(self._control.num_submitted)
        return self._device.meter.windows(self._control.num_submitted - 1)

    def _ended(self, record: StepRecord) -> None:
        self._running.popleft()
        self._finished.append(record)
        self._newest = record
