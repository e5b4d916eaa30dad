"""Plans that a device cannot hold are refused in one sentence that says what to do."""

from dataclasses import replace
from timeit import repeat

import numpy as np
import pytest

from expertslice.policies.contract import ByTokens, MigPlacement, Pinned, Plan, Setup, Slice, SliceLayout
from expertslice.policies.data import load_device, load_variants
from expertslice.policies.layouts import (
    co_resident_layout,
    fallback_plan,
    one_slice_plan,
    uniform_slice,
    unsliced_layout,
)
from expertslice.policies.mig import mig_layout
from expertslice.policies.validate import PlanError, validate
from expertslice.traces.models import load_model

H100 = load_device("h100-sxm5-80gb")
SETUP = Setup(device=H100, model=load_model("ours-moe-32e4k"), variants=load_variants())
COLD, HOT, HUGE = "16x128x64w4s4", "64x128x64w4s4", "128x256x64w8s4"
TWO = MigPlacement(profile="3g.40gb", start=0), MigPlacement(profile="3g.40gb", start=4)
SHARED = unsliced_layout(SETUP, HOT).slices[0]
SPLIT = SliceLayout(slices=(uniform_slice("green_context", 32, COLD), uniform_slice("green_context", 96, HOT)))
GREEN = SPLIT.slices[0]
MIG = mig_layout(H100, TWO, (HOT, HOT))


def plan_of(*slices, **fields):
    return one_slice_plan(SliceLayout(slices=slices, **fields))


def pinned(ids, layout=SPLIT):
    return Plan(layout=layout, placement=Pinned(slice_of_expert_LE=ids))


def by_tokens(bounds, slice_ids, layout=SPLIT):
    return Plan(layout=layout, placement=ByTokens(bounds=bounds, slice_ids=slice_ids))


ZEROS_LE = np.zeros((8, 32), np.int16)


@pytest.mark.parametrize(
    "plan",
    [
        fallback_plan(SETUP),
        one_slice_plan(unsliced_layout(SETUP, HUGE)),
        by_tokens((64,), (0, 1)),
        by_tokens((), (1,)),
        by_tokens((0, 5), (1, 0, 1)),
        pinned(ZEROS_LE.copy()),
        one_slice_plan(co_resident_layout(SETUP, (COLD, HOT))),
        one_slice_plan(MIG),
        plan_of(SHARED, SHARED, SHARED),
        plan_of(SHARED, co_resident_layout(SETUP, (COLD,)).slices[0]),
        plan_of(replace(GREEN, sm_count=128, num_ctas=7)),
        # Small grids need not share an SM, so their tiles need not fit together.
        plan_of(*[Slice(mechanism="sm_budget", sm_count=66, num_ctas=66, ctas_per_sm=1, up=HUGE, down=HUGE)] * 2),
    ],
)
def test_holds(plan):
    validate(plan, SETUP)


BUDGET = co_resident_layout(SETUP, (HOT,)).slices[0]


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (plan_of(), "no slices; give at least one"),
        (plan_of(replace(SHARED, up="huge")), "slice 0 names tile 'huge'; this setup has 16x128x64w4s4"),
        (plan_of(SHARED, GREEN), "mixes green_context and shared"),
        (plan_of(*MIG.slices, GREEN, mig=TWO), "mixes green_context and mig"),
        (plan_of(replace(SHARED, num_ctas=131)), "set sm_count to 131"),
        (plan_of(replace(SHARED, num_ctas=0)), "at least 1 CTA"),
        (plan_of(replace(SHARED, num_ctas=133, sm_count=133)), r"give 1\.\.132 SMs"),
        (plan_of(replace(GREEN, num_ctas=33)), "they hold 32, give no more"),
        (plan_of(replace(SHARED, ctas_per_sm=0)), "give at least 1"),
        (plan_of(replace(SHARED, ctas_per_sm=9, sm_count=15)), "ask for fewer or take a smaller tile"),
        (plan_of(replace(SHARED, down=HUGE, ctas_per_sm=2, sm_count=66)), f"tile {HUGE} per SM; an SM of .* holds 1"),
        (plan_of(replace(SHARED, stream_priority=1)), "CUDA offers -5"),
        (plan_of(BUDGET, BUDGET, BUDGET), "together on one SM"),
        (plan_of(BUDGET, replace(BUDGET, down=HUGE)), "bytes of shared memory together on one SM"),
        (plan_of(GREEN, replace(GREEN, sm_count=104)), "exclusive slices own 136 SMs"),
        (plan_of(replace(GREEN, sm_count=33)), "multiples of 8 from 8 up"),
        (plan_of(replace(GREEN, sm_count=4, num_ctas=4)), "multiples of 8 from 8 up"),
        (plan_of(SHARED, mig=TWO), "use mig or drop them"),
        (plan_of(replace(SHARED, instance=0)), "use mig or drop them"),
        (plan_of(*MIG.slices), "no instances; give at least one"),
        (plan_of(MIG.slices[0], MIG.slices[0], mig=TWO), "give each slice its own"),
        (plan_of(MIG.slices[0], replace(MIG.slices[1], instance=2), mig=TWO), "instances 0..1"),
        (plan_of(replace(MIG.slices[0], sm_count=32, num_ctas=32), mig=TWO), "that instance has 60"),
        (plan_of(*MIG.slices, mig=(TWO[0], replace(TWO[1], start=2))), "may start at"),
        (replace(one_slice_plan(MIG), steal=True), "share no memory"),
        (replace(fallback_plan(SETUP), tile_order="random"), "use expert, heavy or light"),
        (by_tokens((64,), (0,)), "one slice more than bounds"),
        (by_tokens((64, 64), (0, 1, 0)), "strictly rising"),
        (by_tokens((-1,), (0, 1)), "from 0 up"),
        (by_tokens((64,), (0, 2)), r"names slice 2; the layout has slices 0\.\.1"),
        (by_tokens((64,), (-1, 0)), "names slice -1"),
        (pinned(np.zeros((8, 31), np.int16)), r"\[8, 31\]; the model has \[layers, experts\] \[8, 32\]"),
        (pinned(np.zeros((8, 32), np.int64)), "convert them to int16"),
        (
            pinned(np.where(np.arange(256).reshape(8, 32) == 70, 2, 0).astype(np.int16)),
            "expert 6 of layer 2 on slice 2",
        ),
        (pinned(ZEROS_LE - np.int16(1)), "on slice -1"),
    ],
)
def test_refuses(plan, says):
    with pytest.raises(PlanError, match=says) as caught:
        validate(plan, SETUP)
    assert "\n" not in str(caught.value)


def test_refuses_a_mechanism_that_the_setup_lacks():
    with pytest.raises(PlanError, match="allows shared, use one of them"):
        validate(by_tokens((64,), (0, 1)), replace(SETUP, mechanisms=frozenset({"shared"})))


def test_refuses_what_another_device_cannot_hold():
    a100 = load_device("a100-sxm4-80gb")
    setup = replace(SETUP, device=a100, variants=load_variants(80))
    with pytest.raises(PlanError, match=r"give 1\.\.108 SMs"):
        validate(fallback_plan(SETUP), setup)
    validate(fallback_plan(setup), setup)


def test_takes_microseconds_per_step():
    plan = pinned(ZEROS_LE.copy())
    validate(plan, SETUP)
    assert min(repeat(lambda: validate(plan, SETUP), number=100, repeat=5)) / 100 < 200e-6
