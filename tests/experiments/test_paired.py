"""Laws and calibration of the paired statistics, on series whose truth is known."""

import numpy as np
import pytest

from expertslice.experiments import paired

SERIES = 200
STEPS = 400


def autoregressive(rng, rows, steps, phi, sd):
    """Return AR(1) series of that correlation and standard deviation."""
    noise = rng.standard_normal((rows, steps)) * sd * np.sqrt(1 - phi**2)
    series = np.empty((rows, steps))
    series[:, 0] = rng.standard_normal(rows) * sd
    for i in range(1, steps):
        series[:, i] = phi * series[:, i - 1] + noise[:, i]
    return series


def step_times(seed, phi, rows=SERIES, steps=STEPS):
    """Return two sets of step times (µs) that share their load, as policies on the same steps do."""
    rng = np.random.default_rng(seed)
    load = 400 * np.exp(autoregressive(rng, rows, steps, 0.8, 0.15))
    return [load * (1 + autoregressive(rng, rows, steps, phi, 0.04)) for _ in range(2)]


def found_different(a, b, seed):
    """Return whether the comparison tells the two series apart."""
    times_PN = np.stack([a, b])
    deviation_BP = paired.block_bootstrap(times_PN, 0, seed=seed, num_draws=500)
    return paired.compare_all(paired.effect_percent(times_PN, 0), deviation_BP).differ_PP[0, 1]


@pytest.mark.parametrize(("phi", "most"), [(0.0, 0.08), (0.3, 0.08), (0.5, 0.08), (0.8, 0.12)])
def test_equal_policies_are_rarely_called_different(phi, most):
    a, b = step_times(11, phi)
    assert np.mean([found_different(a[i], b[i], i) for i in range(SERIES)]) <= most


@pytest.mark.parametrize("phi", [0.0, 0.5])
def test_a_two_percent_slowdown_is_found(phi):
    a, b = step_times(12, phi)
    assert np.mean([found_different(a[i], 1.02 * b[i], i) for i in range(SERIES)]) >= 0.8


def test_many_equal_policies_rarely_give_any_difference():
    rng = np.random.default_rng(13)
    found = 0
    for i in range(60):
        load = 400 * np.exp(autoregressive(rng, 1, STEPS, 0.8, 0.15))
        times_PN = load * (1 + autoregressive(rng, 6, STEPS, 0.3, 0.03))
        deviation_BP = paired.block_bootstrap(times_PN, 0, seed=i, num_draws=500)
        found += paired.compare_all(paired.effect_percent(times_PN, 0), deviation_BP).differ_PP.any()
    assert found / 60 <= 0.15


def test_permuting_policies_permutes_ranks_and_intervals():
    rng = np.random.default_rng(2)
    times_PN = 400 * (1 + autoregressive(rng, 5, STEPS, 0.4, 0.05)) * np.array([1, 1.001, 0.97, 1.05, 0.93])[:, None]
    order = np.array([3, 1, 0, 4, 2])

    def outcome(rows_PN, reference):
        deviation_BP = paired.block_bootstrap(rows_PN, reference, seed=5)
        effect_P = paired.effect_percent(rows_PN, reference)
        comparison = paired.compare_all(effect_P, deviation_BP)
        return paired.ranks_with_ties(effect_P, comparison.differ_PP), comparison.low_PP

    ranks, low_PP = outcome(times_PN, 0)
    moved, moved_low_PP = outcome(times_PN[order], 2)
    assert moved == [ranks[p] for p in order]
    np.testing.assert_allclose(moved_low_PP, low_PP[np.ix_(order, order)])


def test_ranks_share_places_and_skip_them():
    effect_P = np.array([0.0, -6.2, -5.9, 1.8])
    differ_PP = np.abs(effect_P[:, None] - effect_P[None, :]) > 1
    ranks = paired.ranks_with_ties(effect_P, differ_PP)
    assert [(r.rank, r.tied) for r in ranks] == [(3, False), (1, True), (1, True), (4, False)]


def test_identical_policies_tie_and_exact_differences_do_not():
    times = np.linspace(300, 500, 64)
    times_PN = np.stack([times, times, 1.03 * times])
    deviation_BP = paired.block_bootstrap(times_PN, 0, seed=1)
    differ_PP = paired.compare_all(paired.effect_percent(times_PN, 0), deviation_BP).differ_PP
    assert not differ_PP[0, 1]
    assert differ_PP[0, 2]


