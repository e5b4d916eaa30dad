"""An executor without a GPU: steps take what the cost model says, on a clock of its own. No GPU timing.

Equal inputs give equal records, so that whatever is built on the runtime can be tried on any machine.

Shape letters: L MoE layers, E routed experts, S slices.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from ..policies.contract import Plan, Setup, SliceLayout
from ..policies.control import Graphs
from ..policies.cost import CostModel
from ..traces.schema import I32, RoutedStep
from .backend import Executor, Finished, Launched


class HostExecutor(Executor):
    """Runs steps one after another in reckoned time."""

    def open(self, setup: Setup, layouts: Sequence[SliceLayout]) -> None:
        self._setup = setup
        self._cost = CostModel(device=setup.device, model=setup.model, variants=setup.variants)
        self._graphs = Graphs(setup, layouts)
        self._now_ns = self._free_ns = 0
        self._counts: dict[int, I32] = {}
        self._ends_ns: list[int] = []
        self._running: deque[Finished] = deque()

    def now_ns(self) -> int:
        return self._now_ns

    def wait_until(self, ns: int) -> None:
        self._now_ns = max(self._now_ns, ns)

    def decided(self) -> None:
        self._now_ns += self._setup.control.plan_ns

    def launch(self, step: RoutedStep, plan: Plan, bucket: int) -> Launched:
        """Reckon a step: it starts when the device is free, and its layers follow one another."""
        reconfigure_ns, capture_ns = self._graphs.change_to(plan, bucket)
        self._now_ns += capture_ns + self._setup.device.graph_launch_ns
        start_ns = max(self._free_ns, self._now_ns)
        work = self._cost.work(plan, step.counts_LE, step.other_L)
        at_ns, starts, busy = start_ns + reconfigure_ns, [], []
        for layer in range(len(step.counts_LE)):
            times = work.layer_times(layer)
            starts.append([at_ns + ns for ns in times.start_ns_S])
            busy.append(times.busy_ns_S)
            at_ns += times.ns
        self._free_ns = at_ns
        self._counts[len(self._ends_ns)] = _counted(step, self._setup.model.num_experts)
        self._ends_ns.append(at_ns)
        times = {"start_ns_LS": np.array(starts, dtype=np.int64), "busy_ns_LS": np.array(busy, dtype=np.int64)}
        self._running.append(Finished(start_ns=start_ns, end_ns=at_ns, **times))
        return Launched(submit_ns=self._now_ns, reconfigure_ns=reconfigure_ns, capture_ns=capture_ns)

    def counts_LE(self, index: int) -> I32:
        self.wait_until(self._ends_ns[index])
        for older in [known for known in self._counts if known < index]:
            del self._counts[older]
        return self._counts[index]

    def finished(self, *, wait_for: int) -> list[Finished]:
        if wait_for >= 0:
            self.wait_until(self._ends_ns[wait_for])
        done = []
        while self._running and self._running[0].end_ns <= self._now_ns:
            done.append(self._running.popleft())
        return done


def _counted(step: RoutedStep, num_experts: int) -> I32:
    """Return the counts as a device would find them: from the ids where the trace has them."""
    if step.expert_ids_TLK is None:
        return step.counts_LE
    layers = np.moveaxis(np.asarray(step.expert_ids_TLK, dtype=np.int64), 1, 0)
    return np.stack([np.bincount(ids.ravel(), minlength=num_experts) for ids in layers]).astype(np.int32)
