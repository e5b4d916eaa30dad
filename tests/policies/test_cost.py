"""Laws of the cost model: floors, monotonicity, invariance, and its error draws."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from splits import COLD, HOT, WIDE, tile

from expertslice.policies.contract import (
    ByTokens,
    DeviceSpec,
    Pinned,
    Plan,
    Setup,
    SliceLayout,
    TileVariant,
)
from expertslice.policies.cost import CostModel, floor_ns, perturb
from expertslice.policies.data import load_device
from expertslice.policies.layouts import co_resident_layout, one_slice_plan, uniform_slice, unsliced_layout
from expertslice.policies.tiles import TileConstants, tile_cost
from expertslice.sim.device import Needs
from expertslice.traces.schema import MoeSpec, OtherWork, Product, RoutedStep

DEVICE = load_device("h100-sxm5-80gb")
MODEL = MoeSpec(name="test", num_layers=2, num_experts=8, top_k=2, d_model=1024, d_ff=(2048,))
VARIANTS = (HOT, COLD, WIDE)
SETUP = Setup(device=DEVICE, model=MODEL, variants=VARIANTS)
SPLIT = ByTokens(bounds=(64,), slice_ids=(0, 1))
APART = SliceLayout(
    slices=(uniform_slice("green_context", 32, COLD.name), uniform_slice("green_context", 96, HOT.name))
)
PLANS = {
    "unsliced": one_slice_plan(unsliced_layout(SETUP, WIDE.name)),
    "co-resident": Plan(layout=co_resident_layout(SETUP, (COLD.name, HOT.name)), placement=SPLIT, tile_order="heavy"),
    "light": Plan(layout=co_resident_layout(SETUP, (COLD.name, HOT.name)), placement=SPLIT, tile_order="light"),
    "stealing": Plan(layout=co_resident_layout(SETUP, (COLD.name, HOT.name)), placement=SPLIT, steal=True),
    "green": Plan(layout=APART, placement=SPLIT, tile_order="heavy"),
}
counts_of_layer = st.lists(st.one_of(st.just(0), st.integers(0, 3000)), min_size=8, max_size=8)


def truth(device: DeviceSpec = DEVICE, model: MoeSpec = MODEL) -> CostModel:
    return CostModel(device=device, model=model, variants=VARIANTS)


def counts(values: list[int]) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def green(sms: int, variant: TileVariant = HOT) -> Plan:
    one = uniform_slice("green_context", sms, variant.name)
    return one_slice_plan(SliceLayout(slices=(one,)))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("detail", ["tiles", "roofline"])
@given(values=counts_of_layer)
def test_nothing_beats_the_floor(name: str, detail: str, values: list[int]):
    model = replace(truth(), detail=detail)
    step = RoutedStep(step=0, phase="mixed", counts_LE=counts(values)[None])
    needs = Needs(MODEL).of(step)
    floor = floor_ns(hbm_bytes=needs.hbm_bytes, flops=needs.flops, device=DEVICE, dtype="bf16")
    assert model.step_ns(PLANS[name], step.counts_LE) >= floor


@given(values=counts_of_layer, sms=st.integers(8, 131), more=st.integers(1, 64))
def test_more_sms_finish_later_by_less_than_one_tile_of_each_product(values: list[int], sms: int, more: int):
    # Where L2 binds, a wave of more CTAs takes longer, so that whole waves may cost up to a tile: no law without it.
    model = truth()
    few, many = green(sms), green(min(132, sms + more))
    slack = model.shares(few.layout).tables.tile_PSD[:2].sum(axis=0).sum()
    assert model.layer_ns(many, 0, counts(values)) <= model.layer_ns(few, 0, counts(values)) + slack


@pytest.mark.parametrize(
    ("name", "tolerance"), [("unsliced", 0.0), ("green", 0.02), ("co-resident", 0.05), ("light", 0.05)]
)
@given(values=counts_of_layer, factor=st.floats(1.0, 4.0))
def test_more_bandwidth_is_never_later(name: str, tolerance: float, values: list[int], factor: float):
    # Beside other slices it may be, by a little: cold experts that wait less for memory take more of the pipes, or of
    # L2 where SMs are exclusive, from the hot ones, which end last. Stealing is left out, since it splits tiles by
    # speeds that change afterwards.
    faster = replace(DEVICE, read_curve_bytes_per_s=tuple(y * factor for y in DEVICE.read_curve_bytes_per_s))
    before, after = (truth(d).layer_ns(PLANS[name], 0, counts(values)) for d in (DEVICE, faster))
    rounding_ns = 10
    assert after <= before * (1 + tolerance) + rounding_ns


@pytest.mark.parametrize("name", ["co-resident", "light", "green"])
@given(values=counts_of_layer, seed=st.integers(0, 99))
def test_relabelling_experts_changes_nothing_where_queues_are_sorted(name: str, values: list[int], seed: int):
    relabelled = np.random.default_rng(seed).permutation(counts(values))
    model = truth()
    before, after = (model.work(PLANS[name], one[None]).layer_times(0) for one in (counts(values), relabelled))
    assert before == after


@given(values=counts_of_layer)
def test_a_rule_costs_what_the_same_pinned_experts_cost(values: list[int]):
    counts_LE = np.stack([counts(values), counts(values[::-1])])
    rule = PLANS["co-resident"]
    owner_LE = np.where(counts_LE < 64, 0, 1).astype(np.int16)
    pinned = replace(rule, placement=Pinned(slice_of_expert_LE=owner_LE))
    model = truth()
    assert model.step_ns(rule, counts_LE) == model.step_ns(pinned, counts_LE)
    assert model.layer_ns(pinned, 1, counts_LE[1]) == model.layer_ns(rule, 1, counts_LE[1])


@pytest.mark.parametrize("name", PLANS)
def test_empty_and_one_hot_layers_cost_something_finite(name: str):
    model = truth()
    empty = model.work(PLANS[name], counts([0] * 8)[None]).layer_times(0)
    assert 0 < empty.ns < 20_000
    assert max(empty.busy_ns_S) <= 2 * (PLANS[name].steal)
    assert model.layer_ns(PLANS[name], 0, counts([0] * 7 + [4096])) > empty.ns


def test_a_step_is_the_sum_of_its_layers():
    counts_LE = np.array([[5, 0, 900, 33, 64, 63, 1, 2000], [0, 0, 0, 0, 0, 0, 0, 7]], dtype=np.int32)
    model = truth()
    for plan in PLANS.values():
        assert model.step_ns(plan, counts_LE) == sum(model.layer_ns(plan, i, c) for i, c in enumerate(counts_LE))


def test_experts_of_their_own_widths_cost_their_own():
    widths = tuple(512 * (1 + e % 4) for e in range(8))
    mixed, alike = replace(MODEL, d_ff=widths), replace(MODEL, d_ff=(2048,) * 8)
    values = counts([100] * 8)
    plan = PLANS["co-resident"]
    assert truth(model=alike).layer_ns(plan, 0, values) == truth().layer_ns(plan, 0, values)
    assert truth(model=mixed).layer_ns(plan, 0, values) < truth().layer_ns(plan, 0, values)


def test_a_large_product_comes_close_to_the_burst_rate():
    flops = 2 * 65536 * 3 * 1024 * 2048 * 8
    took = truth().layer_ns(PLANS["unsliced"], 0, counts([65536] * 8))
    assert 1.0 < took / floor_ns(hbm_bytes=0, flops=flops, device=DEVICE, dtype="bf16") < 1.15


def test_single_tokens_stream_weights_at_the_read_curve():
    big = replace(MODEL, d_model=4096, d_ff=(14336,))
    needed = 8 * big.expert_bytes()
    took = truth(model=big).layer_ns(PLANS["unsliced"], 0, counts([1] * 8))
    assert 1.0 < took / floor_ns(hbm_bytes=needed, flops=0, device=DEVICE, dtype="bf16") < 1.06


@pytest.mark.parametrize(
    ("variant", "share"),
    [(COLD, 0.67), (HOT, 0.80), (WIDE, 1.0), (tile(64, 256, 64, 4, 4), 0.8), (tile(16, 128, 64, 4, 4), 0.19)],
)
def test_shared_memory_and_the_l2_port_bound_small_tiles(variant: TileVariant, share: float):
    product = Product(name="up", k_dim=2048, n_dim=4096, out_dim=4096)
    cost = tile_cost(variant, product, DEVICE, TileConstants(), "bf16")
    peak_per_ns = DEVICE.mma_flops_per_clk * DEVICE.clock_mhz / 1e3
    assert cost.flops / cost.pipe_ns / peak_per_ns == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("detail", ["tiles", "roofline"])
def test_fp32_products_run_at_the_ieee_rate_off_the_tensor_cores(detail: str):
    flops = 8 * 2048 * 2 * sum(p.k_dim * p.n_dim for p in MODEL.products(2048))
    model = replace(truth(), detail=detail, model=replace(MODEL, dtype="fp32"))
    took = model.layer_ns(PLANS["unsliced"], 0, counts([2048] * 8))
    assert 1.0 <= took / (flops / DEVICE.fp32_flops_per_s * 1e9) < 1.15
    beside = OtherWork(flops=10**12, hbm_bytes=0, slice_id=0)
    alone = model.layer_ns(PLANS["unsliced"], 0, counts([0] * 8), (beside,))
    assert alone >= 10**12 / DEVICE.fp32_flops_per_s * 1e9


def test_belief_and_truth_differ_in_form():
    values = counts([70] * 8)
    belief = replace(truth(), detail="roofline")
    few = [belief.layer_ns(green(sms), 0, values) for sms in range(40, 60)]
    assert all(a > b for a, b in pairwise(few))
    assert any(
        truth().layer_ns(green(sms), 0, values) == truth().layer_ns(green(sms + 1), 0, values) for sms in range(40, 59)
    )


def test_other_work_runs_before_the_layer_or_beside_it():
    values = counts([200] * 8)
    work = OtherWork(flops=0, hbm_bytes=100_000_000)
    model, plan = truth(), PLANS["green"]
    alone = model.layer_ns(plan, 0, values)
    before = model.layer_ns(plan, 0, values, (work,))
    beside = model.layer_ns(plan, 0, values, (replace(work, slice_id=0),))
    assert before > alone + 30_000
    assert beside < before
    assert model.work(plan, values[None], ((replace(work, slice_id=0),),)).layer_times(0).busy_ns_S[0] > 50_000
    belief = replace(model, detail="roofline")
    assert belief.layer_ns(plan, 0, values, (work,)) > belief.layer_ns(plan, 0, values)


@pytest.mark.parametrize("detail", ["tiles", "roofline"])
def test_other_work_of_a_slice_that_a_layout_lacks_runs_on_its_last_one(detail: str):
    model, values = replace(truth(), detail=detail), counts([200] * 8)
    plan = PLANS["green"]
    last, beyond = (
        model.layer_ns(plan, 0, values, (OtherWork(flops=0, hbm_bytes=10**9, slice_id=slice_id),))
        for slice_id in (plan.layout.num_slices - 1, 15)
    )
    assert last == beyond > model.layer_ns(plan, 0, values)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=50)
def test_draws_keep_physics_in_order(seed: int):
    drawn = perturb(DEVICE, seed)
    curve = drawn.read_curve_bytes_per_s
    assert all(a < b for a, b in pairwise(curve))
    assert drawn.sustained_flops_per_s <= drawn.matrix_flops_per_s
    assert drawn.idle_w < drawn.stream_w <= drawn.limit_w
    assert drawn.idle_w < drawn.matrix_w <= drawn.limit_w
    assert drawn.sm_count == DEVICE.sm_count
    assert isinstance(drawn.graph_node_ns, int)
    assert drawn == perturb(DEVICE, seed)


def test_draws_follow_their_declared_errors():
    draws = [perturb(DEVICE, seed).matrix_flops_per_s / DEVICE.matrix_flops_per_s for seed in range(400)]
    assert np.std(np.log(draws)) == pytest.approx(dict(DEVICE.rel_errors)["matrix_flops_per_s"], rel=0.15)
    constants = {truth().perturbed(seed).constants.fill_ns for seed in range(10)}
    assert len(constants) == 10


def test_a_draw_of_one_figure_does_not_depend_on_the_others():
    fewer = replace(DEVICE, rel_errors=tuple(e for e in DEVICE.rel_errors if e[0] != "matrix_flops_per_s"))
    assert perturb(fewer, 3).read_curve_bytes_per_s == perturb(DEVICE, 3).read_curve_bytes_per_s
    assert perturb(fewer, 3).matrix_flops_per_s == DEVICE.matrix_flops_per_s