def test_one_step_gives_no_spread_and_no_error():
    deviation_BP = paired.block_bootstrap(np.array([[400.0], [410.0]]), 0, seed=1)
    np.testing.assert_allclose(paired.half_width(deviation_BP), 0, atol=1e-9)


def test_blocks_lengthen_with_correlation():
    rng = np.random.default_rng(3)
    lengths = [
        np.mean([paired.block_length(row) for row in autoregressive(rng, 20, STEPS, phi, 1)]) for phi in (0, 0.5, 0.9)
    ]
    assert lengths[0] < 3 < lengths[1] < lengths[2] <= STEPS / 4


def test_interval_of_independent_steps_matches_theory():
    rng = np.random.default_rng(4)
    ratio = 1 + 0.05 * rng.standard_normal(900)
    times_PN = np.stack([np.full(900, 400.0), 400 * ratio])
    half = paired.half_width(paired.block_bootstrap(times_PN, 0, seed=1, length=1))[1]
    assert half == pytest.approx(1.96 * 100 * 0.05 / 30, rel=0.25)


def test_few_parameter_draws_give_wide_intervals():
    rng = np.random.default_rng(5)
    few, many = (paired.half_width(paired.t_draws(rng.standard_normal((m, 1)), seed=0))[0] for m in (4, 400))
    assert many == pytest.approx(1.96, rel=0.15)
    exact_4 = paired.half_width(paired.t_draws(np.ones((4, 1)), seed=0))[0]
    assert exact_4 == pytest.approx(2.78, rel=0.1)
    assert few > 0


def test_a_policy_left_out_of_draws_has_wider_tails_and_the_others_keep_theirs():
    deviations_MP = np.ones((16, 2))
    deviations_MP[4:, 1] = np.nan
    half_P = paired.half_width(paired.t_draws(deviations_MP, seed=0))
    assert half_P[0] == pytest.approx(2.12, rel=0.1)
    assert half_P[1] == pytest.approx(2.78, rel=0.1)


def test_who_only_loses_when_the_model_is_wrong_has_a_one_sided_interval():
    rng = np.random.default_rng(7)
    deviations_MP = np.stack([np.zeros(16), 8 + 3 * rng.standard_normal(16)], axis=1)
    deviation_BP = paired.t_draws(deviations_MP, seed=0, about_mean=True)
    effect_P = np.array([0.0, 2.7])
    low_P, high_P = paired.interval(effect_P, deviation_BP)
    mean, sd = deviations_MP[:, 1].mean(), deviations_MP[:, 1].std(ddof=1)
    assert high_P[1] == pytest.approx(2.7 + mean + 2.13 * sd * np.sqrt(1 + 1 / 16), rel=0.05)
    assert low_P[1] <= 2.7
    assert paired.compare_all(effect_P, deviation_BP).differ_PP[1, 0]
    assert not paired.compare_all(np.array([0.0, -2.7]), deviation_BP).differ_PP[1, 0]


@pytest.mark.parametrize("m", [3, 8, 16])
def test_intervals_of_few_draws_hold_the_next_one(m):
    rng = np.random.default_rng(8)
    inside = 0
    for i in range(400):
        drawn = 5 + 2 * rng.standard_normal(m + 1)
        draws_BP = paired.t_draws(drawn[:m, None], seed=i, about_mean=True, num_draws=500)
        low, high = np.quantile(draws_BP[:, 0], [0.025, 0.975])
        inside += low <= drawn[m] <= high
    assert 0.91 <= inside / 400 <= 0.98


def test_compositions_add_only_what_blocks_do_not_explain():
    effect_CP = np.array([[0.0, -3.0], [0.0, -5.0], [0.0, -4.0]])
    wide = paired.between_compositions(effect_CP, np.array([[0.0, 2.0]] * 3))
    narrow = paired.between_compositions(effect_CP, np.zeros((3, 2)))
    assert np.all(wide == 0)
    assert np.sqrt((narrow[:, 1] ** 2).mean()) == pytest.approx(1.0)


def test_the_same_seed_gives_the_same_draws():
    times_PN = np.random.default_rng(6).random((3, 50))
    first, second = (paired.block_bootstrap(times_PN, 0, seed=9) for _ in range(2))
    np.testing.assert_array_equal(first, second)
