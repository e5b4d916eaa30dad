"""The MoE module against the layer's plain definition."""

from dataclasses import replace

import pytest
import torch

from expertslice.kernels import reference
from expertslice.kernels.spec import RouterSpec
from expertslice.kernels.weights import ExpertWeights
from expertslice.runtime.moe import MoeLayer
from expertslice.traces.schema import MoeSpec

SPEC = MoeSpec(name="tiny", num_layers=4, num_experts=8, top_k=2, d_model=32, d_ff=(24,), dtype="bf16")
GROUPED = RouterSpec(num_experts=8, top_k=2, score="sigmoid", num_groups=4, top_groups=2, scale=2.5)


@pytest.mark.parametrize("how", ["kernels", "reference"])
@pytest.mark.parametrize(
    ("kind", "router"), [("swiglu", None), ("relu3", replace(GROUPED, num_groups=1, top_groups=1)), ("gelu2", GROUPED)]
)
def test_a_module_gives_the_bits_of_the_layers_definition(kind, router, how):
    torch.manual_seed(0)
    spec = replace(SPEC, kind=kind)
    layer = MoeLayer(spec, router=router, how=how, choosing_bias=router is not None)
    if router is not None:
        layer.bias_E.normal_()
    x = torch.randn(2, 3, 32).bfloat16()
    out = layer(x)
    weights = ExpertWeights.stacked(layer.spec, list(layer.products))
    logits_TE = layer.logits(x.flatten(0, 1))
    ref_TD = reference.layer(x.flatten(0, 1), logits_TE, weights, layer.router, bias_E=layer.bias_E)
    assert torch.equal(out, ref_TD.view(2, 3, 32))


def test_weights_travel_by_state_dict_and_batches_may_grow():
    torch.manual_seed(0)
    one, other = (MoeLayer(SPEC, how="reference") for _ in range(2))
    other.load_state_dict(one.state_dict())
    for num_tokens in (1, 5, 2, 0):
        x = torch.randn(num_tokens, 32).bfloat16()
        assert torch.equal(one(x), other(x))


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="experts of one width"):
        MoeLayer(replace(SPEC, d_ff=tuple(range(8, 16))))
    with pytest.raises(ValueError, match="no gradients"):
        MoeLayer(SPEC, how="reference")(torch.randn(1, 32, dtype=torch.bfloat16, requires_grad=True))
