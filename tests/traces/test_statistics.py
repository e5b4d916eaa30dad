"""Statistics: their definitions, and what they do not depend on."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertslice.traces.dependence import lru_hit_rate, overlap_by_lag
from expertslice.traces.schema import Provenance
from expertslice.traces.statistics import TraceStatistics, gini, jsd_bits, max_mean, summarise, zipf_s
from expertslice.traces.trace import UNKNOWN, ExpertLoad, RoutingTrace, StepTable


def trace_of(ids_TLK, request_T, num_experts, prompt_tokens=0):
    """Lay ids out as a trace, one step per token; positions count up within each request."""
    request_T = np.asarray(request_T, np.int64)
    position_T = np.array([(request_T[:t] == r).sum() for t, r in enumerate(request_T)], np.int32)
    num_tokens = len(request_T)
    return RoutingTrace(
        num_experts=num_experts,
        provenance=Provenance(source="test"),
        request_id_T=request_T,
        position_T=position_T,
        phase_T=(position_T >= prompt_tokens).astype(np.uint8),
        step_T=np.arange(num_tokens),
        domain_T=np.full(num_tokens, UNKNOWN, np.int16),
        expert_ids_TLK=np.asarray(ids_TLK, np.uint8),
        step_table=StepTable(phase_S=np.ones(num_tokens, np.uint8), segment_S=np.zeros(num_tokens, np.uint8)),
    )


def random_trace(seed=0, num_tokens=60, num_layers=3, num_experts=8, top_k=2, num_requests=4):
    rng = np.random.default_rng(seed)
    ids = rng.random((num_tokens, num_layers, num_experts)) * np.linspace(1, 2, num_experts)
    return trace_of(np.argsort(-ids)[..., :top_k], np.sort(rng.integers(num_requests, size=num_tokens)), num_experts)


def test_even_load_is_even():
    assert gini(np.full(8, 5)) == pytest.approx(0)
    assert max_mean(np.full(8, 5)) == 1
    assert zipf_s(np.full(8, 5)) == pytest.approx(0)


def test_one_hot_load_is_as_uneven_as_can_be():
    one_hot = np.array([0, 0, 7, 0])
    assert gini(one_hot) == pytest.approx(0.75)
    assert max_mean(one_hot) == 4
    assert np.isnan(zipf_s(one_hot))


def test_zipf_load_gives_its_exponent():
    assert zipf_s(1e6 * np.arange(1, 65) ** -0.8) == pytest.approx(0.8)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=40).filter(any))
def test_gini_lies_between_even_and_one_hot(load):
    assert -1e-9 <= gini(np.array(load)) <= 1 - 1 / len(load) + 1e-9


def test_divergence_of_equal_requests_is_zero_and_of_disjoint_ones_one_bit_at_most():
    assert jsd_bits(np.array([[3, 1], [6, 2]])) == pytest.approx([0, 0])
    assert (jsd_bits(np.array([[5, 0], [0, 5]])) < 1).all()


def test_overlap_counts_pairs_of_one_request_only():
    ids_TK = np.array([[0, 1], [0, 2], [3, 4], [3, 4], [3, 5]])
    overlap = overlap_by_lag(ids_TK, np.array([0, 0, 1, 1, 1]), 6, (1, 2, 3))
    assert overlap[:2] == pytest.approx([(1 + 2 + 1) / 6, 1 / 2])
    assert np.isnan(overlap[2])


def plain_lru(ids_TK, slots):
    """Count hits by keeping the stack itself."""
    stack, hits = [], 0
    for expert in ids_TK.ravel().tolist():
        hits += expert in stack[:slots]
        stack = [expert, *(e for e in stack if e != expert)]
    return hits / ids_TK.size


@given(st.integers(0, 10**6), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_cache_hits_equal_those_of_a_stack(seed, top_k):
    ids_TK = np.argsort(np.random.default_rng(seed).random((40, 6)) * np.arange(1, 7))[:, :top_k]
    hits = lru_hit_rate(ids_TK, 6)
    assert hits == pytest.approx([plain_lru(ids_TK, slots) for slots in range(7)])


@given(st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_statistics_do_not_depend_on_the_experts_names(seed):
    trace = random_trace(seed)
    renamed = np.random.default_rng(seed).permutation(trace.num_experts)
    other = trace_of(renamed[trace.expert_ids_TLK], trace.request_id_T, trace.num_experts)
    one, two = summarise(trace, batch_sizes=(1, 2)), summarise(other, batch_sizes=(1, 2))
    # Recall breaks ties by the experts' order.
    for name in TraceStatistics.__dataclass_fields__:
        if not name.startswith("recall"):
            np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-9, atol=1e-12, err_msg=name)


def test_counts_alone_give_the_load_and_nothing_else():
    trace = random_trace(1)
    counts_SLE = np.stack([step.counts_LE for step in trace.steps()]).astype(np.int64)
    load = ExpertLoad(top_k=2, provenance=Provenance(source="test"), counts_SLE=counts_SLE)
    whole, counts = summarise(trace), summarise(load)
    for name in ("gini_L", "max_mean_L", "zipf_s_L", "overlap_independent_L"):
        np.testing.assert_allclose(getattr(counts, name), getattr(whole, name))
    assert counts.overlap_LG is None
    assert counts.num_requests is None


def test_one_request_of_one_token_leaves_the_rest_undefined():
    s = summarise(trace_of([[[0, 1]]], [7], 4))
    assert np.isnan(s.overlap_LG).all()
    assert np.isnan(s.overlap_request_L).all()
    assert np.isnan(s.distinct_LZ[0, 1:]).all()
    assert s.mutual_information_bits_L is None, "one layer has no neighbour"


def test_a_trace_without_tokens_is_refused():
    trace = random_trace(2)
    empty = ExpertLoad(top_k=2, provenance=Provenance(source="test"), counts_SLE=np.zeros((3, 2, 4), np.int64))
    with pytest.raises(ValueError, match="no tokens"):
        summarise(empty)
    with pytest.raises(ValueError, match="no tokens"):
        summarise(trace_of(np.zeros((0, 3, 2)), [], trace.num_experts))


def test_statistics_become_json_after_turning_arrays_into_lists():
    s = summarise(random_trace(3))
    fields = {name: getattr(s, name) for name in TraceStatistics.__dataclass_fields__}
    json.dumps({name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in fields.items()})
