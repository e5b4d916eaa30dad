"""Passes of a model on a GPU: what its layers routed and when their slices ran comes back without waiting.

Shape letters: L MoE layers, E experts, S slices, R passes in flight.
"""

from collections import deque
from typing import Any

import numpy as np
import torch

from ..kernels.spec import MAX_SLICES
from ..policies.contract import Plan, SliceLayout
from ..traces.schema import I32, RoutedStep
from .backend import ExecutorError, Finished, Launched
from .cuda import IN_FLIGHT, CudaExecutor, _Running
from .lanes import StreamLanes
from .partition import PartitionError


class CudaPasses(CudaExecutor):
    """The executor on a GPU for layers that a model launches itself."""

    plan: Plan
    """Of the pass under way."""

    def __init__(self) -> None:
        super().__init__(max_tokens=0, energy=False)
        self._pass: tuple[RoutedStep, Any] | None = None
        self._steps: deque[RoutedStep] = deque()

    def _allocate(self) -> None:
        model = self._setup.model
        shape = (IN_FLIGHT, model.num_layers)
        self._counts_LE = torch.zeros(model.num_layers, model.num_experts, dtype=torch.int32, device="cuda")
        self._stamps_LS2 = torch.zeros(model.num_layers, MAX_SLICES, 2, dtype=torch.int64, device="cuda")
        self._counts_RLE = torch.zeros(*shape, model.num_experts, dtype=torch.int32, pin_memory=True)
        self._stamps_RLS2 = torch.zeros(*shape, MAX_SLICES, 2, dtype=torch.int64, pin_memory=True)
        self._running = deque()
        self._rest: list[Finished] = []
        self._ended: dict[int, Any] = {}
        self._num_launched = self._num_finished = 0
        self._lanes: dict[SliceLayout, StreamLanes] = {}

    def launch(self, step: RoutedStep, plan: Plan, bucket: int) -> Launched:
        """Let the pass that follows run under a plan."""
        del bucket
        self.end()
        try:
            if plan.layout not in self._streams:
                self._streams[plan.layout] = self._streams_of(plan.layout)
        except PartitionError as error:
            raise ExecutorError(f"no streams for the plan's layout: {error}") from error
        self.plan = plan
        start = torch.cuda.Event(enable_timing=True)
        submit_ns = self.now_ns()
        start.record()
        self._pass = step, start
        return Launched(submit_ns=submit_ns, reconfigure_ns=0, capture_ns=0)

    def lanes(self, plan: Plan) -> StreamLanes:
        """Return a plan's streams."""
        if plan.layout not in self._lanes:
            sms = [one.sm_count for one in plan.layout.slices]
            self._lanes[plan.layout] = StreamLanes(self._streams[plan.layout], self._stamps_LS2, sms=sms)
        return self._lanes[plan.layout]

    def count(self, layer: int, counts_E: torch.Tensor) -> None:
        """Keep a layer's counts."""
        self._counts_LE[layer].copy_(counts_E)

    def end(self) -> None:
        """Enqueue the way back of the counts and stamps of the pass under way."""
        if self._pass is None:
            return
        (step, start), self._pass = self._pass, None
        slot = self._num_launched % IN_FLIGHT
        end, back = torch.cuda.Event(enable_timing=True), torch.cuda.Event()
        end.record()
        self._counts_RLE[slot].copy_(self._counts_LE, non_blocking=True)
        self._stamps_RLS2[slot].copy_(self._stamps_LS2, non_blocking=True)
        back.record()
        self._ended[self._num_launched] = back
        self._ended.pop(self._num_launched - IN_FLIGHT, None)
        num_slices = self.plan.layout.num_slices
        self._running.append(_Running(step=step.step, start=start, end=end, slot=slot, num_slices=num_slices))
        self._steps.append(step)
        self._num_launched += 1

    def counts_LE(self, index: int) -> I32:
        """Return what a pass routed, waiting for it."""
        counts_LE = super().counts_LE(index)
        place = index - self._num_finished
        if place >= 0:
            self._tell(self._steps[place], counts_LE)
        return counts_LE

    def finished(self, *, wait_for: int) -> list[Finished]:
        """Return the passes that have finished; waits for all up to pass `wait_for`."""
        first = self._num_finished
        done = super().finished(wait_for=wait_for)
        for index in range(first, self._num_finished):
            self._tell(self._steps.popleft(), self._counts_RLE[index % IN_FLIGHT].numpy())
        return done

    @staticmethod
    def _tell(step: RoutedStep, counts_LE: np.ndarray) -> None:
        """Fill in the counts of a step, which were not known when it was submitted."""
        base_LE = step.counts_LE.base
        assert base_LE is not None
        base_LE[...] = counts_LE
