"""The MoE layer as one function over a preallocated workspace, and its parts for whoever places them on streams.

`route`, then for each slice its products in order, then `combine`. Without stealing a slice depends on nothing but the
routing, so slices may run side by side; with stealing every slice must end a product before any starts the next.

Shape letters: T tokens, E experts, K top-k, D model.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .combine import combine
from .fused import fused_experts
from .gather import gather
from .grouped import grouped_product
from .routing import route
from .spec import INTERPRET, TORCH_DTYPE, LayerLaunch, RouterSpec
from .weights import ExpertWeights
from .workspace import Workspace

LEAST_CAPABILITY = (8, 0)
Beside = Callable[[Sequence[Callable[[], None]]], None]
"""Launches part i of a layer where slice i runs."""


def run_product(
    x_TD: Tensor, weights: ExpertWeights, ws: Workspace, launch: LayerLaunch, *, slice_id: int, product: int
) -> None:
    """Launch one slice's part of one product of a routed batch."""
    num_products = len(weights.products)
    grouped_product(
        x_TD if product == 0 else ws.hidden[product - 1],
        weights.products[product],
        ws.rows_ND if product == num_products - 1 else ws.hidden[product],
        ws,
        launch,
        slice_id=slice_id,
        product=product,
        num_products=num_products,
        epilogue=weights.epilogues[product],
    )


def run_slice(x_TD: Tensor, weights: ExpertWeights, ws: Workspace, launch: LayerLaunch, *, slice_id: int) -> None:
    """Launch all products of one slice of a routed batch, in order; not for slices that steal."""
    if launch.fused:
        fused_experts(x_TD, weights, ws, launch, slice_id=slice_id)
        return
    for product in range(len(weights.products)):
        run_product(x_TD, weights, ws, launch, slice_id=slice_id, product=product)


def in_turn(parts: Sequence[Callable[[], None]]) -> None:
    """Launch the slices' parts one after another on the current stream."""
    for part in parts:
        part()


def run_experts(
    x_TD: Tensor, weights: ExpertWeights, ws: Workspace, launch: LayerLaunch, beside: Beside = in_turn
) -> None:
    """Launch all slices of a routed batch."""
    slices = range(len(launch.slices))
    if not launch.steal:
        beside([partial(run_slice, x_TD, weights, ws, launch, slice_id=s) for s in slices])
        return
    # Whoever steals a tile of a product needs every tile of the one before.
    for product in range(len(weights.products)):
        beside([partial(run_product, x_TD, weights, ws, launch, slice_id=s, product=product) for s in slices])


def moe_layer(
    x_TD: Tensor,
    logits_TE: Tensor,
    weights: ExpertWeights,
    router: RouterSpec,
    ws: Workspace,
    launch: LayerLaunch,
    *,
    bias_E: Tensor | None = None,
    num_tokens: Tensor | None = None,
    weights_TK: Tensor | None = None,
    out_TD: Tensor | None = None,
    beside: Beside = in_turn,
) -> Tensor:
    """Return the layer's output [T, D], in `out_TD` or else in the workspace, where the next call overwrites it.

    The workspace's plan says which slice drains which expert. Everything is enqueued on the current stream and nothing
    waits for the device; a captured call replays for any logits, plan of the layout and number of tokens.

    Args:
        x_TD: contiguous rows in the model's dtype.
        logits_TE: the router's scores, any float dtype.
        weights: the experts.
        router: how logits become experts and weights.
        ws: buffers for at least T tokens.
        launch: tiles and grids of each slice.
        bias_E: float32, added to sigmoid scores for choosing only.
        num_tokens: one int32 on the device: rows from there on are padding. None: all rows are tokens.
        weights_TK: take the place of the weights that the router gives.
        out_TD: where to put the output.
        beside: launches parts beside each other, after what was enqueued before and before what comes after.
    """
    out_TD = ws.out_TD[: x_TD.shape[0]] if out_TD is None else out_TD
    check_inputs(x_TD, logits_TE, weights, router, ws, bias_E=bias_E, num_tokens=num_tokens, out_TD=out_TD)
    route(logits_TE, router, launch, ws, bias_E=bias_E, num_tokens=num_tokens)
    if weights_TK is not None:
        ws.weights_TK[: x_TD.shape[0]].copy_(weights_TK)
    if x_TD.shape[0]:
        rows = gather(x_TD, ws, dependent=launch.dependent) if launch.gathered else x_TD
        run_experts(rows, weights, ws, launch, beside)
    combine(ws.rows_ND, ws.weights_TK, out_TD, num_tokens=num_tokens, dependent=launch.dependent)
    return out_TD


def check_inputs(
    x_TD: Tensor,
    logits_TE: Tensor,
    weights: ExpertWeights,
    router: RouterSpec,
    ws: Workspace,
    *,
    bias_E: Tensor | None,
    num_tokens: Tensor | None,
    out_TD: Tensor,
) -> None:
    """Refuse what the kernels would read wrongly.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit the model, the router or the workspace.
    """
    spec = weights.spec
    if (router.num_experts, router.top_k) != (spec.num_experts, spec.top_k) or ws.spec != spec:
        raise ValueError(
            f"layer {spec.name!r} has {spec.num_experts} experts, top-{spec.top_k}; the router says "
            f"{router.num_experts}, top-{router.top_k}, and the workspace is for {ws.spec.name!r}: all must agree"
        )
    num_rows = x_TD.shape[0]
    if num_rows > ws.max_tokens:
        raise ValueError(f"layer: {num_rows} tokens; the workspace holds {ws.max_tokens}: allocate a larger one")
    dtype = TORCH_DTYPE[spec.dtype]
    _expect("x", x_TD, (num_rows, spec.d_model), (dtype,), weights.device)
    _expect("out", out_TD, (num_rows, spec.d_model), (dtype,), weights.device)
    _expect("logits", logits_TE, (num_rows, spec.num_experts), tuple(TORCH_DTYPE.values()), weights.device)
    _expect("workspace", ws.plan, tuple(ws.plan.shape), (torch.int32,), weights.device)
    if bias_E is not None:
        if router.score != "sigmoid":
            raise ValueError(f"layer: a bias with score {router.score!r}; a choosing bias needs sigmoid scores")
        _expect("bias", bias_E, (spec.num_experts,), (torch.float32,), weights.device)
    if num_tokens is not None:
        _expect("num_tokens", num_tokens, (1,), (torch.int32,), weights.device)
    if not INTERPRET.value:
        _check_device(weights.device)


def _expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tuple(tensor.shape) == shape and tensor.dtype in dtypes and tensor.device == device and tensor.is_contiguous():
        return
    layout = "contiguous" if tensor.is_contiguous() else "strided"
    allowed = " or ".join(str(dtype) for dtype in dtypes)
    raise ValueError(
        f"layer: {name} is {layout} {tensor.dtype} {list(tensor.shape)} on {tensor.device}; it must be contiguous "
        f"{allowed} {list(shape)} on {device}"
    )


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"layer: weights on {device}; the kernels need a CUDA device, or TRITON_INTERPRET=1 for tests")
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise ValueError(f"layer: {device} has compute capability {capability}; {LEAST_CAPABILITY} is the least")
