"""Passes of a model on a GPU: what its layers routed and when their slices ran comes back without waiting.

Shape letters: L MoE layers, E experts, R passes in flight.
"""

from collections import deque

import torch

from ..policies.contract import Plan, SliceLayout
from ..traces.schema import I32, RoutedStep
from .backend import ExecutorError, Finished, Launched
from .cuda import IN_FLIGHT, CudaExecutor
from .lanes import StreamLanes, stamp_kernel
from .partition import PartitionError
from .passes import Passes, tell


class CudaPasses(CudaExecutor, Passes):
    """The executor on a GPU for layers that a model launches itself."""

    def __init__(self) -> None:
        super().__init__(max_tokens=0, energy=False)
        self._pass: RoutedStep | None = None
        self._steps: deque[RoutedStep] = deque()

    def _allocate(self) -> None:
        self._allocate_back(self._setup.model.num_experts)
        self._slot_R = torch.arange(IN_FLIGHT, dtype=torch.int32, device="cuda").split(1)
        self._lanes: dict[SliceLayout, StreamLanes] = {}

    def launch(self, step: RoutedStep, plan: Plan, bucket: int) -> Launched:
        del bucket
        self.end()
        try:
            self._streams_of(plan.layout)
        except PartitionError as error:
            raise ExecutorError(f"no streams for the plan's layout: {error}") from error
        self.plan, submit_ns = plan, self.now_ns()
        self._pass = step
        stamp_kernel[(1,)](self._back.begin)
        return Launched(submit_ns=submit_ns, reconfigure_ns=0, capture_ns=0)

    def lanes(self, plan: Plan) -> StreamLanes:
        if plan.layout not in self._lanes:
            sms = [one.sm_count for one in plan.layout.slices]
            self._lanes[plan.layout] = StreamLanes(self._streams_of(plan.layout), self._back.stamps_LS2, sms=sms)
        return self._lanes[plan.layout]

    def count(self, layer: int, counts_E: torch.Tensor) -> None:
        self._back.counts_LE[layer].copy_(counts_E)

    def end(self) -> None:
        if self._pass is not None:
            step, self._pass = self._pass, None
            stamp_kernel[(1,)](self._back.end)
            self._back.bring(self._slot_R[self._num_launched % IN_FLIGHT])
            self._take_note(step, self.plan)
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
            tell(self._steps.popleft(), self._back.counts(index % IN_FLIGHT))
        return done
