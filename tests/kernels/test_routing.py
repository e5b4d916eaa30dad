"""Routing against its definition: ids, weights, counts, order of rows, tile queues."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertslice.kernels import reference, routing
from expertslice.kernels.queues import EXPERT_BITS, EXPERT_MASK
from expertslice.kernels.routing import route
from expertslice.kernels.spec import (
    MAX_SLICES,
    LaunchSpec,
    LayerLaunch,
    RouterSpec,
    SliceLaunch,
    TokenRule,
    encode_plan,
)
from expertslice.kernels.workspace import Workspace
from expertslice.traces.schema import MoeSpec

INF, NAN = float("inf"), float("nan")


def workspace(router: RouterSpec, max_tokens: int) -> Workspace:
    spec = MoeSpec(
        name="t", num_layers=1, num_experts=router.num_experts, top_k=router.top_k, d_model=16, d_ff=(16,), dtype="fp32"
    )
    ws = Workspace.allocate(spec, max_tokens, "cpu")
    for poisoned in (ws.ids_TK, ws.counts_E, ws.offsets_E1, ws.row_slot_N, ws.tiles_QC, ws.begins_QS, ws.ready_2C):
        poisoned.fill_(-77)
    ws.weights_TK.fill_(NAN)
    return ws


def read_queue(ws: Workspace, row_list: int, slice_id: int, block_m: int) -> list[tuple[int, int]]:
    """Return a slice's row tiles as (expert, first row within the expert), as a drain would walk them."""
    begin, end = ws.begins_QS[row_list, slice_id : slice_id + 2].tolist()
    entries = ws.tiles_QC[row_list, begin:end].tolist()
    firsts = [(entry & EXPERT_MASK.value, begin + i - (entry >> EXPERT_BITS.value)) for i, entry in enumerate(entries)]
    return [(expert, m * block_m) for expert, m in firsts]


ROUTERS = [
    RouterSpec(num_experts=8, top_k=2),
    RouterSpec(num_experts=5, top_k=5, renormalise=False),
    RouterSpec(num_experts=20, top_k=3, score="sigmoid", scale=2.5),
    RouterSpec(num_experts=16, top_k=4, score="sigmoid", num_groups=4, top_groups=2),
    RouterSpec(num_experts=16, top_k=3, renormalise=False, num_groups=8, top_groups=2),
    RouterSpec(num_experts=1, top_k=1),
]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: f"{r.score}-{r.num_experts}-{r.top_k}-{r.num_groups}")
@pytest.mark.parametrize("num_tokens", [1, 7, 45, 70])
def test_routing_is_its_definition(router, num_tokens, two_slices):
    # 7 fit one CTA; the last of two CTAs finishes 45; 70 take two launches.
    launch, ws = two_slices(), workspace(router, 70)
    ws.plan.copy_(encode_plan(len(launch.slices), router.num_experts, [e % 2 for e in range(router.num_experts)]))
    logits_TE = torch.randn(num_tokens, router.num_experts, generator=torch.Generator().manual_seed(num_tokens)) * 3
    bias_E = torch.linspace(-0.2, 0.2, router.num_experts) if router.score == "sigmoid" else None
    route(logits_TE, router, launch, ws, bias_E=bias_E)
    ids_TK, weights_TK = reference.route(logits_TE, router, bias_E=bias_E)
    counts_E, places_N = reference.dispatch(ids_TK, router.num_experts)
    assert torch.equal(ws.ids_TK[:num_tokens], ids_TK)
    torch.testing.assert_close(ws.weights_TK[:num_tokens], weights_TK, rtol=2e-6, atol=1e-7)
    assert torch.equal(ws.counts_E, counts_E)
    assert ws.offsets_E1.tolist() == [0, *counts_E.cumsum(0).tolist()]
    assert torch.equal(ws.row_slot_N[: len(places_N)], places_N)


@pytest.mark.parametrize("num_experts", [8, 128, 300])
def test_routing_is_its_definition_in_the_largest_blocks(num_experts, two_slices, monkeypatch):
    monkeypatch.setattr(routing, "WAVE_BLOCKS", 1)
    router, ws = (
        RouterSpec(num_experts=num_experts, top_k=2),
        workspace(RouterSpec(num_experts=num_experts, top_k=2), 150),
    )
    ws.plan.copy_(encode_plan(2, num_experts))
    logits_TE = torch.randn(150, num_experts, generator=torch.Generator().manual_seed(num_experts))
    route(logits_TE, router, two_slices(), ws)
    ids_TK, _ = reference.route(logits_TE, router)
    counts_E, places_N = reference.dispatch(ids_TK, num_experts)
    assert torch.equal(ws.ids_TK[:150], ids_TK)
    assert torch.equal(ws.counts_E, counts_E)
    assert torch.equal(ws.row_slot_N[: len(places_N)], places_N)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_bad_logits_give_valid_experts_and_finite_weights(score, two_slices):
    router = RouterSpec(num_experts=4, top_k=2, score=score)
    logits_TE = torch.tensor(
        [[NAN] * 4, [INF, NAN, INF, 0.0], [-INF] * 4, [-INF, 1.0, NAN, 0.5], [0.0, -0.0, 0.0, -0.0], [INF] * 4]
    )
    ws = workspace(router, 6)
    ws.plan.copy_(encode_plan(2, 4))
    route(logits_TE, router, two_slices(), ws)
    assert ws.ids_TK.tolist() == [[0, 1], [0, 2], [0, 1], [1, 3], [0, 1], [0, 1]]
    assert torch.equal(ws.ids_TK, reference.route(logits_TE, router)[0])
    assert torch.isfinite(ws.weights_TK).all()
    if score == "softmax":
        torch.testing.assert_close(ws.weights_TK.sum(1), torch.ones(6))


