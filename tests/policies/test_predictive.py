"""Laws of the expected load, and the contract of the policies that search, predict, save energy or lay out MIG."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertslice.policies.energy import Energy
from expertslice.policies.mig_layout import MigLayout
from expertslice.policies.mixed import Mixed
from expertslice.policies.planner import Planner
from expertslice.policies.predictive import Predictive, drawn_counts
from expertslice.policies.predictor import shares, untrained
from expertslice.policies.registry import ON_REQUEST, make_policy
from expertslice.policies.testing import PolicyContract


class TestPredictive(PolicyContract):
    @pytest.fixture
    def policy(self):
        return Predictive()


class TestPlanner(PolicyContract):
    @pytest.fixture
    def policy(self):
        return Planner(price_ns=10_000)


class TestEnergy(PolicyContract):
    @pytest.fixture
    def policy(self):
        return Energy()


class TestMixed(PolicyContract):
    @pytest.fixture
    def policy(self):
        return Mixed()


class TestMigLayout(PolicyContract):
    @pytest.fixture
    def policy(self):
        return MigLayout(most_instances=2)


def learned(counts_NLE, horizon=2):
    predictor = untrained(*counts_NLE.shape[1:], horizon)
    for n in range(1, len(counts_NLE) + 1):
        predictor = predictor.learned(counts_NLE[max(0, n - 16) : n])
    return predictor


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), steps=st.integers(1, 24))
def test_expected_loads_are_shares_and_follow_names_and_draws_keep_their_rows(seed, steps):
    rng = np.random.default_rng(seed)
    counts_NLE = rng.integers(0, 50, (steps, 2, 6)).astype(np.int32)
    to_E = rng.permutation(6)
    share_LE = learned(counts_NLE).predicted(counts_NLE[-16:])
    assert (share_LE >= 0).all()
    np.testing.assert_allclose(share_LE.sum(axis=1), 1)
    renamed_LE = learned(counts_NLE[..., to_E]).predicted(counts_NLE[-16:, :, to_E])
    np.testing.assert_allclose(renamed_LE, share_LE[:, to_E], atol=1e-9)
    assert drawn_counts(share_LE, np.array([40, 7]), (seed,)).sum(axis=1).tolist() == [40, 7]


def test_a_steady_load_is_expected_as_it_is_and_an_idle_layer_stays_idle():
    counts_NLE = np.tile(np.array([[[3, 1, 0, 4], [0, 0, 0, 0]]], np.int32), (9, 1, 1))
    share_LE = learned(counts_NLE).predicted(counts_NLE)
    np.testing.assert_allclose(share_LE[0], [3 / 8, 1 / 8, 0, 1 / 2], atol=1e-9)
    assert not drawn_counts(share_LE, np.array([16, 0]), (1,))[1].any()


@pytest.mark.parametrize("drift", [0.0, 0.1, 1.0])
def test_it_learns_whether_to_trust_the_newest_step_or_the_mean(drift):
    rng = np.random.default_rng(0)
    logit_NE = 0.5 * rng.standard_normal(16) + np.cumsum(drift * rng.standard_normal((300, 16)), axis=0)
    share_NE = np.exp(logit_NE) / np.exp(logit_NE).sum(axis=1, keepdims=True)
    counts_NLE = np.stack([rng.multinomial(64, share_E)[None] for share_E in share_NE]).astype(np.int32)
    predictor, seen_NLE, errors = untrained(1, 16, 2), shares(counts_NLE), []
    for n in range(1, 299):
        history_HLE = counts_NLE[max(0, n - 16) : n]
        predictor = predictor.learned(history_HLE)
        if n > 150:
            guesses = (predictor.predicted(history_HLE), seen_NLE[n - 1], seen_NLE[:n].mean(axis=0))
            errors.append([((guess - seen_NLE[n + 1]) ** 2).sum() for guess in guesses])
    ours, newest, popular = np.mean(errors, axis=0)
    assert ours < 1.03 * min(newest, popular)


def test_each_is_made_by_name():
    made = {name: type(make_policy(name)) for name in ON_REQUEST}
    assert made == {
        "predictive": Predictive,
        "planner": Planner,
        "energy": Energy,
        "mig_layout": MigLayout,
        "mixed": Mixed,
    }
