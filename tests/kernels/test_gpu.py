"""The kernels on a real GPU: the same bits everywhere, and the bits and errors of sequential PyTorch.

One sitting checks everything: `pytest tests/kernels/test_gpu.py -m gpu`. With EXPERTSLICE_OUT naming a folder, what was
found where the matrix library or fp32 differ is written there as JSON.
"""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch.nn import functional

from expertslice.experiments.compile_tiles import SHAPES
from expertslice.kernels import reference
from expertslice.kernels.activation import silu
from expertslice.kernels.grouped import grouped_product
from expertslice.kernels.launches import PINGPONG, default_launch
from expertslice.kernels.layer import moe_layer, run_product, run_slice
from expertslice.kernels.routing import route
from expertslice.kernels.spec import (
    TORCH_DTYPE,
    LaunchSpec,
    LayerLaunch,
    RouterSpec,
    SliceLaunch,
    TokenRule,
    encode_plan,
)
from expertslice.kernels.weights import random_weights
from expertslice.kernels.workspace import Workspace
from expertslice.traces.schema import MoeSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(240),
]

NAMES = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
HOPPER_TILES = [(64, 128, 64, 4, 4), (128, 128, 64, 8, 4), (128, 256, 64, 8, 4), (16, 64, 128, 4, 4)]


def tile(shape, num_ctas=132, **options):
    return LaunchSpec(**dict(zip(NAMES, shape, strict=True)), num_ctas=num_ctas, **options)


def one_slice(up, down=None, **options):
    return LayerLaunch(slices=(SliceLaunch(up=up, down=down or up),), **options)


TILES = [tile(shape) for shape in SHAPES]
TILES += [tile(shape, descriptors=True, flatten=flat) for shape in HOPPER_TILES for flat in (False, True)]
ROWS = (1, 3, 17, 64, 200, 256)
PLAIN = one_slice(tile((64, 128, 64, 4, 4)))


def poison(ws):
    for buffer in (*ws.hidden, ws.gathered_ND, ws.rows_ND, ws.out_TD):
        buffer.fill_(float("nan"))


class Case:
    """A layer of some shape with a batch."""

    def __init__(self, num_tokens=256, seed=0, **fields):
        shape = {"num_experts": 8, "top_k": 2, "d_model": 1024, "d_ff": (768,), "kind": "swiglu", "dtype": "bf16"}
        self.spec = MoeSpec(name="gpu", num_layers=1, **(shape | fields))
        self.router = RouterSpec.of(self.spec)
        self.weights = random_weights(self.spec, "cuda", seed)
        self.ws = Workspace.allocate(self.spec, num_tokens, "cuda")
        generator = torch.Generator("cuda").manual_seed(seed + 1)
        self.x = torch.randn(num_tokens, self.spec.d_model, device="cuda", generator=generator)
        self.x = self.x.to(TORCH_DTYPE[self.spec.dtype])
        self.logits = torch.randn(num_tokens, self.spec.num_experts, device="cuda", generator=generator)

    def plan(self, num_slices, placement=None, tile_order="expert"):
        self.ws.plan.copy_(encode_plan(num_slices, self.spec.num_experts, placement, tile_order=tile_order))

    def run(self, launch=PLAIN, x=None, logits=None, **options):
        poison(self.ws)
        x, logits = self.x if x is None else x, self.logits if logits is None else logits
        return moe_layer(x, logits, self.weights, self.router, self.ws, launch, **options).clone()

    def sequential(self):
        return reference.layer(self.x, self.logits, self.weights, self.router)

    def plain(self):
        """Return the output of one plain tile, near that of sequential torch: what every other launch must equal."""
        self.plan(1)
        out, expected = self.run(), self.sequential()
        assert (out.float() - expected.float()).norm() <= 2e-3 * expected.float().norm()
        return out

    def dense(self):
        """Return each expert's output for each token [E, T, D], from a batch that sends every token to it first."""
        rows = []
        for e in range(self.spec.num_experts):
            logits = self.logits.clone()
            logits[:, e] = 1e4
            self.run(logits=logits)
            rows.append(self.ws.rows_ND.unflatten(0, (-1, self.spec.top_k))[:, 0].clone())
        return torch.stack(rows)


def write(name, found):
    if folder := os.environ.get("EXPERTSLICE_OUT"):
        (Path(folder) / name).write_text(json.dumps(found, indent=1) + "\n")


