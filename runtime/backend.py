"""The runtime's backend: plans carried out by an executor, a GPU's or a machine's without one.

The executor owns the device and its clock; this file owns the contract: when a plan takes effect, which counts a
decision sees, and what runs when a layout cannot.

Shape letters: L MoE layers, E routed experts, S slices.
"""

import time
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np

from ..policies.contract import EnergyWindow, Observation, Plan, Setup, SliceLayout, StepRecord
from ..policies.control import ControlState
from ..policies.layouts import fallback_plan
from ..policies.needs import Needs
from ..traces.schema import I32, I64, RoutedStep

MOST_AHEAD = 64
"""Steps launched and not finished; the host waits for the oldest then."""


class ExecutorError(RuntimeError):
    """A plan that is possible could not be carried out here; the sentence says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """What launching a step took, ns on the executor's clock."""

    submit_ns: int
    reconfigure_ns: int
    """On the device, before the step."""
    capture_ns: int
    """On the host, before the launch."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Finished:
    """When a step ran, ns on the executor's clock."""

    start_ns: int
    end_ns: int
    start_ns_LS: I64
    busy_ns_LS: I64


class Executor(ABC):
    """Carries steps out in the order of launching, by the host's clock unless it has one of its own."""

    _zero_ns = 0
    """Of the host's clock, where the run begins."""

    @abstractmethod
    def open(self, setup: Setup, layouts: Sequence[SliceLayout]) -> None:
        """Prepare the layouts; the clock starts at 0."""

    def now_ns(self) -> int:
        """Return the host's time."""
        return time.perf_counter_ns() - self._zero_ns

    def wait_until(self, ns: int) -> None:
        """Let host time pass."""
        time.sleep(max(0, ns - self.now_ns()) / 1e9)

    def decided(self) -> None:  # noqa: B027
        """Take note of a decision: where time is reckoned, its declared time passes."""

    @abstractmethod
    def launch(self, step: RoutedStep, plan: Plan, bucket: int) -> Launched:
        """Enqueue a step; never waits for the device.

        Raises:
            ExecutorError: the plan cannot be carried out here; nothing has changed.
        """

    @abstractmethod
    def counts_LE(self, index: int) -> I32:
        """Return the tokens per expert that the device counted in the launch of that number, waiting for them."""

    @abstractmethod
    def finished(self, *, wait_for: int) -> list[Finished]:
        """Return the steps that have finished and were not returned; waits for all up to launch `wait_for`."""

    def power_w(self) -> float | None:
        """Return the device's power; None: nothing tells it."""
        return None

    def close(self) -> list[EnergyWindow]:
        """Leave the device as found, and return the windows of what drew power."""
        return []


@dataclass(frozen=True, slots=True)
class _Running:
    step: RoutedStep
    plan: Plan
    bucket: int
    launched: Launched
    control_stall_ns: int
    fallback: str | None


class RuntimeBackend:
    """A policy's plans on a real executor, for one run."""

    foresight: ClassVar[bool] = False

    def __init__(self, executor: Executor, *, bucket_of: Callable[[int], int]) -> None:
        self.executor = executor
        self.bucket_of = bucket_of
        self.num_fallbacks = 0
        """Steps that ran unsliced because their plan could not be carried out."""
        self.energy: tuple[EnergyWindow, ...] = ()
        """What closing found, also where a run was stopped."""
        self._running: deque[_Running] = deque()
        self._finished: list[StepRecord] = []
        self._newest: StepRecord | None = None
        self._stall_ns = 0

    def open(self, setup: Setup, layouts: Sequence[SliceLayout]) -> None:
        """Prepare the layouts and the unsliced one."""
        self._setup = setup
        self._control = ControlState(setup)
        self._unsliced = fallback_plan(setup)
        self._needs = Needs(setup.model)
        self.executor.open(setup, tuple(dict.fromkeys((*layouts, self._unsliced.layout))))

    def observe(self) -> Observation:
        """Return what the policy may see, once the counts it is due are there."""
        visible = self._control.newest_visible
        if visible >= 0:
            before_ns = self.executor.now_ns()
            self._check_counts(visible)
            self._stall_ns += self.executor.now_ns() - before_ns
        self._collect(-1)
        return self._control.observation(
            now_ns=self.executor.now_ns(),
            newest=self._newest,
            power_w=self.executor.power_w(),
            queued_tokens=sum(one.step.num_tokens for one in self._running),
        )

    def _check_counts(self, index: int) -> None:
        """Wait for a step's counts; what the device counted must be what the trace says."""
        counted_LE, said_LE = self.executor.counts_LE(index), self._control.counts_LE(index)
        if not np.array_equal(counted_LE, said_LE):
            layer, expert = np.argwhere(counted_LE != said_LE)[0]
            raise ExecutorError(
                f"step {index}: the device routed {counted_LE[layer, expert]} tokens to expert {expert} of layer "
                f"{layer}, the trace says {said_LE[layer, expert]}; the trace's ids and counts must agree"
            )

    def apply(self, plan: Plan) -> None:
        """Check a plan and let it take effect `delay_steps` after the step it was decided at.

        Raises:
            PlanError: the device cannot hold the plan.
        """
        self._control.decide(plan)
        self.executor.decided()

    def submit(self, step: RoutedStep) -> None:
        """Enqueue one step; the host waits for its arrival alone, and for room in the launch queue."""
        plan, fallback = self._control.submit(step.counts_LE, step.step)
        if step.arrival_ns is not None:
            self.executor.wait_until(step.arrival_ns)
        if len(self._running) >= MOST_AHEAD:
            self._collect(self._control.num_submitted - 1 - MOST_AHEAD)
        bucket = self.bucket_of(step.num_tokens)
        try:
            launched = self.executor.launch(step, plan, bucket)
        except ExecutorError as error:
            if plan.layout == self._unsliced.layout:
                raise
            plan, fallback = self._unsliced, str(error)
            self.num_fallbacks += 1
            if self.num_fallbacks == 1:
                warnings.warn(f"step {step.step}: {error}; running unsliced", stacklevel=2)
            launched = self.executor.launch(step, plan, bucket)
        self._running.append(_Running(step, plan, bucket, launched, self._stall_ns, fallback))
        self._stall_ns = 0

    def drain(self, *, wait: bool = False) -> list[StepRecord]:
        """Return the finished steps, in order; all of them when `wait`."""
        if self._running:
            self._collect(self._control.num_submitted - 1 if wait else -1)
        finished, self._finished = self._finished, []
        return finished

    def _collect(self, wait_for: int) -> None:
        for done in self.executor.finished(wait_for=wait_for):
            run = self._running.popleft()
            # Not before: a step of a model that generates has counts only once it has run.
            needs = self._needs.of(run.step)
            self._newest = StepRecord(
                step=run.step.step,
                plan_id=run.plan.plan_id,
                bucket=run.bucket,
                **{one.name: getattr(run.launched, one.name) for one in fields(Launched)},
                **{one.name: getattr(done, one.name) for one in fields(Finished)},
                control_stall_ns=run.control_stall_ns,
                hbm_bytes=needs.hbm_bytes,
                flops=needs.flops,
                fallback=run.fallback,
            )
            self._finished.append(self._newest)

    def close(self) -> list[EnergyWindow]:
        """Finish, leave the device as found, and return the energy windows."""
        self.energy = tuple(self.executor.close())
        return list(self.energy)
