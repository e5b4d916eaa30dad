"""Laws of predicted loads, and the contract of the policies that learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertslice.policies.planner import Planner
from expertslice.policies.predictive import Predictive
from expertslice.policies.predictors import Predictor, drawn_counts
from expertslice.policies.registry import ON_REQUEST, make_policy
from expertslice.policies.testing import PolicyContract


class TestPredictive(PolicyContract):
    @pytest.fixture
    def policy(self):
        return Predictive()


class TestPlanner(PolicyContract):
    label_free = False  # Some of the plans it tries pin experts by id.

    @pytest.fixture
    def policy(self):
        return Planner()


def learned(counts_NLE, **settings):
    predictor = Predictor(**settings)
    for counts_LE in counts_NLE:
        predictor = predictor.learn(counts_LE)
    return predictor


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), horizon=st.sampled_from([1, 2, 8]), steps=st.integers(1, 12))
def test_predictions_are_shares_and_follow_names(seed, horizon, steps):
    rng = np.random.default_rng(seed)
    counts_NLE = rng.integers(0, 50, (steps, 2, 6))
    to_E = rng.permutation(6)
    for method in ("persistence", "popularity", "blend"):
        share_LE = learned(counts_NLE, method=method, horizon=horizon).share_LE()
        assert (share_LE >= 0).all()
        np.testing.assert_allclose(share_LE.sum(axis=1), 1.0)
        renamed_LE = learned(counts_NLE[..., to_E], method=method, horizon=horizon).share_LE()
        np.testing.assert_allclose(renamed_LE, share_LE[:, to_E], atol=1e-9)
        drawn_LE = drawn_counts(share_LE, np.array([40, 7]), (seed,))
        assert drawn_LE.sum(axis=1).tolist() == [40, 7]


def test_a_steady_load_is_predicted_by_every_method():
    counts_NLE = np.tile([[[3, 1, 0, 4]]], (9, 1, 1))
    for method in ("persistence", "popularity", "blend"):
        np.testing.assert_allclose(learned(counts_NLE, method=method).share_LE(), counts_NLE[0] / 8)


def drift_errors(drift):
    """Return each method's mean error two steps ahead on a load that walks at random."""
    rng = np.random.default_rng(0)
    logit_NE = np.cumsum(drift * rng.standard_normal((200, 16)), axis=0)
    share_NE = np.exp(logit_NE) / np.exp(logit_NE).sum(axis=1, keepdims=True)
    counts_NLE = np.stack([rng.multinomial(64, share_E)[None] for share_E in share_NE])
    error = {}
    for method in ("persistence", "popularity", "blend"):
        predictor, off = Predictor(method=method, horizon=2), []
        for step in range(198):
            predictor = predictor.learn(counts_NLE[step])
            off.append(np.abs(predictor.share_LE() - counts_NLE[step + 2] / 64).sum())
        error[method] = np.mean(off[20:])
    return error


def test_the_blend_wins_under_slow_drift_and_ties_with_persistence_under_fast():
    slow, fast = drift_errors(0.05), drift_errors(0.2)
    assert slow["blend"] < min(slow["persistence"], slow["popularity"])
    assert fast["blend"] == pytest.approx(fast["persistence"], rel=0.02)


def test_both_are_made_by_name():
    assert {name: type(make_policy(name)) for name in ON_REQUEST} == {"predictive": Predictive, "planner": Planner}
