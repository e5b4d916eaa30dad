"""The layer and its products against the definition and float64, at shapes that fit no tile, outputs poisoned."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertslice.kernels import layer, reference
from expertslice.kernels.combine import combine
from expertslice.kernels.grouped import grouped_product
from expertslice.kernels.layer import moe_layer
from expertslice.kernels.routing import route
from expertslice.kernels.spec import TORCH_DTYPE, LayerLaunch, SliceLaunch, TokenRule, encode_plan
from expertslice.kernels.weights import ExpertWeights, random_weights

MODES = {
    "chained": {},
    "stealing": {"steal": True},
    "fused": {"fused": True},
    "descriptors": {"descriptors": True},
    "gathered": {"gathered": True},
    "gathered descriptors": {"gathered": True, "descriptors": True},
    "fused descriptors": {"fused": True, "descriptors": True},
}


def agree(actual, expected, spec):
    if spec.dtype == "fp32":
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)
    else:
        assert torch.equal(actual, expected)


def relative_error(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.fixture
def launch_of(tile, two_slices):
    def build(mode):
        options = dict(MODES[mode])
        if mode in ("chained", "stealing", "gathered"):
            return two_slices(**options)
        by_desc = options.pop("descriptors", False)
        slices = (
            SliceLaunch(up=tile(descriptors=by_desc), down=tile(block_n=16, descriptors=by_desc)),
            SliceLaunch(up=tile(32, 64, num_ctas=2, descriptors=by_desc), down=tile(32, 32, descriptors=by_desc)),
        )
        return LayerLaunch(slices=slices, **options)

    return build


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["swiglu", "relu3", "gelu2"])
def test_layer_has_the_bits_of_its_definition(kind, mode, make_layer, make_batch, router_of, launch_of):
    # Descriptors need rows of a multiple of 16 bytes; pointers take any.
    d_model = 40 if "descriptors" in mode else 37
    spec, weights, ws = make_layer(kind, d_model=d_model)
    x_TD, logits_TE = make_batch(spec, 13)
    launch, router = launch_of(mode), router_of(spec)
    ws.plan.copy_(encode_plan(len(launch.slices), spec.num_experts, [0, 1, 0, 1, 1], tile_order="heavy"))
    out_TD = moe_layer(x_TD, logits_TE, weights, router, ws, launch)
    agree(out_TD, reference.layer(x_TD, logits_TE, weights, router), spec)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", ["swiglu", "relu3", "gelu2"])
def test_layer_errs_no_more_than_torch(kind, dtype, make_layer, make_batch, router_of, two_slices):
    # Every expert has its own width, one of them odd.
    spec, weights, ws = make_layer(kind, dtype, d_ff=(24, 40, 17, 33, 8))
    x_TD, logits_TE = make_batch(spec, 15, seed=3)
    launch, router = two_slices(), router_of(spec)
    ws.plan.copy_(encode_plan(len(launch.slices), spec.num_experts, TokenRule(bounds=(7,), slice_ids=(0, 1))))
    out_TD = moe_layer(x_TD, logits_TE, weights, router, ws, launch)
    expected = reference.layer(x_TD, logits_TE, weights, router)
    exact = reference.experts(x_TD.double(), *reference.route(logits_TE, router), weights)
    agree(out_TD, expected, spec)
    assert relative_error(out_TD, exact) <= 1.5 * relative_error(expected, exact)


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("live", [None, 0, 3])
def test_empty_and_padded_batches(num_tokens, live, make_layer, make_batch, router_of, two_slices):
    spec, weights, ws = make_layer()
    x_TD, logits_TE = make_batch(spec, num_tokens)
    launch, router = two_slices(), router_of(spec)
    ws.plan.copy_(encode_plan(len(launch.slices), spec.num_experts))
    on_device = None if live is None else torch.tensor([live], dtype=torch.int32)
    out_TD = moe_layer(x_TD, logits_TE, weights, router, ws, launch, num_tokens=on_device)
    agree(out_TD, reference.layer(x_TD, logits_TE, weights, router, num_tokens=live), spec)


def test_all_tokens_on_one_expert(make_layer, make_batch, router_of, two_slices):
    spec, weights, ws = make_layer(top_k=1)
    x_TD, logits_TE = make_batch(spec, 16)
    logits_TE[:, 3] += 100
    launch, router = two_slices(steal=True), router_of(spec)
    ws.plan.copy_(encode_plan(len(launch.slices), spec.num_experts, [0, 0, 0, 1, 0]))
    out_TD = moe_layer(x_TD, logits_TE, weights, router, ws, launch)
    assert ws.counts_E.tolist() == [0, 0, 0, 16, 0]
    agree(out_TD, reference.layer(x_TD, logits_TE, weights, router), spec)


@given(
    block_m=st.sampled_from([16, 32, 64]),
    block_n=st.sampled_from([16, 32, 64]),
    block_k=st.sampled_from([16, 32, 64]),
    num_ctas=st.integers(1, 5),
    pins=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    steal=st.booleans(),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_tile_grid_slice_and_stealing_change_no_bit(block_m, block_n, block_k, num_ctas, pins, steal):
    from expertslice.kernels.spec import LaunchSpec, RouterSpec
    from expertslice.kernels.workspace import Workspace
    from expertslice.traces.schema import MoeSpec

    spec = MoeSpec(name="t", num_layers=1, num_experts=4, top_k=2, d_model=24, d_ff=(40,), dtype="bf16")
    weights, ws = random_weights(spec, "cpu"), Workspace.allocate(spec, 9, "cpu")
    ws.rows_ND.fill_(float("nan"))
    tile = LaunchSpec(block_m=block_m, block_n=block_n, block_k=block_k, num_warps=4, num_stages=2, num_ctas=num_ctas)
    other = LaunchSpec(block_m=16, block_n=64, block_k=16, num_warps=4, num_stages=2, num_ctas=2)
    launch = LayerLaunch(slices=(SliceLaunch(up=tile, down=other), SliceLaunch(up=other, down=tile)), steal=steal)
    ws.plan.copy_(encode_plan(len(launch.slices), 4, pins))
    generator = torch.Generator().manual_seed(7)
    x_TD = torch.randn(9, 24, generator=generator).to(TORCH_DTYPE["bf16"])
    logits_TE = torch.randn(9, 4, generator=generator)
    out_TD = moe_layer(x_TD, logits_TE, weights, RouterSpec.of(spec), ws, launch)
    agree(out_TD, reference.layer(x_TD, logits_TE, weights, RouterSpec.of(spec)), spec)


def test_a_product_can_scale_by_the_routing_weight(make_layer, make_batch, router_of, tile):
    spec, weights, ws = make_layer("gelu2")
    x_TD, logits_TE = make_batch(spec, 6)
    launch = LayerLaunch(slices=(SliceLaunch(up=tile(), down=tile()),))
    ws.plan.copy_(encode_plan(len(launch.slices), spec.num_experts))
    route(logits_TE, router_of(spec), launch, ws)
    for product, (source, target) in enumerate([(x_TD, ws.hidden[0]), (ws.hidden[0], ws.rows_ND)]):
        grouped_product(
            source, weights.products[product], target, ws, launch, slice_id=0, product=product, num_products=2,
            epilogue=weights.epilogues[product], scale_TK=ws.weights_TK if product else None,
        )  # fmt: skip
    for token, slot in [(0, 0), (3, 1), (5, 0)]:
        row = reference.expert(x_TD[token : token + 1], weights, int(ws.ids_TK[token, slot]))[0]
        scaled = (row.float() * ws.weights_TK[token, slot]).bfloat16()
        assert torch.equal(ws.rows_ND[token * 2 + slot, : spec.d_model], scaled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_combine_is_its_definition(dtype):
    rows_TKD = torch.randn(3, 4, 50).to(dtype)
    weights_TK = torch.rand(3, 4)
    out_TD = torch.full((3, 50), float("nan"), dtype=dtype)
    combine(rows_TKD.flatten(0, 1), weights_TK, out_TD)
    assert torch.equal(out_TD, reference.combine(rows_TKD, weights_TK))


def test_each_wrong_input_has_its_sentence(make_layer, make_batch, router_of, two_slices):
    spec, weights, ws = make_layer()
    x_TD, logits_TE = make_batch(spec, 4)
    router, launch = router_of(spec), two_slices()
    other, _, other_ws = make_layer(num_experts=6)
    bias = torch.zeros(5)

    def refused(match, x=x_TD, logits=logits_TE, router=router, ws=ws, **options):
        with pytest.raises(ValueError, match=match):
            moe_layer(x, logits, weights, router, ws, launch, **options)

    refused(r"x is contiguous torch.float32 \[4, 37\] on cpu; it must be contiguous torch.bfloat16", x=x_TD.float())
    refused(r"x is strided", x=x_TD.repeat(1, 2)[:, ::2])
    refused(r"logits is contiguous torch.float32 \[4, 4\]", logits=logits_TE[:, :4].contiguous())
    refused("20 tokens; the workspace holds 16", x=x_TD.repeat(5, 1), logits=logits_TE.repeat(5, 1))
    refused("all must agree", router=router_of(other))
    refused("all must agree", ws=other_ws)
    refused("needs sigmoid scores", bias_E=bias)
    refused(r"num_tokens is contiguous torch.int64 \[1\]", num_tokens=torch.tensor([3]))
    refused(r"x is contiguous torch.bfloat16 \[4, 37\] on meta", x=x_TD.to("meta"))


def test_weights_that_do_not_fit_are_refused(make_layer, two_slices, make_batch, router_of):
    spec, weights, _ = make_layer(bias=False)
    up, down = (held.weight for held in weights.products)
    with pytest.raises(ValueError, match=r"weight 1 is contiguous torch.bfloat16 \[5, 40, 37\]; it must be"):
        ExpertWeights.stacked(spec, [up, down.mT.contiguous()])
    with pytest.raises(ValueError, match=r"weight 1 is strided"):
        ExpertWeights.stacked(spec, [up, down.mT.contiguous().mT])
    with pytest.raises(ValueError, match="1 weight tensors; kind swiglu has 2"):
        ExpertWeights.stacked(spec, [up])
    uneven, weights, ws = make_layer(d_ff=(24, 40, 17, 33, 8))
    with pytest.raises(ValueError, match="cannot be stacked"):
        ExpertWeights.stacked(uneven, [up, down])
    launch = LayerLaunch(
        slices=(SliceLaunch(up=two_slices().slices[0].up, down=two_slices().slices[0].up),), fused=True
    )
    x_TD, logits_TE = make_batch(uneven, 4)
    with pytest.raises(ValueError, match="needs experts of one width"):
        moe_layer(x_TD, logits_TE, weights, router_of(uneven), ws, launch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_m": 24}, "24x32x32"),
        ({"block_n": 512}, "from 16 to 256"),
        ({"num_ctas": 0}, "0 CTAs"),
        ({"pingpong": True}, "pingpong tile 16x32x32 with 4 warps; allowed are 64x256x64 with 4 warps"),
    ],
)
def test_a_tile_that_cannot_be_is_refused(fields, message, tile):
    with pytest.raises(ValueError, match=message):
        tile(**fields)


PINGPONG_TILE = {"block_m": 64, "block_n": 128, "block_k": 64, "pingpong": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs `gathered` rows"),
        ({"gathered": True, "steal": True}, "neither fused nor stolen"),
        ({"gathered": True, "fused": True}, "leave `gathered` out"),
        ({"prefetch_bytes": 128}, "whole lines of 128 bytes, in a dependent launch"),
        ({"prefetch_bytes": 100, "dependent": True}, "prefetch of 100 bytes"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(options, message, tile):
    pingpong = tile(**PINGPONG_TILE)
    with pytest.raises(ValueError, match=message):
        LayerLaunch(slices=(SliceLaunch(up=pingpong, down=pingpong),), **options)


def test_pingpong_tiles_say_what_they_take(make_layer, make_batch, router_of, tile):
    spec, weights, ws = make_layer()
    x_TD, logits_TE = make_batch(spec, 4)
    launch = LayerLaunch(slices=(SliceLaunch(up=tile(), down=tile(**PINGPONG_TILE)),))
    with pytest.raises(
        ValueError, match="two-byte rows of a multiple of 8 columns, experts of one width, and a Hopper"
    ):
        moe_layer(x_TD, logits_TE, weights, router_of(spec), ws, launch)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_a_gpu_that_is_too_old_is_refused(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ValueError, match=rf"cuda:0 has compute capability \({capability[0]}, .*\(8, 0\) is the least"):
        layer._check_device(torch.device("cuda:0"))
    with pytest.raises(ValueError, match="weights on cpu; the kernels need a CUDA device"):
        layer._check_device(torch.device("cpu"))
