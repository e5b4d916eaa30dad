"""A policy beside a model that runs by itself: its forward passes are the steps, and plans apply to its layers.

Counts of a pass are known once its layers have routed, so a decision sees those of passes before it. The executors
here do not run steps: they take note of what the model's layers run, by host time or by the device's.

Shape letters: L MoE layers, E routed experts, S slices.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..policies.contract import EnergyWindow, Plan, Policy, Setup, SliceLayout, StepRecord
from ..policies.loop import Loop
from ..traces.schema import I32, RoutedStep
from .backend import Executor, Finished, Launched, RuntimeBackend
from .layers import Lanes

if TYPE_CHECKING:
    import torch


class PassLanes(Lanes, Protocol):
    """Lanes that note when the slices of a layer ran."""

    def enter(self, layer: int) -> None:
        """Go on with a layer's slices."""
        ...


class Passes(Executor, Protocol):
    """An executor of passes that a model runs."""

    def lanes(self, plan: Plan) -> PassLanes:
        """Return where a plan's slices run."""
        ...

    def count(self, layer: int, counts_E: "torch.Tensor") -> None:
        """Keep the tokens per expert of a layer of the pass under way; nothing waits."""
        ...

    def end(self) -> None:
        """End the pass under way."""
        ...


class Steering:
    """One policy that decides for a model's passes."""

    def __init__(
        self,
        policy: Policy[Any],
        passes: Passes,
        setup: Setup,
        *,
        on_record: Callable[[StepRecord], None],
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

    def enter(self, layer: int, num_tokens: int) -> tuple[Plan, PassLanes]:
        """Return the plan of a layer's launch and where it runs; layer 0 begins a pass."""
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
        return plan, lanes

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

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self.spans: dict[tuple[int, int], list[int]] = {}
        """When each (layer, slice) began and ended."""

    def enter(self, layer: int) -> None:
        """Go on with a layer's slices."""
        self._layer = layer

    def beside(self, parts: list[Callable[[], None]]) -> None:
        """Run the parts one after another."""
        for slice_id, part in enumerate(parts):
            begin_ns = self._now_ns()
            part()
            span = self.spans.setdefault((self._layer, slice_id), [begin_ns, 0])
            span[1] = self._now_ns()


class HostPasses:
    """Passes on a host without a GPU, in the host's time."""

    plan: Plan
    """Of the pass under way."""

    def open(self, setup: Setup, layouts: Sequence[SliceLayout]) -> None:
        """Start the clock; layouts need nothing here."""
        del layouts
        self._model, self._zero_ns = setup.model, time.perf_counter_ns()
        self._pass: tuple[RoutedStep, int, TimedInTurn] | None = None
        # As far back as a decision may ask.
        self._counts: deque[I32] = deque(maxlen=setup.control.count_lag_steps + 2)
        self._num_ended = 0
        self._running: deque[Finished] = deque()

    def now_ns(self) -> int:
        """Return the host's time since the start."""
        return time.perf_counter_ns() - self._zero_ns

    def wait_until(self, ns: int) -> None:
        """Sleep until then."""
        time.sleep(max(0, ns - self.now_ns()) / 1e9)

    def decided(self) -> None:
        """A decision took the time that it took."""

    def launch(self, step: RoutedStep, plan: Plan, bucket: int) -> Launched:
        """Let the pass that follows run under a plan."""
        del bucket
        self.end()
        self.plan = plan
        now_ns = self.now_ns()
        self._pass = step, now_ns, TimedInTurn(self.now_ns)
        return Launched(submit_ns=now_ns, reconfigure_ns=0, capture_ns=0)

    def lanes(self, plan: Plan) -> PassLanes:
        """Return the lanes of the pass under way."""
        del plan
        assert self._pass is not None
        return self._pass[2]

    def count(self, layer: int, counts_E: "torch.Tensor") -> None:
        """Keep a layer's counts."""
        assert self._pass is not None
        base_LE = self._pass[0].counts_LE.base
        assert base_LE is not None
        base_LE[layer] = counts_E.numpy()

    def end(self) -> None:
        """End the pass under way."""
        if self._pass is None:
            return
        (step, start_ns, lanes), self._pass = self._pass, None
        spans_LS2 = np.zeros((self._model.num_layers, self.plan.layout.num_slices, 2), dtype=np.int64)
        for (layer, slice_id), span in lanes.spans.items():
            spans_LS2[layer, slice_id] = span
        self._counts.append(step.counts_LE)
        self._num_ended += 1
        self._running.append(
            Finished(
                start_ns=start_ns,
                end_ns=self.now_ns(),
                start_ns_LS=spans_LS2[..., 0],
                busy_ns_LS=spans_LS2[..., 1] - spans_LS2[..., 0],
            )
        )

    def counts_LE(self, index: int) -> I32:
        """Return what a pass routed."""
        return self._counts[index - self._num_ended]

    def finished(self, *, wait_for: int) -> list[Finished]:
        """Return the passes that have ended."""
        del wait_for
        done = list(self._running)
        self._running.clear()
        return done

    def power_w(self) -> float | None:
        """Return None: no device draws power."""
        return None

    def close(self) -> list[EnergyWindow]:
        """Return no windows: no counter was read."""
        return []
