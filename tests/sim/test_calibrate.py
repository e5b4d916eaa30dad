"""Residuals: what they learn, what bounds them, where they refuse; and truth and belief from measurements."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertslice.policies.contract import ByTokens, Plan, SliceLayout
from expertslice.policies.cost import CostModel
from expertslice.policies.data import load_device, load_variants
from expertslice.policies.layouts import uniform_slice
from expertslice.policies.residual import NAMES, fit, least_factor_LS
from expertslice.policies.tiles import TileConstants
from expertslice.policies.work import segment_sums
from expertslice.sim.calibrate import (
    CEILINGS,
    Measured,
    believed,
    check_enough,
    fit_belief,
    fit_constants,
    fit_truth,
    halves,
    judge,
    predicted_with_bar,
)
from expertslice.traces.schema import MoeSpec

H100 = load_device("h100-sxm5-80gb")
SPEC = MoeSpec(name="m", num_layers=1, num_experts=16, top_k=2, d_model=2048, d_ff=(4096,))
TILES = ("16x128x64w4s4", "64x128x64w4s4", "128x128x64w8s4")


def plan_of(*slices, bounds=()):
    rule = ByTokens(bounds=bounds, slice_ids=tuple(range(len(slices))))
    return Plan(layout=SliceLayout(slices=slices), placement=rule)


def measured(tokens, tile, sms=132, factor=1.0, spec=SPEC, seed=0):
    """Return what a device would measure whose kernels take `factor` times what physics says."""
    rng = np.random.default_rng([seed, tokens])
    counts = rng.multinomial(tokens * spec.top_k, [1 / spec.num_experts] * spec.num_experts)[None].astype(np.int32)
    row = Measured(
        cell=f"{spec.name} {tokens}", model=spec, variants=load_variants(),
        plan=plan_of(uniform_slice("sm_budget", sms, tile)), counts_LE=counts, ns=1.0,
    )  # fmt: skip
    fixed, busy, _ = row.split_ns(H100)
    return replace(row, ns=fixed + factor * busy)


def rows_of(factor_of):
    return [
        measured(tokens, tile, sms, factor_of(tokens, tile, sms))
        for tokens in (4, 16, 64, 256, 512, 1024, 2048, 4096)
        for tile in TILES
        for sms in (64, 132)
    ]


@pytest.fixture(scope="module")
def slow_rows():
    return rows_of(lambda tokens, tile, sms: 1.3 + 0.1 * (sms == 64))


def test_a_truth_learns_a_device_that_is_slower_than_its_physics(slow_rows):
    first, other = halves(slow_rows, 0)
    truth = fit_truth(first, H100)
    off = judge(other, truth, H100)
    plain = [abs(row.predicted_ns(H100) / row.ns - 1) for row in other]
    assert off["mape"] < 0.04 < np.mean(plain)
    assert off["coverage"] >= 0.6
    assert off["refused"] == 0


def test_halves_share_no_load(slow_rows):
    first, other = halves(slow_rows, 3)
    assert len(first) + len(other) == len(slow_rows)
    assert not {row.cell for row in first} & {row.cell for row in other}
    assert [row.cell for row in halves(slow_rows, 3)[0]] == [row.cell for row in first]


@given(tokens=st.integers(1, 4096), tile=st.sampled_from(TILES), drop=st.floats(0.05, 0.9))
def test_no_residual_is_faster_than_the_roofline(tokens, tile, drop):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, len(NAMES))) * 50
    truth = fit(x, np.full(60, np.log(drop)))
    row = measured(tokens, tile)
    cost = row.cost(H100, truth)
    shares = cost.shares(row.plan.layout)
    sums = segment_sums(row.counts_LE, row.plan.placement.owner_LE(row.counts_LE, 0), "expert", shares)
    least = least_factor_LS(sums, shares)
    assert (truth.factors_LS(sums, shares) >= least - 1e-12).all()
    read = sums[..., 6].sum() / max(H100.read_curve_bytes_per_s) * 1e9
    assert row.predicted_ns(H100, truth) >= read * 0.999


def test_bars_widen_away_from_what_was_measured_and_far_queries_are_refused(slow_rows):
    truth = fit_truth(slow_rows, H100)
    inside, outside = measured(256, TILES[1]), measured(256, TILES[1], 32)
    bars = [predicted_with_bar(row, truth, H100)[1] for row in (inside, outside)]
    assert bars[1] > 1.2 * bars[0]
    with pytest.raises(ValueError, match=r"part of SMs of .* and is asked for .* too far; profile slices"):
        measured(256, TILES[1], 1).predicted_ns(H100, truth)


def test_draws_of_a_residual_differ_by_seed_alone(slow_rows):
    truth = fit_truth(slow_rows, H100)
    assert truth.drawn(1) == truth.drawn(1) != truth.drawn(2)
    model = CostModel(device=H100, model=SPEC, variants=load_variants(), residual=truth)
    assert model.perturbed(4).residual == truth.drawn(4)


def test_a_residual_slows_slices_side_by_side_and_stealing_alike(slow_rows):
    truth = fit_truth(slow_rows, H100)
    both = plan_of(*(uniform_slice("sm_budget", 132, tile) for tile in TILES[:2]), bounds=(64,))
    counts = np.array([[8] * 8 + [300] * 8], dtype=np.int32)
    plain = CostModel(device=H100, model=SPEC, variants=load_variants())
    for plan in (both, replace(both, steal=True)):
        times = [model.work(plan, counts).layer_times(0) for model in (plain, replace(plain, residual=truth))]
        assert 1.1 < times[1].ns / times[0].ns < 2


def test_a_belief_is_of_another_form_and_never_faster_than_its_ceilings(slow_rows):
    factors = fit_belief(slow_rows, H100)
    assert len(factors) == len(CEILINGS)
    assert all(0 < factor <= 1 for factor in factors)
    assert min(factors) < 0.95
    device = believed(H100, factors)
    assert max(device.read_curve_bytes_per_s) <= max(H100.read_curve_bytes_per_s)
    assert device.sustained_flops_per_s <= device.matrix_flops_per_s


def test_too_few_points_are_refused(slow_rows):
    with pytest.raises(ValueError, match=r"6 usable points of 1 loads; calibration takes 40 of 6 or more"):
        check_enough(slow_rows[:6])


def test_a_residual_says_what_was_measured_there_nothing_far_away_and_draws_spread_as_its_bar_does():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(120, len(NAMES)))
    ratio = 0.2 * np.sin(x[:, 0]) + 0.1
    truth = fit(x, ratio)
    assert np.abs(truth.log_factor(x) - ratio).max() < 0.05
    between = rng.normal(size=(200, len(NAMES))) * 0.7
    error = truth.log_factor(between) - (0.2 * np.sin(between[:, 0]) + 0.1)
    assert np.std(error) < 0.5 * np.std(ratio)
    near, wide = (
        truth.widening(x[:1]),
        truth.widening(np.full((1, len(NAMES)), 1.5) * np.sign(rng.normal(size=len(NAMES)))),
    )
    assert wide > near >= 1
    drawn = np.array([truth.drawn(seed).log_factor(between[:50]) for seed in range(200)])
    expected = truth.noise * np.sqrt(
        np.square(truth.widening(between[:50]) / (1 + np.linalg.norm(truth._beyond(between[:50]), axis=-1))) - 1
    )
    assert np.median(drawn.std(axis=0) / np.maximum(expected, 1e-9)) == pytest.approx(1.0, abs=0.3)


def test_constants_of_a_device_are_found_again():
    kept = TileConstants(
        fill_ns=2500.0, cell_ns=0.05, read_part=0.9, matrix_part=0.9, stream_ns=300.0, overlap=0.3, ramp_ns=5000.0,
        logit_ns=0.006,
    )  # fmt: skip
    rows = [replace(row, ns=row.predicted_ns(H100, constants=kept)) for row in rows_of(lambda *_: 1.0)]
    found = fit_constants(rows, H100)
    off = [abs(row.predicted_ns(H100, constants=found) / row.ns - 1) for row in rows]
    assert np.mean(off) < 0.02
    assert abs(found.read_part / kept.read_part - 1) < 0.05
    assert abs(found.ramp_ns / kept.ramp_ns - 1) < 0.3
