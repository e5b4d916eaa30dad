"""Experts beside other work: SMs of their own for each, where one after the other takes longer.

Wins where experts that are bound by memory meet work that is bound by arithmetic, such as other products.
Loses where both are bound by the same, or the split does not fit: the guard then keeps the unsliced launch, which runs
the other work first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..traces.schema import F64, I32
from .candidates import auto_tiles, snap_sms, split_layout, unsliced_plans
from .choice import Choice, Chooser
from .contract import Plan, Setup
from .layouts import one_slice_plan

EXPERT_SM_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed(Chooser):
    """Two green contexts, experts in the first and the model's work beside them in the second, split by belief.

    Without a belief, green contexts or work beside (`MoeSpec.beside`) it runs unsliced.
    """

    min_gain: float = 0.02
    """Fraction of the unsliced time that slicing must save."""

    def init(self, setup: Setup) -> Choice:
        unsliced = unsliced_plans(setup)
        if setup.belief is None or setup.model.beside is None or "green_context" not in setup.mechanisms:
            return Choice(setup=setup, plans=unsliced[:1])
        plans = (*unsliced, *self._splits(setup))
        return Choice(setup=setup, plans=plans, num_unsliced=len(unsliced), min_gain=self.min_gain)

    def _splits(self, setup: Setup) -> list[Plan]:
        device = setup.device
        return [
            one_slice_plan(split_layout(device, tile, sms, tile))
            for sms in sorted({snap_sms(share * device.sm_count, device) for share in EXPERT_SM_SHARES})
            for tile in auto_tiles(setup)
        ]

    def costs(self, setup: Setup, plans: Sequence[Plan], counts_LE: I32) -> F64:
        """Return the time of a step with all that runs beside its experts."""
        assert setup.belief is not None
        other = setup.model.other_work(int(counts_LE[0].sum()) // setup.model.top_k)
        return np.array([float(setup.belief.step_ns(p, counts_LE, (other,) * len(counts_LE))) for p in plans])
