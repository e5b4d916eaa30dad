"""Least energy within a latency bound: of the plans that are fast enough, the one believed to need the fewest joules.

Wins where a slower plan moves fewer bytes. Ties with the fastest plan where all move alike, as most do: then what a
step idles is all that differs, and energy follows time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..traces.schema import F64, I32
from .candidates import helping_plans, unsliced_plans
from .choice import Choice, Chooser, plan_costs_ns
from .contract import DeviceSpec, Plan, Setup


def energy_rates(device: DeviceSpec) -> tuple[float, float]:
    """Return joules per byte of DRAM traffic and per FLOP at the burst clock, beside what idling draws."""
    per_byte = (device.stream_w - device.idle_w) / max(device.read_curve_bytes_per_s)
    # The sustained rate runs at a lower clock, and energy falls with its square.
    sustained = device.sustained_flops_per_s / device.matrix_flops_per_s
    held_w = min(device.matrix_w, device.limit_w)
    return per_byte, (held_w - device.idle_w) / device.sustained_flops_per_s / sustained**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy(Chooser):
    """Chooses among unsliced plans and slices that help each other; without a belief the default unsliced one."""

    stickiness: float = 0.0005
    """Times differ more than joules do: what the arithmetic and the bytes need is much the same."""
    slack: float = 0.05
    """Fraction by which a step may be slower than the fastest unsliced launch, by belief."""

    def init(self, setup: Setup) -> Choice:
        if setup.belief is None:
            return Choice(setup=setup, plans=unsliced_plans(setup)[:1])
        return Choice(setup=setup, plans=unsliced_plans(setup) + helping_plans(setup))

    def costs(self, setup: Setup, plans: Sequence[Plan], counts_LE: I32) -> F64:
        """Return joules; infinity for a plan that is too slow. What the arithmetic needs is the same for all."""
        assert setup.belief is not None
        ns_P = plan_costs_ns(setup, plans, counts_LE)
        unsliced = [ns for ns, plan in zip(ns_P, plans, strict=True) if plan.layout.num_slices == 1]
        allowed_P = ns_P <= (1.0 + self.slack) * min(unsliced, default=ns_P.min(initial=np.inf))
        per_byte, _ = energy_rates(setup.device)
        moved_P = np.array(
            [self._moved_bytes(setup, p, counts_LE) if ok else 0.0 for p, ok in zip(plans, allowed_P, strict=True)]
        )
        return np.where(allowed_P, setup.device.idle_w * ns_P * 1e-9 + per_byte * moved_P, np.inf)

    def _moved_bytes(self, setup: Setup, plan: Plan, counts_LE: I32) -> float:
        assert setup.belief is not None
        work = setup.belief.work(plan, counts_LE)
        return sum(work.moved_bytes(layer) for layer in range(len(counts_LE)))
