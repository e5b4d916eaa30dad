"""Passes of a model on a GPU: what its layers routed and when their slices ran comes back without waiting.

Shape letters: L MoE layers, E experts, R passes in flight.
"""

from collections import deque
from typing import Any

import torch

from ..policies.contract import Plan, SliceLayout
from ..traces.schema import I32, RoutedStep
from .backend import ExecutorError, Finished, Launched
from .cuda import IN_FLIGHT, CudaExecutor, _event
from .lanes import StreamLanes
from .partition import PartitionError
from .passes import Passes, tell


class CudaPasses(CudaExecutor, Passes):
    """The executor on a GPU for layers that a model launches itself."""

    def __init__(self) -> None:
        super().__init__(max_tokens=0, energy=False)
        self._pass: tuple[RoutedStep, Any] | None = None
        self._steps: deque[RoutedStep] = deque()

    def _allocate(self) -> None:
        model = self._setup.model
        self._allocate_back(torch.zeros(model.num_layers, model.num_experts, dtype=torch.int32, device="cuda"))
        self._lanes: dict[SliceLayout, StreamLanes] = {}

    def launch(self, step: RoutedStep, plan: Plan, bucket: int) -> Launched:
        del bucket
        self.end()
        try:
            self._streams_of(plan.layout)
        except PartitionError as error:
            raise ExecutorError(f"no streams for the plan's layout: {error}") from error
        self.plan, submit_ns = plan, self.now_ns()
        self._pass = step, _event()
        return Launched(submit_ns=submit_ns, reconfigure_ns=0, capture_ns=0)

    def lanes(self, plan: Plan) -> StreamLanes:
        if plan.layout not in self._lanes:
            sms = [one.sm_count for one in plan.layout.slices]
            self._lanes[plan.layout] = StreamLanes(self._streams_of(plan.layout), self._stamps_LS2, sms=sms)
        return self._lanes[plan.layout]

    def count(self, layer: int, counts_E: torch.Tensor) -> None:
        self._counts_LE[layer].copy_(counts_E)

    def end(self) -> None:
        if self._pass is not None:
            (step, start), self._pass = self._pass, None
            self._bring_back(step, start, self.plan)
            self._steps.append(step)

    def counts_LE(self, index: int) -> I32:
        counts_LE = super().counts_LE(index)
        place = index - self._num_finished
        if place >= 0:
            tell(self._steps[place], counts_LE)
        return counts_LE

    def finished(self, *, wait_for: int) -> list[Finished]:
        first = self._num_finished
        done = super().finished(wait_for=wait_for)
        for index in range(first, self._num_finished):
            tell(self._steps.popleft(), self._counts_RLE[index % IN_FLIGHT].numpy())
        return done