@pytest.mark.parametrize("num_rows", [20, 50, 66])
@pytest.mark.parametrize("live", [0, 1, 12, 20])
def test_padding_activates_no_expert(live, num_rows, two_slices):
    router, launch = RouterSpec(num_experts=6, top_k=2), two_slices()
    ws = workspace(router, num_rows)
    ws.plan.copy_(encode_plan(len(launch.slices), 6))
    logits_TE = torch.randn(num_rows, 6, generator=torch.Generator().manual_seed(1))
    route(logits_TE, router, launch, ws, num_tokens=torch.tensor([live], dtype=torch.int32))
    ids_TK, weights_TK = reference.route(logits_TE, router, num_tokens=live)
    assert torch.equal(ws.ids_TK, ids_TK)
    torch.testing.assert_close(ws.weights_TK, weights_TK)
    assert ws.counts_E.sum() == 2 * live
    assert ws.begins_QS[0, 2] == len(read_queue(ws, 0, 0, 16) + read_queue(ws, 0, 1, 32))


@st.composite
def plans(draw):
    num_experts = draw(st.integers(1, 9))
    num_slices = draw(st.integers(1, 4))
    slice_ids = st.integers(0, num_slices - 1)
    pinned = draw(st.lists(slice_ids, min_size=num_experts, max_size=num_experts))
    bounds = tuple(sorted(draw(st.sets(st.integers(1, 40), max_size=3))))
    rule = TokenRule(bounds=bounds, slice_ids=tuple(draw(slice_ids) for _ in range(len(bounds) + 1)))
    blocks = st.lists(st.sampled_from([16, 32, 64]), min_size=num_slices, max_size=num_slices)
    skew = draw(st.floats(0, 6))
    return (
        num_experts,
        draw(blocks),
        draw(blocks),
        draw(st.sampled_from([pinned, rule])),
        draw(st.sampled_from(["expert", "heavy", "light"])),
        skew,
        draw(st.integers(1, 40)),
    )


@given(plans())
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_every_row_is_in_one_queue_once(case):
    num_experts, ups, downs, placement, tile_order, skew, num_tokens = case
    router = RouterSpec(num_experts=num_experts, top_k=min(2, num_experts))
    tiles = [LaunchSpec(block_m=m, block_n=32, block_k=32, num_warps=4, num_stages=2, num_ctas=1) for m in ups + downs]
    pairs = zip(tiles[: len(ups)], tiles[len(ups) :], strict=True)
    launch = LayerLaunch(slices=tuple(SliceLaunch(up=up, down=down) for up, down in pairs))
    ws = workspace(router, num_tokens)
    ws.plan.copy_(encode_plan(len(launch.slices), num_experts, placement, tile_order=tile_order))
    logits_TE = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(num_tokens))
    route(logits_TE - skew * torch.arange(num_experts), router, launch, ws)
    counts_E = ws.counts_E.tolist()
    assert sum(counts_E) == num_tokens * router.top_k
    if isinstance(placement, TokenRule):
        placement = [placement.slice_ids[sum(n >= b for b in placement.bounds)] for n in counts_E]
    for row_list, blocks in enumerate((ups, downs)[: launch.num_lists]):
        expected = reference.queues(counts_E, placement, blocks, tile_order)
        assert [read_queue(ws, row_list, s, m) for s, m in enumerate(blocks)] == expected
        covered = sorted((e, r) for s, m in enumerate(blocks) for e, f in expected[s] for r in range(f, f + m))
        rows = [(e, r) for e, r in covered if r < counts_E[e]]
        assert rows == [(e, r) for e in range(num_experts) for r in range(counts_E[e])]
    assert not ws.tickets.any()
    assert not ws.ready_2C[:, : ws.begins_QS[0, len(ups)]].any()


def test_a_plan_names_slices_that_exist(two_slices):
    launch = two_slices()
    with pytest.raises(ValueError, match=r"slice ids \[0, 2\]; the layout has slices 0\.\.1"):
        encode_plan(len(launch.slices), 3, [0, 2, 0])
    with pytest.raises(ValueError, match="slices for 2 experts; the model has 3"):
        encode_plan(len(launch.slices), 3, [0, 1])
    with pytest.raises(ValueError, match="tile order 'odd'"):
        encode_plan(len(launch.slices), 3, tile_order="odd")
    with pytest.raises(ValueError, match="must rise"):
        TokenRule(bounds=(4, 4), slice_ids=(0, 1, 0))
    with pytest.raises(ValueError, match="0 slices"):
        LayerLaunch(slices=())
    assert len(encode_plan(len(launch.slices), 3)) > MAX_SLICES


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 4, "top_k": 5}, "top_k 5 of 4 experts"),
        ({"num_experts": 4, "top_k": 2, "score": "tanh"}, "allowed are softmax, sigmoid"),
        ({"num_experts": 12, "top_k": 2, "num_groups": 4}, "powers of two"),
        ({"num_experts": 16, "top_k": 5, "num_groups": 4, "top_groups": 1}, "must hold top_k experts"),
    ],
)
def test_a_router_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RouterSpec(**fields)