@pytest.fixture(autouse=True)
def exact_matrix_library():
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.cuda.synchronize()


@pytest.mark.parametrize("kind", ["swiglu", "relu3", "gelu2"])
def test_every_tile_gives_the_same_bits(kind):
    case = Case(kind=kind, d_model=520, d_ff=(392,))
    expected = case.plain()
    tiles = TILES if kind == "swiglu" else TILES[2:6] + TILES[-2:]
    differing = [spec for spec in tiles if not torch.equal(case.run(one_slice(spec)), expected)]
    assert not differing


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["swiglu", "relu3", "gelu2"])
def test_gathered_rows_and_pingpong_tiles_give_the_same_bits(kind, dtype):
    case = Case(num_tokens=700, kind=kind, dtype=dtype, d_model=520, d_ff=(392,))
    expected = case.plain()
    piped = tile((128, 256, 64, 8, 4), descriptors=True, flatten=True)
    for spec, num_ctas in itertools.product(PINGPONG, (1, 7, 132)):
        chosen = replace(spec, num_ctas=num_ctas)
        for up, down in ((chosen, chosen), (piped, chosen), (chosen, piped)):
            assert torch.equal(case.run(one_slice(up, down, gathered=True)), expected), (up, down)
    chosen = replace(PINGPONG[0], num_ctas=66)
    case.plan(2, [0, 1] * 4, "heavy")
    slices = (SliceLaunch(up=chosen, down=chosen), SliceLaunch(up=piped, down=chosen))
    assert torch.equal(case.run(LayerLaunch(slices=slices, gathered=True)), expected)


