"""The arms of the layer benchmark; torch is imported inside functions alone.

Shape letters: T tokens, E experts, K top-k, P weight sets.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..runtime.timer import capture, sets_to_stay_cold
from ..traces.schema import MoeSpec

if TYPE_CHECKING:
    import torch

    from ..kernels.layer import Beside
    from ..kernels.spec import LayerLaunch
    from ..kernels.weights import ExpertWeights
    from ..kernels.workspace import Workspace
    from .tune import Clock

MOST_SETS = 40
"""A step that reads so little that more would be needed keeps some of its weights in L2."""


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


def torch_route(logits_TE: "torch.Tensor", spec: MoeSpec) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return expert ids [T, K] and their weights by torch's own operations."""
    import torch

    picked_TK, ids_TK = torch.topk(logits_TE.float(), spec.top_k, dim=1)
    if spec.renormalise:
        return ids_TK, torch.softmax(picked_TK, dim=1)
    return ids_TK, torch.softmax(logits_TE.float(), dim=1).gather(1, ids_TK)


def activated(rows: "torch.Tensor", epilogue: str) -> "torch.Tensor":
    """Return a product's rows through its epilogue by torch's own operations, in the rows' dtype."""
    import torch
    from torch.nn import functional

    if epilogue == "swiglu":
        gate, up = rows.chunk(2, dim=-1)
        return functional.silu(gate) * up
    plain: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": torch.relu, "gelu": functional.gelu}
    return plain[epilogue](rows) if epilogue in plain else rows


def torch_grouped(x_TD: "torch.Tensor", logits_TE: "torch.Tensor", weights: "ExpertWeights") -> "torch.Tensor":
    """Return the layer's output by torch's grouped product and plain tensor operations, without host waits."""
    import torch
    from torch.nn import functional

    spec = weights.spec
    ids_TK, weights_TK = torch_route(logits_TE, spec)
    sorted_N, order_N = ids_TK.flatten().sort(stable=True)
    counts_E = torch.histc(sorted_N.float(), bins=spec.num_experts, min=0, max=spec.num_experts - 1)
    offsets_E = counts_E.cumsum(0).int()
    rows = x_TD[order_N // spec.top_k]
    for held, epilogue in zip(weights.products, weights.epilogues, strict=True):
        rows = activated(functional.grouped_mm(rows, held.weight.mT, offs=offsets_E), epilogue)
    scaled = rows * weights_TK.flatten()[order_N, None].to(rows.dtype)
    return torch.empty_like(scaled).index_copy_(0, order_N, scaled).unflatten(0, (-1, spec.top_k)).sum(1)


def our_step(
    batch: Batch, launch: "LayerLaunch", ws: "Workspace | None" = None, beside: "Beside | None" = None
) -> Callable[[int], Any]:
    """Return the call that runs our layer on one weight set, in a workspace of its own if none is given."""
    from ..kernels.layer import in_turn, moe_layer
    from ..kernels.spec import RouterSpec
    from ..kernels.workspace import Workspace

    router, ws = RouterSpec.of(batch.spec), ws or Workspace.allocate(batch.spec, len(batch.x_TD), "cuda")

    def step(p: int) -> Any:
        return moe_layer(batch.x_TD, batch.logits_PTE[p], batch.sets[p], router, ws, launch, beside=beside or in_turn)

    return step


def clock_of(batches: "Mapping[str, Batch]") -> "Clock":
    """Return what times a launch on a batch of each skew, alike but for logits: ns per layer, least of four replays.

    One graph serves all of them: logits are copied to where it reads.
    """
    from triton import OutOfResources

    from ..kernels.workspace import Workspace

    first = next(iter(batches.values()))
    shared = replace(first, logits_PTE=first.logits_PTE.clone())
    ws = Workspace.allocate(first.spec, len(first.x_TD), "cuda")

    def clock(launch: "LayerLaunch") -> dict[str, float] | None:
        try:
            arm = capture(our_step(shared, launch, ws), len(shared.sets))
        except (ValueError, OutOfResources):
            # A tile or a fused grid that this device cannot hold.
            return None
        found = {}
        for skew, batch in batches.items():
            shared.logits_PTE.copy_(batch.logits_PTE)
            found[skew] = min(arm.time_ns() for _ in range(4))
        return found

    return clock


def batch_of(spec: MoeSpec, num_tokens: int, skew: str, sets: "Sequence[ExpertWeights]") -> Batch:
    """Return a batch of random tokens with logits for each weight set, the same for the same arguments."""
    import torch

    from ..kernels.spec import TORCH_DTYPE

    generator = torch.Generator("cuda").manual_seed(1)
    x_TD = torch.randn(num_tokens, spec.d_model, device="cuda", generator=generator).to(TORCH_DTYPE[spec.dtype])
    logits_PTE = draw_logits(spec, num_tokens, len(sets), skew, seed=num_tokens)
    return Batch(spec=spec, x_TD=x_TD, logits_PTE=logits_PTE, sets=sets)


def num_sets(spec: MoeSpec, num_tokens: int) -> int:
    """Return how many weight sets keep the experts of a step cold on the current device."""
    import torch

    held = torch.cuda.get_device_properties(0)
    touched = min(spec.num_experts, num_tokens * spec.top_k) * spec.expert_bytes()
    whole = spec.num_experts * spec.expert_bytes()
    sets = sets_to_stay_cold(touched, whole, l2_bytes=held.L2_cache_size, memory_bytes=held.total_memory)
    return min(MOST_SETS, sets)


def describe(launch: "LayerLaunch") -> str:
    """Return a launch in a few letters."""

    def tile(s: Any) -> str:
        marks = ("d" if s.descriptors else "") + ("f" if s.flatten else "") + ("p" if s.pingpong else "")
        return f"{s.block_m}x{s.block_n}x{s.block_k}w{s.num_warps}s{s.num_stages}{marks}@{s.num_ctas}"

    flags = "".join(f" {name}" for name in ("fused", "gathered", "dependent", "steal") if getattr(launch, name))
    flags += f" prefetch {launch.prefetch_bytes >> 20} MiB" if launch.prefetch_bytes else ""
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
