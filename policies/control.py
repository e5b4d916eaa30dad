"""Which plan runs a step, which counts a decision may see, what a change of plan costs: the same in every backend.

Shape letters: H steps of history, L MoE layers, E routed experts.
"""

from collections import deque
from collections.abc import Iterable

import numpy as np

from ..traces.schema import I32
from .contract import Observation, Plan, Setup, SliceLayout, StepRecord
from .layouts import fallback_plan, switch_ns
from .validate import validate

NO_PLAN_YET = "no plan has taken effect yet"


class ControlState:
    """Steps submitted, plans to come, counts to be seen."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._plan = fallback_plan(setup)
        self._checked: Plan | None = None
        self._reason: str | None = NO_PLAN_YET
        self._coming: deque[tuple[int, Plan]] = deque()
        kept = setup.control.history_steps + setup.control.count_lag_steps + 1
        self._counts: deque[I32] = deque(maxlen=kept)
        self._none_LE = np.zeros((setup.model.num_layers, setup.model.num_experts), dtype=np.int32)
        self.num_submitted = 0

    @property
    def deciding(self) -> int:
        """The step a decision belongs to: the newest submitted, or with no delay the next."""
        return self.num_submitted - (1 if self._setup.control.delay_steps else 0)

    @property
    def newest_visible(self) -> int:
        """The newest step whose counts that decision may see; below 0: none."""
        return min(self.deciding - self._setup.control.count_lag_steps, self.num_submitted - 1)

    def history_HLE(self) -> I32:
        """Return the counts that the decision may see, newest last, read-only."""
        known = max(0, len(self._counts) - (self.num_submitted - 1 - self.newest_visible))
        counts = [self._counts[i] for i in range(max(0, known - self._setup.control.history_steps), known)]
        history = np.stack(counts) if counts else self._none_LE[None][:0]
        history.flags.writeable = False
        return history

    def observation(
        self, *, now_ns: int, newest: StepRecord | None, power_w: float | None, queued_tokens: int
    ) -> Observation:
        """Return what the policy sees; `newest`: the newest completed step."""
        none_LS = np.zeros((self._setup.model.num_layers, 0), dtype=np.int64)
        return Observation(
            step=self.deciding,
            counts_HLE=self.history_HLE(),
            now_ns=now_ns,
            plan_id=self.plan_in_effect().plan_id,
            step_ns=newest.end_ns - newest.start_ns if newest else 0,
            busy_ns_LS=newest.busy_ns_LS if newest else none_LS,
            power_w=power_w,
            queued_tokens=queued_tokens,
        )

    def counts_LE(self, index: int) -> I32:
        """Return what the trace says of a step that a decision may see, or saw last."""
        return self._counts[index - (self.num_submitted - len(self._counts))]

    def decide(self, plan: Plan) -> None:
        """Let a plan take effect `delay_steps` after the step it was decided at.

        Raises:
            PlanError: the device cannot hold the plan.
        """
        # A plan is a value: one that was checked stays sound, and most decisions keep it.
        if plan is not self._checked:
            validate(plan, self._setup, checked=self._checked.layout if self._checked else None)
            self._checked = plan
        self._coming.append((self.deciding + self._setup.control.delay_steps, plan))

    def plan_in_effect(self) -> Plan:
        """Return the plan of the step that is being decided at."""
        due = [plan for step, plan in self._coming if step <= self.deciding]
        return due[-1] if due else self._plan

    def submit(self, counts_LE: I32, step: int) -> tuple[Plan, str | None]:
        """Count one more step; return the plan that runs it, and why that is no policy's, or None.

        Raises:
            ValueError: the step's counts are not those of the setup's model.
        """
        if counts_LE.shape != self._none_LE.shape:
            raise ValueError(
                f"step {step} has counts of shape {list(counts_LE.shape)}; model {self._setup.model.name!r} has "
                f"[layers, experts] {list(self._none_LE.shape)}, choose the trace's model"
            )
        while self._coming and self._coming[0][0] <= self.num_submitted:
            self._plan, self._reason = self._coming.popleft()[1], None
        self._counts.append(counts_LE)
        self.num_submitted += 1
        return self._plan, self._reason


class Graphs:
    """Captured graphs, keyed by layout and token bucket, and the plan that ran last, where time is reckoned."""

    def __init__(self, setup: Setup, declared: Iterable[SliceLayout]) -> None:
        self._setup = setup
        self._declared = frozenset(declared)
        self._captured: set[tuple[SliceLayout, int]] = set()
        self._plan: Plan | None = None

    def change_to(self, plan: Plan, bucket: int) -> tuple[int, int]:
        """Return what running a plan next costs, and remember that it ran.

        That is ns on the device before the step's first layer, and ns of capture on the host before the launch.
        """
        before, self._plan = self._plan, plan
        if self._setup.control.free_switches:
            return 0, 0
        capture_ns = 0
        if plan.layout not in self._declared and (plan.layout, bucket) not in self._captured:
            self._captured.add((plan.layout, bucket))
            capture_ns = self._setup.device.capture_ns
        if before is None or before is plan or before.plan_id == plan.plan_id:
            return 0, capture_ns
        device = self._setup.device
        return device.upload_ns + switch_ns(before.layout, plan.layout, device), capture_ns
