"""Laws of the expected load, and the contract of the policy that draws from it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertslice.policies.predictive import Predictive, drawn_counts, expected_load
from expertslice.policies.registry import ON_REQUEST, make_policy
from expertslice.policies.testing import PolicyContract


class TestPredictive(PolicyContract):
    @pytest.fixture
    def policy(self):
        return Predictive()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), smoothing=st.sampled_from([0.05, 0.5, 1.0]), steps=st.integers(1, 12))
def test_expected_loads_follow_names_and_draws_keep_their_rows(seed, smoothing, steps):
    rng = np.random.default_rng(seed)
    counts_HLE = rng.integers(0, 50, (steps, 2, 6))
    to_E = rng.permutation(6)
    load_LE = expected_load(counts_HLE, smoothing)
    assert (load_LE >= 0).all()
    np.testing.assert_array_equal(expected_load(counts_HLE[..., to_E], smoothing), load_LE[:, to_E])
    assert drawn_counts(load_LE + 1, np.array([40, 7]), (seed,)).sum(axis=1).tolist() == [40, 7]


def test_a_steady_load_is_expected_as_it_is_and_an_idle_layer_stays_idle():
    counts_HLE = np.tile([[[3, 1, 0, 4], [0, 0, 0, 0]]], (9, 1, 1))
    load_LE = expected_load(counts_HLE, 0.25)
    np.testing.assert_allclose(load_LE[0] / load_LE[0].sum(), [3 / 8, 1 / 8, 0, 1 / 2])
    assert not drawn_counts(load_LE, np.array([16, 0]), (1,))[1].any()


def test_smoothing_beats_the_newest_step_and_the_mean_under_slow_drift():
    rng = np.random.default_rng(0)
    logit_NE = np.cumsum(0.1 * rng.standard_normal((200, 16)), axis=0)
    share_NE = np.exp(logit_NE) / np.exp(logit_NE).sum(axis=1, keepdims=True)
    counts_NLE = np.stack([rng.multinomial(64, share_E)[None] for share_E in share_NE])

    def error(smoothing):
        load_NE = np.stack([expected_load(counts_NLE[n - 15 : n + 1], smoothing)[0] for n in range(20, 198)])
        return np.abs(load_NE / load_NE.sum(axis=1, keepdims=True) - share_NE[22:200]).sum(axis=1).mean()

    assert error(0.25) < min(error(1.0), error(0.0))


def test_it_is_made_by_name():
    assert {name: type(make_policy(name)) for name in ON_REQUEST} == {"predictive": Predictive}
