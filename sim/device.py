"""The device's side of the simulator: layers one after another, slices beside each other, clock and power as state.

Shape letters: L MoE layers, E routed experts, S slices.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simpy

from ..policies.contract import Plan, StepRecord
from ..policies.cost import CostModel
from ..policies.needs import Needs, StepNeeds
from ..traces.schema import RoutedStep
from .power import EnergyMeter, Power
from .queues import Job


@dataclass(slots=True)
class Launch:
    """A step on its way through the device."""

    step: RoutedStep
    plan: Plan
    bucket: int
    submit_ns: int
    control_ns: int
    """Host time spent observing and deciding since the launch before."""
    reconfigure_ns: int
    capture_ns: int
    fallback: str | None
    done: simpy.Event | None = None


@dataclass(slots=True)
class _Times:
    """What the layers of a step took."""

    start_ns_LS: list[list[int]]
    busy_ns_LS: list[list[int]]
    accounted_ns: int
    """Up to when energy has been accounted for."""
    joules: float = 0.0
    clock_ns: float = 0.0
    """Sum of clock times duration."""


class Device:
    """Runs launches in the order of its stream."""

    def __init__(self, env: simpy.Environment, truth: CostModel, on_end: Callable[[StepRecord], None]) -> None:
        self._env, self._truth, self._on_end = env, truth, on_end
        self.power = Power(truth.device)
        self.meter = EnergyMeter(truth.device)
        self._needs = Needs(truth.model)
        self._end_ns = 0

    def run(self, launch: Launch) -> Job:
        """Run one step; a job for the stream."""
        env, start_ns = self._env, int(self._env.now)
        times = _Times([], [], accounted_ns=self._end_ns)
        if launch.reconfigure_ns:
            yield env.timeout(launch.reconfigure_ns)
        self._account(int(env.now), 0.0, 0.0, times)
        work = self._truth.work(launch.plan, launch.step.counts_LE, launch.step.other_L)
        needs = self._needs.of(launch.step)
        last = len(needs.flops_L) - 1
        yield env.timeout(work.head_ns(0, self.power.clock))
        for layer, flops in enumerate(needs.flops_L):
            # One event a layer, whatever runs beside what: nothing outside can disturb it.
            fluid, entered_ns = work.slices(layer, self.power.clock), int(env.now)
            times.start_ns_LS.append([entered_ns + (first or 0) for first in fluid.first_ns])
            times.busy_ns_LS.append(fluid.busy_ns)
            if fluid.now_ns:
                yield env.timeout(fluid.now_ns)
            # What ends one layer and what begins the next is one stretch, and one event.
            gap_ns = work.tail_ns(layer) + (work.head_ns(layer + 1, self.power.clock) if layer < last else 0)
            self._account(int(env.now) + gap_ns, work.moved_bytes(layer), flops, times)
            yield env.timeout(gap_ns)
        self._finish(launch, start_ns, needs, times)

    def _account(self, until_ns: int, moved_bytes: float, flops: float, times: _Times) -> None:
        duration_ns, times.accounted_ns = until_ns - times.accounted_ns, until_ns
        times.clock_ns += self.power.clock * duration_ns
        times.joules += self.power.spend(duration_ns, moved_bytes, flops)

    def _finish(self, launch: Launch, start_ns: int, needs: StepNeeds, times: _Times) -> None:
        end_ns = int(self._env.now)
        span_ns = end_ns - self._end_ns
        self.meter.add(launch.step.step, span_ns, times.joules, times.clock_ns / max(1, span_ns))
        idle_ns = start_ns - max(self._end_ns, launch.step.arrival_ns or 0)
        self._end_ns = end_ns
        record = StepRecord(
            step=launch.step.step,
            plan_id=launch.plan.plan_id,
            bucket=launch.bucket,
            submit_ns=launch.submit_ns,
            start_ns=start_ns,
            end_ns=end_ns,
            start_ns_LS=np.array(times.start_ns_LS, dtype=np.int64),
            busy_ns_LS=np.array(times.busy_ns_LS, dtype=np.int64),
            reconfigure_ns=launch.reconfigure_ns,
            capture_ns=launch.capture_ns,
            control_stall_ns=max(0, min(idle_ns, launch.control_ns)),
            hbm_bytes=needs.hbm_bytes,
            flops=needs.flops,
            fallback=launch.fallback,
        )
        self._on_end(record)
