"""What changing the plan costs: uploads, layout switches, captures. Plain rules, no state of the device."""

from collections.abc import Iterable
from typing import NamedTuple

from ..policies.contract import Plan, Setup, SliceLayout
from ..policies.layouts import switch_ns


class Change(NamedTuple):
    """What it takes to run the next step under its plan."""

    device_ns: int
    """On the device, before the step's first layer."""
    capture_ns: int
    """On the host, before the launch."""


class Graphs:
    """Captured graphs, keyed by layout and token bucket, and the plan that ran last."""

    def __init__(self, setup: Setup, declared: Iterable[SliceLayout]) -> None:
        self._setup = setup
        self._declared = frozenset(declared)
        self._captured: set[tuple[SliceLayout, int]] = set()
        self._plan: Plan | None = None

    def change_to(self, plan: Plan, bucket: int) -> Change:
        """Return the cost of running a plan next, and remember that it ran."""
        before, self._plan = self._plan, plan
        if self._setup.control.free_switches:
            return Change(0, 0)
        capture_ns = 0
        if plan.layout not in self._declared and (plan.layout, bucket) not in self._captured:
            self._captured.add((plan.layout, bucket))
            capture_ns = self._setup.device.capture_ns
        if before is None or before is plan or before.plan_id == plan.plan_id:
            return Change(0, capture_ns)
        device = self._setup.device
        return Change(device.upload_ns + switch_ns(before.layout, plan.layout, device), capture_ns)


def next_power_of_two(num_tokens: int) -> int:
    """Return the default token bucket: the least power of two that holds the tokens; 1 for an empty step."""
    return 1 << max(0, num_tokens - 1).bit_length()
