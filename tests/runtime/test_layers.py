"""A layer under plans of every kind has the bits of its definition, whatever lane its slices run on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertslice.kernels import reference
from expertslice.kernels.layer import moe_layer
from expertslice.kernels.spec import RouterSpec
from expertslice.kernels.weights import random_weights
from expertslice.kernels.workspace import Workspace
from expertslice.policies.contract import ByTokens, Pinned, Plan, Setup, Slice, SliceLayout, TileVariant
from expertslice.policies.data import load_device
from expertslice.runtime.layers import launch_of, plan_words_LW
from expertslice.runtime.workload import ids_of_counts_TK, write_logits
from expertslice.traces.schema import MoeSpec

MODEL = MoeSpec(name="t", num_layers=1, num_experts=5, top_k=2, d_model=40, d_ff=(24,), dtype="bf16")
TILES = tuple(
    TileVariant(
        name=f"{m}x{n}", block_m=m, block_n=n, block_k=16, num_warps=4, num_stages=2, smem_bytes=0, regs_per_thread=64
    )
    for m, n in ((16, 32), (32, 16))
)
SETUP = Setup(device=load_device("a100-sxm4-80gb"), model=MODEL, variants=TILES)


@st.composite
def plans(draw):
    slices = tuple(
        Slice(
            mechanism="sm_budget",
            sm_count=(ctas := draw(st.integers(1, 3))),
            num_ctas=ctas,
            ctas_per_sm=1,
            up=draw(st.sampled_from(TILES)).name,
            down=draw(st.sampled_from(TILES)).name,
        )
        for _ in range(draw(st.integers(1, 3)))
    )
    ids = st.integers(0, len(slices) - 1)
    if draw(st.booleans()):
        placement = ByTokens(bounds=(2,), slice_ids=(draw(ids), draw(ids)))
    else:
        pinned = draw(st.lists(ids, min_size=5, max_size=5))
        placement = Pinned(slice_of_expert_LE=np.array([pinned], dtype=np.int16))
    return Plan(
        layout=SliceLayout(slices=slices),
        placement=placement,
        tile_order=draw(st.sampled_from(["expert", "heavy", "light"])),
        steal=draw(st.booleans()),
    )


@settings(max_examples=6, deadline=None, derandomize=True)
@given(plan=plans(), live=st.integers(0, 9))
def test_a_layer_under_any_plan_has_the_bits_of_its_definition(plan, live):
    weights, ws, router = random_weights(MODEL, "cpu"), Workspace.allocate(MODEL, 9, "cpu"), RouterSpec.of(MODEL)
    ws.rows_ND.fill_(float("nan"))
    ids_TK = ids_of_counts_TK(np.array([9, 3, 0, 1, 5]), 9, 2)
    logits_LTE = torch.empty(1, 9, 5)
    write_logits(logits_LTE, torch.from_numpy(ids_TK)[None])
    x_TD = torch.randn(9, 40, generator=torch.Generator().manual_seed(3)).bfloat16()
    ws.plan.copy_(plan_words_LW(plan, 1, 5)[0])
    num_tokens = torch.tensor([live], dtype=torch.int32)
    out_TD = moe_layer(x_TD, logits_LTE[0], weights, router, ws, launch_of(plan, SETUP), num_tokens=num_tokens)
    expected = reference.layer(x_TD, logits_LTE[0], weights, router)
    expected[live:] = 0
    assert torch.equal(out_TD, expected)
    assert torch.equal(ws.counts_E.long(), torch.from_numpy(ids_TK[:live]).flatten().bincount(minlength=5))


@pytest.mark.parametrize(("device", "descriptors"), [("h100-sxm5-80gb", True), ("a100-sxm4-80gb", False)])
def test_launches_are_those_of_the_layout(device, descriptors):
    tall = TileVariant(
        name="t", block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3, smem_bytes=0, regs_per_thread=64
    )
    setup = Setup(device=load_device(device), model=MODEL, variants=(*TILES, tall))
    owned = Slice(mechanism="green_context", sm_count=32, num_ctas=64, ctas_per_sm=2, up="t", down="16x32")
    launch = launch_of(Plan(layout=SliceLayout(slices=(owned,)), placement=ByTokens(bounds=(), slice_ids=(0,))), setup)
    (chosen,) = launch.slices
    assert (chosen.up.block_m, chosen.up.num_ctas, chosen.up.num_stages, chosen.sm_count) == (64, 64, 3, 32)
    assert chosen.up.descriptors is chosen.up.flatten is descriptors
    assert not chosen.down.descriptors
