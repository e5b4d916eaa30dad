"""Builders of small layers: shapes that fit no tile, outputs poisoned with NaN."""

import pytest
import torch

from expertslice.kernels.spec import TORCH_DTYPE, LaunchSpec, LayerLaunch, RouterSpec, SliceLaunch
from expertslice.kernels.weights import random_weights
from expertslice.kernels.workspace import Workspace
from expertslice.traces.schema import MoeSpec


def launch_spec(block_m=16, block_n=32, block_k=32, num_ctas=3, **options):
    return LaunchSpec(
        block_m=block_m, block_n=block_n, block_k=block_k, num_warps=4, num_stages=2, num_ctas=num_ctas, **options
    )


def slice_launch(up=None, down=None):
    return SliceLaunch(up=up or launch_spec(), down=down or up or launch_spec())


@pytest.fixture
def tile():
    return launch_spec


@pytest.fixture
def two_slices():
    """Return a layout of two slices whose tiles differ in every direction."""

    def build(**options):
        cold = slice_launch(launch_spec(), launch_spec(block_m=32, block_n=16, num_ctas=2))
        hot = slice_launch(launch_spec(block_m=32, block_n=64, num_ctas=1), launch_spec(block_k=16))
        return LayerLaunch(slices=(cold, hot), **options)

    return build


@pytest.fixture
def make_layer():
    """Return a spec, its weights and a workspace with every output poisoned."""

    def build(kind="swiglu", dtype="bf16", *, d_model=37, d_ff=(40,), num_experts=5, top_k=2, max_tokens=16, bias=True):
        spec = MoeSpec(
            name="tiny",
            num_layers=1,
            num_experts=num_experts,
            top_k=top_k,
            d_model=d_model,
            d_ff=d_ff,
            kind=kind,
            dtype=dtype,
        )
        ws = Workspace.allocate(spec, max_tokens, "cpu")
        for poisoned in (*ws.hidden, ws.rows_ND, ws.out_TD):
            poisoned.fill_(float("nan"))
        return spec, random_weights(spec, "cpu", bias=bias), ws

    return build


@pytest.fixture
def make_batch():
    """Return tokens and logits of a seed."""

    def build(spec, num_tokens, seed=0):
        generator = torch.Generator().manual_seed(seed)
        x_TD = torch.randn(num_tokens, spec.d_model, generator=generator).to(TORCH_DTYPE[spec.dtype])
        return x_TD, torch.randn(num_tokens, spec.num_experts, generator=generator)

    return build


@pytest.fixture
def router_of():
    return RouterSpec.of