@triton.jit
def silu_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, silu(tl.load(x_ptr + at)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_has_the_bits_of_torch_for_every_two_byte_number(dtype):
    x = torch.arange(-(2**15), 2**15, device="cuda").short().view(dtype).float()
    out = torch.empty_like(x)
    silu_kernel[(64,)](x, out, BLOCK=1024)
    expected = functional.silu(x)
    differs = (out.view(torch.int32) != expected.view(torch.int32)) & ~(out.isnan() & expected.isnan())
    assert not x[differs].tolist()


def test_grids_slices_orders_and_stealing_change_no_bit():
    case = Case(num_tokens=300, num_experts=16, top_k=4)
    expected = case.plain()
    hot, cold = tile((128, 128, 64, 8, 4)), tile((16, 128, 64, 4, 4))
    rng = torch.Generator().manual_seed(5)
    for num_ctas, steal, fused in itertools.product((1, 7, 96), (False, True), (False, True)):
        if steal and fused:
            continue
        up, down = replace(hot, num_ctas=num_ctas), replace(hot if fused else cold, num_ctas=num_ctas)
        other = replace(cold, num_ctas=33)
        slices = (SliceLaunch(up=up, down=down), SliceLaunch(up=other, down=other if fused else up))
        launch = LayerLaunch(slices=slices, steal=steal, fused=fused)
        for order in ("expert", "heavy", "light"):
            case.plan(2, torch.randint(2, (16,), generator=rng).tolist(), order)
            assert torch.equal(case.run(launch), expected), launch
        case.plan(2, TokenRule(bounds=(60, 90), slice_ids=(1, 0, 1)))
        assert torch.equal(case.run(launch), expected), launch


def test_slices_on_streams_give_the_same_bits():
    case = Case(num_tokens=512, num_experts=16, kind="relu3")
    expected = case.plain()
    streams = [torch.cuda.Stream() for _ in range(2)]
    tiles = [tile((128, 128, 64, 8, 4), 66), tile((64, 128, 64, 4, 4), 66)]
    for steal in (False, True):
        launch = LayerLaunch(slices=tuple(SliceLaunch(up=t, down=t) for t in tiles), steal=steal)
        case.plan(2, [0] * 12 + [1] * 4)
        for _ in range(20):
            poison(case.ws)
            route(case.logits, case.router, launch, case.ws)
            for product in range(3) if steal else (None,):
                for slice_id, stream in enumerate(streams):
                    stream.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(stream):
                        if steal:
                            run_product(case.x, case.weights, case.ws, launch, slice_id=slice_id, product=product)
                        else:
                            run_slice(case.x, case.weights, case.ws, launch, slice_id=slice_id)
                for stream in streams:
                    torch.cuda.current_stream().wait_stream(stream)
            rows = case.ws.rows_ND.unflatten(0, (-1, 2))
            assert torch.equal(reference.combine(rows, case.ws.weights_TK), expected)


def test_neighbours_and_batch_size_change_no_bit():
    case = Case(num_tokens=256)
    whole = case.run()
    for num_tokens in (1, 3, 17, 64, 200):
        for start in (0, 256 - num_tokens):
            rows = slice(start, start + num_tokens)
            for launch in (PLAIN, default_launch(case.spec, num_tokens)):
                assert torch.equal(case.run(launch, case.x[rows], case.logits[rows]), whole[rows])
    case.x[1:] = torch.randn_like(case.x[1:])
    case.logits[1:] = torch.randn_like(case.logits[1:])
    assert torch.equal(case.run()[0], whole[0])


@pytest.mark.parametrize("k_dim", [4096, 14336])
def test_long_sums_give_the_same_bits(k_dim):
    case = Case(num_tokens=96, num_experts=2, top_k=1, d_model=512, d_ff=(k_dim,), kind="gelu2")
    expected = case.plain()
    for shape in ((16, 128, 64, 4, 4), (64, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 256, 64, 8, 4)):
        for by_desc in (False, True):
            up = tile((64, 128, 64, 4, 4))
            assert torch.equal(case.run(one_slice(up, tile(shape, descriptors=by_desc))), expected)


@pytest.mark.parametrize("pingpong", [False, True])
def test_one_graph_replays_a_thousand_routings_and_plans(pingpong):
    case, rng = Case(num_tokens=256, d_model=256, d_ff=(384,), kind="relu3"), torch.Generator().manual_seed(9)
    hot, cold = tile((128, 128, 64, 8, 4)), tile((16, 128, 64, 4, 4), 200)
    if pingpong:
        hot, cold = PINGPONG[0], replace(PINGPONG[1], num_ctas=66)
    slices = (SliceLaunch(up=cold, down=cold), SliceLaunch(up=hot, down=hot))
    launch = LayerLaunch(slices=slices, gathered=pingpong)
    num_tokens = torch.zeros(1, dtype=torch.int32, device="cuda")
    # A row's bits do not depend on who else is routed where.
    dense_ETD = case.dense()
    case.run(launch, num_tokens=num_tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_layer(case.x, case.logits, case.weights, case.router, case.ws, launch, num_tokens=num_tokens)
    wrong = 0
    for step in range(1000):
        live = int(torch.randint(257, (), generator=rng))
        skew = float(torch.rand((), generator=rng)) ** 2 * 20
        logits = torch.randn(256, 8, generator=rng) + skew * torch.randn(8, generator=rng)
        bounds = tuple(sorted({int(b) for b in torch.randint(1, 200, (2,), generator=rng)}))
        ids = torch.randint(2, (8,), generator=rng).tolist()
        rule = TokenRule(bounds=bounds, slice_ids=tuple(ids[: len(bounds) + 1]))
        case.plan(2, (ids, rule)[step % 2], ("expert", "heavy", "light")[step % 3])
        case.logits.copy_(logits)
        num_tokens.fill_(live)
        graph.replay()
        ids_TK, weights_TK = reference.route(case.logits, case.router)
        token_T1 = torch.arange(256, device="cuda")[:, None]
        expected = reference.combine(dense_ETD[ids_TK.long(), token_T1], weights_TK)
        expected[live:] = 0
        wrong += int(not torch.equal(out, expected))
    assert wrong == 0


@pytest.mark.parametrize("kind", ["relu3", "swiglu"])
def test_fused_and_dependent_launches_give_the_same_bits_in_graphs(kind):
    case = Case(num_tokens=64, num_experts=16, kind=kind, d_model=512, d_ff=(1024,))
    expected = case.plain()
    small = tile((16, 64, 128, 4, 4), 264)
    launches = [
        one_slice(small, dependent=True),
        one_slice(small, fused=True),
        one_slice(small, fused=True, dependent=True, prefetch_bytes=4 << 20),
        one_slice(small, dependent=True, prefetch_bytes=1 << 30),
        one_slice(replace(small, descriptors=True), fused=True, dependent=True),
        one_slice(tile((64, 128, 64, 4, 4), 132, descriptors=True), fused=True, dependent=True),
        one_slice(tile((64, 128, 64, 4, 4), 132, descriptors=True, flatten=True), gathered=True, dependent=True),
        one_slice(replace(PINGPONG[1], num_ctas=132), gathered=True, dependent=True),
        one_slice(replace(PINGPONG[2], num_ctas=132), small, gathered=True, dependent=True),
    ]
    for launch in launches:
        case.run(launch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                out = moe_layer(case.x, case.logits, case.weights, case.router, case.ws, launch)
        for _ in range(20):
            poison(case.ws)
            graph.replay()
            assert torch.equal(out, expected), launch
    with pytest.raises(ValueError, match="use a smaller grid"):
        case.run(one_slice(replace(small, num_ctas=100_000), fused=True))


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 1000, 8192])
@pytest.mark.parametrize(
    "router",
    [
        RouterSpec(num_experts=128, top_k=8),
        RouterSpec(num_experts=60, top_k=4, renormalise=False),
        RouterSpec(num_experts=256, top_k=8, score="sigmoid", num_groups=8, top_groups=4, scale=2.5),
    ],
    ids=["softmax", "whole-softmax", "groups"],
)
def test_routing_has_the_bits_of_its_definition(router, num_tokens):
    spec = MoeSpec(name="r", num_layers=1, num_experts=router.num_experts, top_k=router.top_k, d_model=16, d_ff=(16,))
    ws = Workspace.allocate(spec, num_tokens, "cuda")
    logits = torch.randn(num_tokens, router.num_experts, device="cuda")
    logits[:: max(1, num_tokens // 7), ::3] = torch.tensor([float("nan")], device="cuda")
    bias = torch.randn(router.num_experts, device="cuda") * 0.1 if router.score == "sigmoid" else None
    launch = default_launch(spec, num_tokens)
    route(logits, router, launch, ws, bias_E=bias)
    ids, weights = reference.route(logits, router, bias_E=bias)
    counts, places = reference.dispatch(ids, router.num_experts)
    assert torch.equal(ws.ids_TK, ids)
    assert torch.equal(ws.counts_E, counts)
    assert torch.equal(ws.row_slot_N[: len(places)], places)
    block_m = launch.slices[0].up.block_m
    expected = reference.queues(counts.tolist(), [0] * router.num_experts, [block_m], "expert")[0]
    assert int(ws.begins_QS[0, 1]) == len(expected)
    assert (ws.tiles_QC[0, : len(expected)] & 4095).tolist() == [e for e, _ in expected]
    torch.testing.assert_close(ws.weights_TK, weights, rtol=1e-6, atol=1e-30)
    write(f"routing_{router.num_experts}_{num_tokens}.json", {"same_weights": torch.equal(ws.weights_TK, weights)})


def test_errors_against_float64_are_those_of_torch():
    found = []
    for dtype, kind in itertools.product(("bf16", "fp16", "fp32"), ("swiglu", "relu3", "gelu2")):
        ours, theirs = [], []
        for seed in range(20):
            case = Case(num_tokens=65, seed=seed, kind=kind, dtype=dtype, d_model=256, d_ff=(200,))
            exact = reference.experts(case.x.double(), *reference.route(case.logits, case.router), case.weights)
            outs = case.run(one_slice(tile((64, 64, 64, 4, 4)))), case.sequential()
            for errors, out in zip((ours, theirs), outs, strict=True):
                errors.append(float((out.double() - exact).norm() / exact.norm()))
        ratio = sum(ours) / sum(theirs)
        found.append({"dtype": dtype, "kind": kind, "ours": max(ours), "torch": max(theirs), "ratio": ratio})
    write("errors.json", found)
    assert all(one["ratio"] <= 1.05 for one in found), found


def test_layers_against_sequential_torch():
    """Report which layers have the very bits of the sequential loop; all must be as near as a rounding."""
    found = []
    shapes = [("small", 512, 1024, 8, 2), ("medium", 1024, 2048, 16, 2), ("large", 2048, 4096, 32, 4)]
    for (name, d_model, d_ff, num_experts, top_k), kind in itertools.product(shapes, ("relu3", "swiglu")):
        case = Case(num_tokens=256, num_experts=num_experts, top_k=top_k, d_model=d_model, d_ff=(d_ff,), kind=kind)
        x, logits = case.x, case.logits
        for num_tokens in (1, 32, 256):
            case.x, case.logits = x[:num_tokens], logits[:num_tokens]
            ours = case.run(default_launch(case.spec, num_tokens), case.x, case.logits)
            theirs = case.sequential()
            share = float((ours != theirs).float().mean())
            distance = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
            found.append({"layer": name, "kind": kind, "tokens": num_tokens, "share": share, "distance": distance})
    write("sequential.json", found)
    assert all(one["distance"] <= 2e-3 for one in found), found


def test_single_products_against_the_matrix_library():
    """Report where the matrix library does not walk K in order; the shapes are those of the models compared."""
    found, fp32 = [], []
    sizes = [(2048, 1536), (768, 2048), (4096, 28672), (14336, 4096), (2048, 8192), (4096, 2048), (2048, 2048)]
    sizes += [(1024, 2048), (1024, 1024), (1024, 4096), (2048, 1024), (512, 2048), (512, 1024), (1024, 512)]
    for (k_dim, n_dim), dtype in itertools.product(sizes, ("bf16", "fp32")):
        case = Case(num_tokens=256, num_experts=1, top_k=1, d_model=k_dim, d_ff=(n_dim,), kind="gelu2", dtype=dtype)
        for rows in ROWS:
            x = case.x[:rows]
            route(case.logits[:rows], case.router, PLAIN, case.ws)
            grouped_product(
                x, case.weights.products[0], case.ws.hidden[0], case.ws, PLAIN, slice_id=0, product=0, num_products=2,
                epilogue="none",
            )  # fmt: skip
            ours, theirs = case.ws.hidden[0][:rows, :n_dim], functional.linear(x, case.weights.products[0].weight[0])
            if dtype == "fp32":
                # Neither order is that of the other: what must hold is the error against the exact product.
                exact = functional.linear(x.double(), case.weights.products[0].weight[0].double())
                errors = [float((out.double() - exact).norm() / exact.norm()) for out in (ours, theirs)]
                fp32.append({"k": k_dim, "n": n_dim, "rows": rows, "ours": errors[0], "torch": errors[1]})
            elif not torch.equal(ours, theirs):
                ulp = (ours.double() - theirs.double()).abs().max() / theirs.abs().max().double()
                share = float((ours != theirs).float().mean())
                found.append({"k": k_dim, "n": n_dim, "rows": rows, "share": share, "of_max": float(ulp)})
    write("matrix_library.json", {"bf16": found, "fp32": fp32})
    assert all(one["of_max"] < 2**-7 for one in found), found
    for rows in ROWS:
        # One row of a narrow product is a thousand numbers: errors are compared over the shapes.
        ours, theirs = (sum(one[name] for one in fp32 if one["rows"] == rows) for name in ("ours", "torch"))
        assert ours <= 1.05 * theirs, (rows, fp32)


def test_widths_of_their_own_and_odd_sizes():
    for dtype in ("bf16", "fp32"):
        case = Case(num_tokens=77, num_experts=4, d_model=333, d_ff=(100, 257, 64, 31), kind="relu3", dtype=dtype)
        exact = reference.experts(case.x.double(), *reference.route(case.logits, case.router), case.weights)
        errors = [float((out.double() - exact).norm() / exact.norm()) for out in (case.run(), case.sequential())]
        # The matrix library walks rows of odd length in an order of its own: bits differ, errors do not.
        assert errors[0] <= 1.05 * errors[1], (dtype, errors)


def test_fp32_has_the_same_bits_for_every_tile():
    case = Case(num_tokens=100, d_model=520, d_ff=(392,), dtype="fp32")
    expected = case.run()
    shapes = [(16, 64, 128, 4, 4), (16, 128, 64, 4, 4), (64, 64, 64, 4, 4), (32, 128, 64, 4, 4)]
    tiles = [tile(shape, descriptors=by_desc) for shape in shapes for by_desc in (False, True)]
    assert not [spec for spec in tiles if not torch.equal(case.run(one_slice(spec)), expected)]


def test_steady_state_allocates_nothing_and_never_waits():
    case = Case(num_tokens=96)
    for launch in (PLAIN, default_launch(case.spec, 96)):
        moe_layer(case.x, case.logits, case.weights, case.router, case.ws, launch)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                moe_layer(case.x, case.logits, case.weights, case.router, case.ws, launch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
