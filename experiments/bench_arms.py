"""The arms of the layer benchmark; torch is imported inside functions alone.

Shape letters: T tokens, E experts, K top-k, P weight sets.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..runtime.timer import capture
from ..traces.schema import MoeSpec

if TYPE_CHECKING:
    import torch

    from ..kernels.spec import LayerLaunch
    from ..kernels.weights import ExpertWeights

FUSED_BYTES = 400_000_000
"""Layers that read more weights are not bound by launches: fusing is not tried."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """One step of a layer: tokens, and logits of as many steps as there are weight sets."""

    spec: MoeSpec
    x_TD: "torch.Tensor"
    logits_PTE: "torch.Tensor"
    sets: "Sequence[ExpertWeights]"


def draw_logits(
    spec: MoeSpec, num_tokens: int, num_sets: int, skew: str, seed: int, device: str = "cuda"
) -> "torch.Tensor":
    """Return logits [P, T, E] whose top choices are even, or Zipf (s = 1) over a random order of the experts."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    uniform = torch.rand(num_sets, num_tokens, spec.num_experts, device=device, generator=generator)
    logits_PTE = -torch.log(-torch.log(uniform.clamp(1e-7, 1 - 1e-7)))
    if skew == "zipf":
        for p in range(num_sets):
            rank_E = torch.randperm(spec.num_experts, device=device, generator=generator)
            logits_PTE[p] -= torch.log(rank_E + 1.0)
    return logits_PTE


