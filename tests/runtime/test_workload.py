"""What steps put on a device: the experts that a trace says, by logits that choose them, under the plan's words."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertslice.kernels import reference
from expertslice.kernels.spec import RouterSpec, TokenRule, encode_plan
from expertslice.policies.contract import ByTokens, Pinned, Plan, Slice, SliceLayout
from expertslice.runtime.layers import plan_words_LW
from expertslice.runtime.workload import expert_ids_LTK, ids_of_counts_TK, write_logits
from expertslice.traces.schema import RoutedStep


@st.composite
def routings(draw):
    """Return distinct experts of tokens, and how many experts there are."""
    num_experts = draw(st.integers(1, 12))
    top_k, num_tokens = draw(st.integers(1, num_experts)), draw(st.integers(0, 20))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    ids = [rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)]
    return np.array(ids, dtype=np.int64).reshape(num_tokens, top_k), num_experts


@settings(deadline=None)
@given(routing=routings())
def test_drawn_experts_are_distinct_and_have_the_counts(routing):
    ids_TK, num_experts = routing
    counts_E = np.bincount(ids_TK.ravel(), minlength=num_experts)
    drawn_TK = ids_of_counts_TK(counts_E, *ids_TK.shape)
    assert drawn_TK.shape == ids_TK.shape
    assert np.array_equal(np.bincount(drawn_TK.ravel(), minlength=num_experts), counts_E)
    assert all(len(set(row)) == len(row) for row in drawn_TK.tolist())


@pytest.mark.parametrize(("counts", "num_tokens"), [([3, 0], 2), ([3, 1], 2)])
def test_counts_that_no_batch_can_have_are_refused(counts, num_tokens):
    with pytest.raises(ValueError, match="each token takes 2 different ones"):
        ids_of_counts_TK(np.array(counts), num_tokens, 2)


@settings(deadline=None, max_examples=30)
@given(routing=routings(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_logits_choose_the_given_experts_in_order(routing, dtype):
    ids_TK, num_experts = routing
    logits_LTE = torch.full((1, len(ids_TK), num_experts), float("nan"), dtype=dtype)
    write_logits(logits_LTE, torch.from_numpy(ids_TK)[None])
    router = RouterSpec(num_experts=num_experts, top_k=ids_TK.shape[1])
    chosen_TK, _ = reference.route(logits_LTE[0], router)
    assert torch.equal(chosen_TK.long(), torch.from_numpy(ids_TK))


def test_ids_of_a_trace_are_kept_layer_by_layer():
    ids_TLK = np.arange(24, dtype=np.uint16).reshape(3, 4, 2)
    step = RoutedStep(
        step=0, phase="decode", counts_LE=np.ones((4, 24), dtype=np.int32), num_tokens=3, expert_ids_TLK=ids_TLK
    )
    assert np.array_equal(expert_ids_LTK(step, 2)[1], ids_TLK[:, 1])


@pytest.mark.parametrize("order", ["expert", "heavy", "light"])
def test_words_are_those_of_each_layers_plan(order):
    one = Slice(mechanism="sm_budget", sm_count=4, num_ctas=4, ctas_per_sm=1, up="a", down="a")
    layout = SliceLayout(slices=(one, one, one))
    pinned_LE = np.random.default_rng(0).integers(0, 3, (5, 7)).astype(np.int16)
    words_LW = plan_words_LW(
        Plan(layout=layout, placement=Pinned(slice_of_expert_LE=pinned_LE), tile_order=order), 5, 7
    )
    for layer in range(5):
        assert torch.equal(words_LW[layer], encode_plan(3, 7, pinned_LE[layer].tolist(), tile_order=order))
    rule = ByTokens(bounds=(4, 9), slice_ids=(2, 0, 1))
    words_LW = plan_words_LW(Plan(layout=layout, placement=rule, tile_order=order), 2, 7)
    expected = encode_plan(3, 7, TokenRule(bounds=(4, 9), slice_ids=(2, 0, 1)), tile_order=order)
    assert torch.equal(words_LW, torch.stack([expected, expected]))
