"""Synthesis: laws of the draw, the JSON form; and the fit, on known generators."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertslice.traces.choice import gumbel, top_k
from expertslice.traces.compose import Composition, compose
from expertslice.traces.fit import fit
from expertslice.traces.requests import group_requests, prompt_lengths
from expertslice.traces.schema import Provenance
from expertslice.traces.spec import SynthSpec
from expertslice.traces.statistics import summarise
from expertslice.traces.synth import synthesise, zipf_spec
from expertslice.traces.trace import ExpertLoad, RoutingTrace


@given(st.integers(0, 10**6), st.integers(1, 9), st.data())
@settings(max_examples=30, deadline=None)
def test_gumbel_top_k_never_repeats_an_expert(seed, num_experts, data):
    k = data.draw(st.integers(1, num_experts))
    rng = np.random.default_rng(seed)
    ids_NK = top_k(gumbel(rng, (50, num_experts)), k)
    assert all(len(set(row)) == k for row in ids_NK.tolist())
    assert set(ids_NK.ravel().tolist()) <= set(range(num_experts))


def test_gumbel_top_1_chooses_by_softmax():
    logit_E = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    ids_NK = top_k(logit_E + gumbel(np.random.default_rng(0), (200_000, 4)), 1)
    assert np.bincount(ids_NK[:, 0]) / 200_000 == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.005)


specs = st.builds(
    zipf_spec,
    st.integers(1, 3),
    st.integers(4, 9),
    st.integers(1, 4),
    zipf_s=st.floats(0, 2),
    prompt_tokens=st.integers(0, 3),
    decode_tokens=st.integers(1, 6),
    seed=st.integers(0, 9),
)


@given(specs, st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_draws_are_whole_and_the_same_for_the_same_seed(spec, num_requests, seed):
    trace, again = synthesise(spec, num_requests, seed), synthesise(spec, num_requests, seed)
    assert trace.expert_ids_TLK.tobytes() == again.expert_ids_TLK.tobytes()
    assert trace.num_tokens == num_requests * int(spec.tokens[0])
    flat_NK = trace.expert_ids_TLK.reshape(-1, spec.top_k)
    assert (np.diff(np.sort(flat_NK), axis=1) > 0).all(), "an expert twice in one token"
    assert flat_NK.max() < spec.num_experts
    counts = sum(step.counts_LE for step in trace.steps())
    assert (counts.sum(axis=1) == trace.num_tokens * spec.top_k).all()


def test_every_pair_of_lengths_comes_once_a_round_and_prompts_are_one_step():
    lengths = {"prompt_tokens_Q": np.array([4, 0, 2]), "decode_tokens_Q": np.array([6, 9, 0])}
    trace = synthesise(replace(zipf_spec(2, 8, 2), **lengths), 7, 5)
    groups = group_requests(trace)
    pairs = list(zip(prompt_lengths(trace, groups).tolist(), groups.lengths.tolist(), strict=True))
    assert set(pairs[:3]) == set(pairs[3:6]) == {(4, 10), (0, 9), (2, 2)}
    assert [(step.phase, step.num_tokens) for step in trace.steps() if step.phase == "prefill"] == [
        ("prefill", prompt) for prompt, _ in pairs if prompt
    ]
    assert {step.num_tokens for step in trace.steps() if step.phase == "decode"} == {1}


def test_another_seed_draws_other_tokens():
    one, two = (synthesise(zipf_spec(2, 8, 2), 3, seed) for seed in (0, 1))
    assert (one.expert_ids_TLK != two.expert_ids_TLK).any()


def test_json_keeps_every_bit():
    spec = fit(synthesise(zipf_spec(2, 8, 2, decode_tokens=20), 12, 0))
    back = SynthSpec.from_json(spec.to_json())
    assert synthesise(back, 8, 1).expert_ids_TLK.tobytes() == synthesise(spec, 8, 1).expert_ids_TLK.tobytes()
    assert back.to_json() == spec.to_json()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"expertslice-synth-2": true}', "null"])
def test_foreign_json_is_refused(text):
    with pytest.raises(ValueError, match="not a synthesis specification"):
        SynthSpec.from_json(text)


def test_counts_alone_give_their_load_back():
    share_E = np.arange(1, 17) ** -0.6
    counts = (1e5 * share_E / share_E.sum()).astype(np.int64)
    counts_SLE = np.stack([counts, counts[::-1]])[None]
    load = ExpertLoad(top_k=4, provenance=Provenance(source="test"), counts_SLE=counts_SLE, labels=("web",))
    wanted, drawn = summarise(load), summarise(synthesise(fit(load), 60, 3))
    np.testing.assert_allclose(drawn.gini_L, wanted.gini_L, rtol=0.05)
    np.testing.assert_allclose(drawn.max_mean_L, wanted.max_mean_L, rtol=0.05)
    with pytest.raises(ValueError, match="no tokens"):
        fit(replace(load, counts_SLE=np.zeros((1, 2, 16), np.int64)))


MATCHED = (
    ("gini_L", 0.1),
    ("max_mean_L", 0.12),
    ("overlap_independent_L", 0.08),
    ("overlap_LG", 0.1),
    ("overlap_request_L", 0.1),
    ("jsd_bits_L", 0.15),
    ("mutual_information_bits_L", 0.12),
    ("recall_L", 0.1),
    ("recall_set_L", 0.1),
    ("distinct_LZ", 0.05),
    ("step_max_mean_LZ", 0.1),
    ("lru_hit_LE", 0.06),
)


@pytest.mark.parametrize(
    ("spec", "num_requests"),
    [
        pytest.param(zipf_spec(2, 64, 8, prompt_tokens=12, decode_tokens=28, seed=1), 60, id="64 experts, prefill"),
        pytest.param(
            zipf_spec(2, 128, 8, zipf_s=0.8, tilt=0.6, decode_tokens=60, seed=2),
            60,
            id="128 experts",
            marks=pytest.mark.slow,
        ),
        pytest.param(zipf_spec(2, 16, 2, zipf_s=1.5, decode_tokens=120, seed=3), 80, id="very skewed"),
        pytest.param(zipf_spec(2, 8, 2, zipf_s=0.05, tilt=0.2, decode_tokens=120, seed=4), 80, id="nearly even"),
        pytest.param(zipf_spec(2, 32, 4, memory=(2, 1, 1), cross=2.0, decode_tokens=120, seed=5), 60, id="sticky"),
    ],
)
def test_a_fit_to_a_known_generator_has_its_statistics(spec, num_requests):
    trace = synthesise(spec, num_requests, 1)
    wanted = summarise(trace, lags=(1, 4, 16), batch_sizes=(1, 8, 32))
    drawn = summarise(synthesise(fit(trace), num_requests, 2), lags=(1, 4, 16), batch_sizes=(1, 8, 32))
    for name, within in MATCHED:
        one, two = np.median(getattr(wanted, name), axis=0), np.median(getattr(drawn, name), axis=0)
        np.testing.assert_allclose(two, one, rtol=within, atol=0.01, err_msg=name)


def test_a_fit_is_deterministic_and_keeps_domains_and_lengths():
    spec = zipf_spec(2, 8, 2, prompt_tokens=3, decode_tokens=9)
    domain_DLE = np.stack([np.zeros((2, 8)), np.eye(2, 8) * 3]).astype(np.float32)
    spec = replace(spec, domain_DLE=domain_DLE, weight_D=np.array([0.5, 0.5]), domains=("code", "prose"))
    trace = compose(synthesise(spec, 60, 0), Composition(batch_size=4))
    one, two = fit(trace), fit(trace)
    assert one.to_json() == two.to_json()
    assert one.domains == ("code", "prose")
    assert (one.prompt_tokens_Q == 3).all()
    assert (one.decode_tokens_Q == 9).all()
    drawn = synthesise(one, 200, 4)
    prose = drawn.expert_ids_TLK[drawn.domain_T == 1, 0] == 0
    code = drawn.expert_ids_TLK[drawn.domain_T == 0, 0] == 0
    assert prose.mean() > 1.2 * code.mean()


@pytest.mark.parametrize(
    ("spec", "num_requests"),
    [
        pytest.param(zipf_spec(2, 8, 2, decode_tokens=90), 1, id="one request"),
        pytest.param(zipf_spec(1, 8, 2, decode_tokens=30), 12, id="one layer"),
        pytest.param(zipf_spec(2, 8, 2, decode_tokens=1), 60, id="one token each"),
        pytest.param(zipf_spec(2, 8, 1, decode_tokens=20), 12, id="top-1"),
        pytest.param(zipf_spec(2, 4, 4, decode_tokens=20), 6, id="every expert"),
        pytest.param(zipf_spec(2, 8, 2, prompt_tokens=20, decode_tokens=0), 12, id="prefill only"),
        pytest.param(zipf_spec(2, 8, 2, decode_tokens=1), 1, id="a single token"),
    ],
)
def test_the_smallest_traces_can_be_fitted(spec, num_requests):
    trace = synthesise(spec, num_requests, 0)
    drawn = synthesise(fit(trace), num_requests, 1)
    assert drawn.num_tokens == trace.num_tokens
    assert group_requests(drawn).num_requests == num_requests
    if trace.num_tokens > 50:
        np.testing.assert_allclose(summarise(drawn).gini_L, summarise(trace).gini_L, atol=0.15)


def test_impossible_specifications_are_refused():
    spec = zipf_spec(2, 8, 2)
    with pytest.raises(ValueError, match="top_k 9 of 8 experts"):
        replace(spec, top_k=9)
    with pytest.raises(ValueError, match="at least one token"):
        replace(spec, decode_tokens_Q=np.array([0]))
    with pytest.raises(ValueError, match="give at least 1"):
        synthesise(spec, 0, 0)
    with pytest.raises(ValueError, match="no tokens"):
        fit(empty(synthesise(spec, 1, 0)))


def empty(trace: RoutingTrace) -> RoutingTrace:
    columns = ("request_id_T", "position_T", "phase_T", "step_T", "domain_T", "expert_ids_TLK")
    return replace(trace, **{name: getattr(trace, name)[:0] for name in columns})
