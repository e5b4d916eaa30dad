"""A policy beside a model that runs by itself: its forward passes are the steps, and plans apply to its layers.

Counts of a pass are known once its layers have routed, so a decision sees those of passes before it. The executors
here do not run steps: they take note of what the model's layers run, by host time or by the device's.

Shape letters: L MoE layers, E routed experts, S slices.
"""

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..policies.contract import Plan, Policy, Setup, SliceLayout, StepRecord
from ..policies.loop import Loop
from ..traces.schema import I32, RoutedStep
from .backend import Executor, Finished, Launched, RuntimeBackend

if TYPE_CHECKING:
    import torch

    from ..kernels.layer import Beside


class PassLanes(Protocol):
    """Where the slices of a layer run, and that takes note of when."""

    def enter(self, layer: int) -> None: ...

    def beside(self, parts: Sequence[Callable[[], None]]) -> None: ...


class Passes(Executor):
    """An executor of passes that a model runs."""

    plan: Plan
    """Of the pass under way."""

    @abstractmethod
    def lanes(self, plan: Plan) -> PassLanes:
        """Return where a plan's slices run."""

    @abstractmethod
    def count(self, layer: int, counts_E: "torch.Tensor") -> None:
        """Keep the tokens per expert of a layer of the pass under way; nothing waits."""

    @abstractmethod
    def end(self) -> None: ...


def tell(step: RoutedStep, counts_LE: I32) -> None:
    """Fill in the counts of a step of `Steering`, which were not known when it was submitted."""
    base_LE = step.counts_LE.base
    assert base_LE is not None
    base_LE[...] = counts_LE


class Steering:
    """One policy that decides for a model's passes."""

    def __init__(
        self, policy: Policy[Any], passes: Passes, setup: Setup, *, on_record: Callable[[StepRecord], object]
    ) -> None:
        """Start the policy; one that fails later is replaced by the unsliced plan, with one warning.

        Raises:
            ValueError: the policy foresees, or is to see counts of a pass that has not run.
        """
        control = setup.control
        if control.count_lag_steps < 1 <= control.delay_steps:
            raise ValueError("control: count_lag_steps 0 asks for counts of a pass before it has run; give 1 or more")
        self.setup, self.plan, self.passes = setup, None, passes
        self._backend = RuntimeBackend(passes, bucket_of=lambda num_tokens: num_tokens)
        self._loop = Loop(policy, self._backend, setup, on_record=on_record, on_policy_error="unsliced")

    @property
    def policy_errors(self) -> int:
        """Decisions replaced by the unsliced plan."""
        return self._loop.policy_errors

    def enter(self, layer: int, num_tokens: int) -> tuple[Plan, "Beside"]:
        """Return the plan of a layer's launch and what places its slices; layer 0 begins a pass."""
        if layer == 0:
            shape = (self.setup.model.num_layers, self.setup.model.num_experts)
            step = RoutedStep(
                step=self._loop.num_steps,
                phase="mixed",
                counts_LE=np.zeros(shape, dtype=np.int32).view(),
                num_tokens=num_tokens,
            )
            self._loop.submit(step)
        plan = self.passes.plan
        lanes = self.passes.lanes(plan)
        lanes.enter(layer)
        return plan, lanes.beside

    def leave(self, layer: int, counts_E: "torch.Tensor") -> None:
        """Keep what a layer routed; the last layer ends the pass."""
        self.passes.count(layer, counts_E)
        if layer == self.setup.model.num_layers - 1:
            self.passes.end()

    def close(self) -> None:
        """Hand over the records of all passes, and leave the device as found."""
        try:
            self.passes.end()
            self._loop.drain(wait=True)
        finally:
            self._backend.close()


class TimedInTurn:
    """Lanes without a GPU: slices one after another, timed by the host's clock."""

    def __init__(self, now_ns: Callable[[], int], num_layers: int, num_slices: int) -> None:
        self._now_ns = now_ns
        self.spans_LS2 = np.zeros((num_layers, num_slices, 2), dtype=np.int64)
        """When each slice of a layer began and ended."""

    def enter(self, layer: int) -> None:
        self._span_S2 = self.spans_LS2[layer]

    def beside(self, parts: Sequence[Callable[[], None]]) -> None:
        for span_2, part in zip(self._span_S2, parts, strict=True):
            span_2[0] = span_2[0] or self._now_ns()
            part()
            span_2[1] = self._now_ns()


class HostPasses(Passes):
    """Passes on a host without a GPU, in the host's time."""

    def open(self, setup: Setup, layouts: Sequence[SliceLayout]) -> None:
        del layouts
        self._model, self._zero_ns = setup.model, time.perf_counter_ns()
        self._pass: tuple[RoutedStep, int, TimedInTurn] | None = None
        # As far back as a decision may ask.
        self._counts: deque[I32] = deque(maxlen=setup.control.count_lag_steps + 2)
        self._num_ended = 0
        self._running: list[Finished] = []

    def launch(self, step: RoutedStep, plan: Plan, bucket: int) -> Launched:
        del bucket
        self.end()
        self.plan, now_ns = plan, self.now_ns()
        self._pass = step, now_ns, TimedInTurn(self.now_ns, self._model.num_layers, plan.layout.num_slices)
        self._counts_LE = np.zeros_like(step.counts_LE)
        return Launched(submit_ns=now_ns, reconfigure_ns=0, capture_ns=0)

    def lanes(self, plan: Plan) -> PassLanes:
        del plan
        assert self._pass is not None
        return self._pass[2]

    def count(self, layer: int, counts_E: "torch.Tensor") -> None:
        self._counts_LE[layer] = counts_E.numpy()

    def end(self) -> None:
        if self._pass is None:
            return
        (step, start_ns, lanes), self._pass = self._pass, None
        tell(step, self._counts_LE)
        self._counts.append(step.counts_LE)
        self._num_ended += 1
        start_ns_LS, end_ns_LS = np.moveaxis(lanes.spans_LS2, 2, 0)
        times = {"start_ns_LS": start_ns_LS, "busy_ns_LS": end_ns_LS - start_ns_LS}
        self._running.append(Finished(start_ns=start_ns, end_ns=self.now_ns(), **times))

    def counts_LE(self, index: int) -> I32:
        return self._counts[index - self._num_ended]

    def finished(self, *, wait_for: int) -> list[Finished]:
        del wait_for
        done, self._running = self._running, []
        return done
