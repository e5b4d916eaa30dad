"""Experts beside other work: split where that pays, one after the other where not."""

from dataclasses import replace

import numpy as np
import pytest

from expertslice.policies.contract import MECHANISMS, Control, Observation, Setup
from expertslice.policies.cost import CostModel
from expertslice.policies.data import load_device, load_variants
from expertslice.policies.mixed import Mixed
from expertslice.traces.models import load_model
from expertslice.traces.schema import OtherWork

DEVICE = load_device("h100-sxm5-80gb")
LARGE = replace(load_model("large"), num_layers=2, kind="swiglu", dtype="bf16")
COUNTS_LE = np.full((2, 32), 4, dtype=np.int32)


def decided(beside, **changes):
    model = replace(LARGE, beside=beside)
    variants = load_variants(DEVICE.compute_capability)
    belief = CostModel(device=DEVICE, model=model, variants=variants, detail="roofline")
    setup = Setup(
        device=DEVICE,
        model=model,
        variants=variants,
        mechanisms=frozenset(MECHANISMS),
        belief=belief,
        control=Control(),
        seed=0,
    )
    setup = replace(setup, **changes)
    policy = Mixed()
    state = policy.init(setup)
    obs = Observation(
        step=1, counts_HLE=COUNTS_LE[None], now_ns=0, plan_id="", step_ns=0, busy_ns_LS=np.zeros((2, 1), np.int64),
        power_w=None, queued_tokens=None, coming_LE=None,
    )  # fmt: skip
    plan, _ = policy.plan(obs, state)
    other = (setup.model.other_work(32),) * 2
    return plan, belief, other


def test_experts_bound_by_memory_leave_sms_to_arithmetic():
    plan, belief, other = decided(OtherWork(flops=250 * 10**9, hbm_bytes=0, slice_id=1))
    assert plan.layout.num_slices == 2
    assert {one.mechanism for one in plan.layout.slices} == {"green_context"}
    alone, _, _ = decided(None)
    assert belief.step_ns(plan, COUNTS_LE, other) < 0.98 * belief.step_ns(alone, COUNTS_LE, other)


@pytest.mark.parametrize(
    ("beside", "changes"),
    [
        (None, {}),
        (OtherWork(flops=0, hbm_bytes=2 * 10**9, slice_id=1), {}),
        (OtherWork(flops=250 * 10**9, hbm_bytes=0, slice_id=1), {"belief": None}),
        (OtherWork(flops=250 * 10**9, hbm_bytes=0, slice_id=1), {"mechanisms": frozenset({"shared"})}),
    ],
)
def test_without_a_gain_or_a_way_to_split_it_runs_unsliced(beside, changes):
    plan, _, _ = decided(beside, **changes)
    assert plan.layout.num_slices == 1
