"""The device's side of the simulator: layers one after another, slices beside each other, clock and power as state.

Shape letters: L MoE layers, E routed experts, S slices.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter

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

    start_ns: int
    accounted_ns: int
    """Up to when energy has been accounted for."""
    end_ns: int = 0
    start_ns_LS: list[list[int]] = field(default_factory=list[list[int]])
    busy_ns_LS: list[list[int]] = field(default_factory=list[list[int]])
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
        self._average_w = [(0, self.power.average_w)]
        """When the device of the newest step reached which average power."""

    def power_w(self) -> float:
        """Return the average power up to now."""
        at = bisect_right(self._average_w, self._env.now, key=itemgetter(0))
        return self._average_w[at - 1][1]

    def run(self, launch: Launch) -> Job:
        """Run one step; a job for the stream."""
        needs = self._needs.of(launch.step)
        # One event a step, whatever runs beside what: nothing outside can disturb its layers.
        times = self._layers(launch, needs, int(self._env.now))
        yield self._env.timeout(times.end_ns - times.start_ns)
        self._finish(launch, needs, times)

    def _layers(self, launch: Launch, needs: StepNeeds, start_ns: int) -> _Times:
        work = self._truth.work(launch.plan, launch.step.counts_LE, launch.step.other_L)
        times, now_ns = _Times(start_ns, self._end_ns), start_ns + launch.reconfigure_ns
        self._average_w = self._average_w[-1:]
        self._account(now_ns, now_ns, 0.0, 0.0, times)
        now_ns += work.head_ns(0, self.power.clock)
        last = len(needs.flops_L) - 1
        for layer, flops in enumerate(needs.flops_L):
            fluid = work.slices(layer, self.power.clock)
            times.start_ns_LS.append([now_ns + (first or 0) for first in fluid.first_ns])
            times.busy_ns_LS.append(fluid.busy_ns)
            now_ns += fluid.now_ns
            # What ends one layer and what begins the next is one stretch.
            gap_ns = work.tail_ns(layer) + (work.head_ns(layer + 1, self.power.clock) if layer < last else 0)
            self._account(now_ns, now_ns + gap_ns, work.moved_bytes(layer), flops, times)
            now_ns += gap_ns
        times.end_ns = now_ns
        return times

    def _account(self, now_ns: int, until_ns: int, moved_bytes: float, flops: float, times: _Times) -> None:
        duration_ns, times.accounted_ns = until_ns - times.accounted_ns, until_ns
        times.clock_ns += self.power.clock * duration_ns
        times.joules += self.power.spend(duration_ns, moved_bytes, flops)
        self._average_w.append((now_ns, self.power.average_w))

    def _finish(self, launch: Launch, needs: StepNeeds, times: _Times) -> None:
        span_ns = times.end_ns - self._end_ns
        self.meter.add(launch.step.step, span_ns, times.joules, times.clock_ns / max(1, span_ns))
        idle_ns = times.start_ns - max(self._end_ns, launch.step.arrival_ns or 0)
        self._end_ns = times.end_ns
        record = StepRecord(
            step=launch.step.step,
            plan_id=launch.plan.plan_id,
            bucket=launch.bucket,
            submit_ns=launch.submit_ns,
            start_ns=times.start_ns,
            end_ns=times.end_ns,
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