def torch_grouped(x_TD: "torch.Tensor", logits_TE: "torch.Tensor", weights: "ExpertWeights") -> "torch.Tensor":
    """Return the layer's output by torch's grouped product and plain tensor operations, without host waits."""
    import torch
    from torch.nn import functional

    spec = weights.spec
    picked_TK, ids_TK = torch.topk(logits_TE.float(), spec.top_k, dim=1)
    if spec.renormalise:
        weights_TK = torch.softmax(picked_TK, dim=1)
    else:
        weights_TK = torch.softmax(logits_TE.float(), dim=1).gather(1, ids_TK)
    sorted_N, order_N = ids_TK.flatten().sort(stable=True)
    counts_E = torch.histc(sorted_N.float(), bins=spec.num_experts, min=0, max=spec.num_experts - 1)
    offsets_E = counts_E.cumsum(0).int()
    rows = x_TD[order_N // spec.top_k]
    for held, epilogue in zip(weights.products, weights.epilogues, strict=True):
        rows = functional.grouped_mm(rows, held.weight.mT, offs=offsets_E)
        if epilogue == "swiglu":
            gate, up = rows.chunk(2, dim=1)
            rows = functional.silu(gate) * up
        elif epilogue == "relu":
            rows = torch.relu(rows)
        elif epilogue == "gelu":
            rows = functional.gelu(rows)
    scaled = rows * weights_TK.flatten()[order_N, None].to(rows.dtype)
    return torch.empty_like(scaled).index_copy_(0, order_N, scaled).unflatten(0, (-1, spec.top_k)).sum(1)


def candidates(spec: MoeSpec, num_tokens: int, sm_count: int) -> "list[LayerLaunch]":
    """Return launches worth timing for a load: the modelled one, other tiles and heights, fused where that may pay."""
    from ..kernels.launches import TILES, default_launch, rows_per_expert, tile_for
    from ..kernels.spec import LayerLaunch, SliceLaunch

    hit, rows = rows_per_expert(spec, num_tokens)
    heights = [16] if rows <= 4 else [16, 64] if rows <= 40 else [64, 128] if rows <= 300 else [128]
    up_n, down_n = (p.n_dim for p in (spec.products(spec.d_ff_of(0))[i] for i in (0, -1)))
    found = [default_launch(spec, num_tokens, sm_count=sm_count)]
    for height in heights:
        modelled = [tile_for(height, hit, rows, n, sm_count=sm_count) for n in (up_n, down_n)]
        found.append(LayerLaunch(slices=(SliceLaunch(up=modelled[0], down=modelled[1]),)))
        for tile, ctas in TILES[height]:
            spread = replace(tile, num_ctas=sm_count * ctas)
            by_desc = replace(spread, descriptors=True)
            found += [_unsliced(t) for t in (spread, by_desc, replace(by_desc, flatten=True))]
            if height < 128 and hit * spec.expert_bytes() < FUSED_BYTES:
                found += [_unsliced(t, fused=True) for t in (spread, by_desc)]
    return list(dict.fromkeys(found))


def _unsliced(tile: Any, *, fused: bool = False) -> "LayerLaunch":
    from ..kernels.spec import LayerLaunch, SliceLaunch

    return LayerLaunch(slices=(SliceLaunch(up=tile, down=tile),), fused=fused)


def our_step(batch: Batch, launch: "LayerLaunch") -> Callable[[int], Any]:
    """Return the call that runs our layer on one weight set."""
    from ..kernels.layer import moe_layer
    from ..kernels.spec import RouterSpec
    from ..kernels.workspace import Workspace

    router, ws = RouterSpec.of(batch.spec), Workspace.allocate(batch.spec, len(batch.x_TD), "cuda")

    def step(p: int) -> Any:
        return moe_layer(batch.x_TD, batch.logits_PTE[p], batch.sets[p], router, ws, launch)

    return step


def best_launch(batch: Batch, sm_count: int, deadline: float) -> "tuple[LayerLaunch, dict[str, float]]":
    """Return the fastest candidate, with and without dependent launch, and what each took, us."""
    from triton import OutOfResources

    found: dict[Any, float] = {}

    def measure(launch: Any) -> None:
        try:
            arm = capture(our_step(batch, launch), len(batch.sets))
        except (ValueError, OutOfResources):
            # A tile or a fused grid that this device cannot hold.
            return
        found[launch] = min(arm.time_ns() for _ in range(4))

    for launch in candidates(batch.spec, len(batch.x_TD), sm_count):
        if not found or time.monotonic() < deadline:
            measure(launch)
    for launch in sorted(found, key=found.__getitem__)[:2]:
        measure(replace(launch, dependent=True))
    best = min(found, key=found.__getitem__)
    return best, {describe(launch): round(ns / 1000, 2) for launch, ns in sorted(found.items(), key=lambda i: i[1])}


def describe(launch: "LayerLaunch") -> str:
    """Return a launch in a few letters."""

    def tile(s: Any) -> str:
        marks = ("d" if s.descriptors else "") + ("f" if s.flatten else "")
        return f"{s.block_m}x{s.block_n}x{s.block_k}w{s.num_warps}s{s.num_stages}{marks}@{s.num_ctas}"

    flags = "".join(f" {name}" for name in ("fused", "dependent", "steal") if getattr(launch, name))
    return " | ".join(f"{tile(s.up)} {tile(s.down)}" for s in launch.slices) + flags


def agreement(batch: Batch, launch: "LayerLaunch") -> dict[str, Any]:
    """Return how the layer compares with the sequential definition: equal bits, and relative errors of both arms."""
    import torch

    from ..kernels import reference
    from ..kernels.spec import RouterSpec

    expected = reference.layer(batch.x_TD, batch.logits_PTE[0], batch.sets[0], RouterSpec.of(batch.spec))
    ours = our_step(batch, launch)(0)
    theirs = torch_grouped(batch.x_TD, batch.logits_PTE[0], batch.sets[0])
    scale = expected.float().norm()
    return {
        "same_bits": bool(torch.equal(ours, expected)),
        "differing_share": float((ours != expected).float().mean()),
        "rel_difference": float((ours.float() - expected.float()).norm() / scale),
        "torch_rel_difference": float((theirs.float() - expected.float()).norm() / scale),
    }
