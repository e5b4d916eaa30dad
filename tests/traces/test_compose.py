"""Composition: whatever the arrivals and limits, every token runs once, in order, within the limits."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertslice.traces.compose import Composition, Poisson, compose
from expertslice.traces.requests import group_requests, prompt_lengths
from expertslice.traces.schema import PHASES
from expertslice.traces.synth import synthesise, zipf_spec
from expertslice.traces.trace import take_steps


def ragged_trace(num_requests=9, seed=0):
    """Draw requests of different lengths: pure decode, pure prefill and both."""
    spec = zipf_spec(2, 6, 2, seed=seed)
    lengths = {"prompt_tokens_Q": np.array([0, 5, 3, 1]), "decode_tokens_Q": np.array([4, 0, 7, 1])}
    return synthesise(replace(spec, **lengths), num_requests, seed)


compositions = st.builds(
    Composition,
    batch_size=st.integers(1, 12),
    arrival=st.one_of(
        st.just("closed"),
        st.builds(Poisson, per_step=st.floats(0.05, 3), step_ns=st.one_of(st.none(), st.just(1000))),
    ),
    prefill_chunk_tokens=st.one_of(st.none(), st.integers(1, 4)),
    max_tokens_per_step=st.one_of(st.none(), st.integers(1, 10)),
    seed=st.integers(0, 100),
)


@given(compositions, st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_every_token_runs_once_in_order(composition, num_requests):
    trace = ragged_trace(num_requests)
    composed = compose(trace, composition)
    before, after = group_requests(trace), group_requests(composed)
    assert (np.diff(composed.step_T) >= 0).all()
    for one, two in zip(before.rows(), after.rows(), strict=True):
        assert (trace.request_id_T[one] == composed.request_id_T[two]).all()
        np.testing.assert_array_equal(trace.expert_ids_TLK[one], composed.expert_ids_TLK[two])
        assert (np.diff(composed.step_T[two]) >= 0).all()


@given(compositions, st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_limits_hold_in_every_step(composition, num_requests):
    composed = compose(ragged_trace(num_requests), composition)
    groups = group_requests(composed)
    step_T = composed.step_T[groups.order_T]
    first_R, last_R = step_T[groups.offsets_R[:-1]], step_T[groups.offsets_R[1:] - 1]
    for step in range(composed.num_steps):
        tokens = np.flatnonzero(composed.step_T == step)
        assert 0 < len(tokens) <= (composition.max_tokens_per_step or len(tokens))
        assert ((first_R <= step) & (step <= last_R)).sum() <= composition.batch_size
        for request in np.unique(composed.request_id_T[tokens]):
            here = tokens[composed.request_id_T[tokens] == request]
            prefill, decode = (composed.phase_T[here] == 0).sum(), (composed.phase_T[here] == 1).sum()
            assert prefill <= (composition.prefill_chunk_tokens or prefill)
            assert decode <= 1
            assert not (prefill and decode), "a prompt ends its step before its first decode token"


@given(compositions, st.integers(1, 60), st.data())
@settings(max_examples=30, deadline=None)
def test_later_steps_are_the_same_with_and_without_those_before(composition, num_steps, data):
    trace, composition = ragged_trace(5), replace(composition, num_steps=num_steps)
    whole, skip = compose(trace, composition), data.draw(st.integers(0, num_steps - 1))
    tail = itertools.islice(whole.steps(), skip, None)
    for one, two in zip(tail, compose(trace, composition, skip=skip).steps(first_step=skip), strict=True):
        np.testing.assert_array_equal(one.expert_ids_TLK, two.expert_ids_TLK)
        np.testing.assert_array_equal(one.counts_LE, two.counts_LE)
        assert (one.counts_LE.sum(axis=1) == one.num_tokens * trace.top_k).all()
        assert (one.step, one.phase, one.arrival_ns) == (two.step, two.phase, two.arrival_ns)
    assert whole.num_steps == num_steps


def test_requests_are_drawn_again_under_ids_of_their_own():
    trace = ragged_trace(3)
    composed = compose(trace, Composition(batch_size=2, num_steps=100))
    groups = group_requests(composed)
    lengths = dict(zip(range(3), group_requests(trace).lengths, strict=True))
    whole = [len(rows) == lengths[composed.request_id_T[rows[0]] % 3] for rows in groups.rows()]
    assert groups.num_requests > 6
    assert whole.count(False) <= 2, "only what runs in the last step is cut off"


def test_another_seed_gives_another_order():
    trace = ragged_trace(8)
    one, two = (compose(trace, Composition(batch_size=2, seed=seed)) for seed in (0, 1))
    assert (one.request_id_T[:6] != two.request_id_T[:6]).any()


def test_a_batch_larger_than_the_trace_runs_everything_at_once():
    trace = ragged_trace(4)
    composed = compose(trace, Composition(batch_size=100))
    assert len(np.unique(composed.request_id_T[composed.step_T == 0])) == 4


def test_chunked_prefill_beside_decode_is_mixed():
    spec = replace(zipf_spec(1, 4, 1), prompt_tokens_Q=np.array([6]), decode_tokens_Q=np.array([6]))
    composed = compose(synthesise(spec, 4, 0), Composition(batch_size=2, prefill_chunk_tokens=2, max_tokens_per_step=3))
    phases = {PHASES[p] for p in composed.step_table.phase_S}
    assert phases == {"prefill", "decode", "mixed"}


def test_arrivals_have_times_where_a_step_has_one():
    trace = ragged_trace(6)
    timed = compose(trace, Composition(batch_size=2, arrival=Poisson(per_step=0.2, step_ns=1000)))
    arrivals = timed.step_table.arrival_ns_S[timed.step_table.arrival_ns_S >= 0]
    assert len(arrivals) > 1
    assert (np.diff(arrivals) >= 0).all()
    untimed = compose(trace, Composition(batch_size=2, arrival=Poisson(per_step=0.2)))
    assert untimed.step_table.arrival_ns_S is None
    assert compose(trace, Composition(batch_size=2)).step_table.arrival_ns_S is None


def test_prompts_end_at_the_first_decode_token():
    trace = ragged_trace(4)
    prompts = prompt_lengths(trace, group_requests(trace))
    assert sorted(prompts) == [0, 1, 3, 5]


def test_segments_are_chosen_before_composing():
    trace = ragged_trace(4)
    half = np.arange(trace.num_steps) >= trace.num_steps // 2
    table = replace(trace.step_table, segment_S=half.astype(np.uint8), segments=("early", "late"))
    trace = replace(trace, step_table=table)
    with pytest.raises(ValueError, match=r"early, late.*--segment"):
        compose(trace, Composition(batch_size=2))
    late = take_steps(trace, half)
    assert compose(late, Composition(batch_size=2)).num_tokens == late.num_tokens < trace.num_tokens


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": 1, "max_tokens_per_step": 0}])
def test_impossible_limits_are_refused(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        Composition(**wrong)


def test_impossible_arrivals_and_empty_traces_are_refused():
    with pytest.raises(ValueError, match="rate above 0"):
        Poisson(per_step=0)
    with pytest.raises(ValueError, match="no tokens"):
        compose(replace_rows(ragged_trace(1)), Composition(batch_size=1))


def replace_rows(trace):
    """Return the trace without its tokens."""
    columns = ("request_id_T", "position_T", "phase_T", "step_T", "domain_T", "expert_ids_TLK")
    return replace(trace, **{name: getattr(trace, name)[:0] for name in columns})
