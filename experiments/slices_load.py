"""Routed batches on cold weights, and their grouped products launched by slices: what the slice experiments time.

Torch is imported inside functions alone. Shape letters: T tokens, E experts, N routed rows, D model, F columns.
"""

import bisect
import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..runtime.timer import Captured, capture, sets_to_stay_cold
from ..traces.schema import MoeSpec
from .precompile import on_all_cores

if TYPE_CHECKING:
    import torch

    from ..kernels.spec import LaunchSpec, LayerLaunch
    from ..kernels.workspace import Workspace

BOUNDS = (32, 64, 128, 256)
Step = Callable[[int], Any]
Streams = Sequence["torch.cuda.Stream"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Experts, their load, and how many of their products are run."""

    name: str
    d_model: int
    d_ff: int
    num_experts: int
    top_k: int
    tokens: int
    zipf_s: float
    """0: even."""
    kind: str = "gelu2"
    products: int = 1
    """From the first: a projection is one product, without an activation."""
    sets_at_once: int = 1
    """Weight sets that one step reads, one after another."""

    @property
    def spec(self) -> MoeSpec:
        """Return the layer that the products are of."""
        return MoeSpec(
            name=self.name, num_layers=1, num_experts=self.num_experts, top_k=self.top_k, d_model=self.d_model,
            d_ff=(self.d_ff,), kind=self.kind,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Queues:
    """A batch's tile queues under a launch and a rule: each has its own, over buffers that all share."""

    ws: "Workspace"
    launch: "LayerLaunch"


class Load:
    """One routed batch, gathered in expert order, with as many weight sets as keep the ones read cold."""

    def __init__(self, shape: Shape, *, cold: bool = True, device: str = "cuda") -> None:
        """Draw routing, rows and weights, the same for the same shape; without `cold` no more weights than needed."""
        import torch

        from ..kernels.gather import gather
        from ..kernels.spec import RouterSpec
        from ..kernels.weights import EPILOGUES, random_weights
        from ..kernels.workspace import Workspace

        self.shape, self.spec, self._router = shape, shape.spec, RouterSpec.of(shape.spec)
        all_epilogues = EPILOGUES[shape.kind]
        self.epilogues = all_epilogues[: shape.products] if shape.kind != "gelu2" else ("none",) * shape.products
        generator = torch.Generator(device).manual_seed(0)
        self._logits_TE = _logits_TE(shape, generator)
        self._base = Workspace.allocate(self.spec, shape.tokens, device)
        self.route(lone(16))
        x_TD = torch.randn(shape.tokens, shape.d_model, device=device, generator=generator).bfloat16()
        self.rows_ND = gather(x_TD, self._base)
        self.counts_E: list[int] = self._base.counts_E.tolist()
        self._ends_E = self._base.offsets_E1[1:].clone()
        sizes = self.spec.products(shape.d_ff)[: shape.products]
        expert_bytes = 2 * sum(p.n_dim * p.k_dim for p in sizes)
        hit = sum(n > 0 for n in self.counts_E)
        self.hbm_bytes = hit * expert_bytes * shape.sets_at_once
        self.flops = sum(self.counts_E) * expert_bytes * shape.sets_at_once
        num_sets = shape.sets_at_once
        if cold:
            held = torch.cuda.get_device_properties(0)
            memory = {"l2_bytes": held.L2_cache_size, "memory_bytes": held.total_memory}
            wanted = sets_to_stay_cold(hit * expert_bytes, shape.num_experts * expert_bytes, **memory)
            num_sets = -(-wanted // num_sets) * num_sets
        self._sets = [random_weights(self.spec, device, p).products[: shape.products] for p in range(num_sets)]
        self.num_sets = len(self._sets) // shape.sets_at_once

    def route(
        self, launch: "LayerLaunch", bound: int | None = None, tile_order: str = "expert", first: int | None = None
    ) -> Queues:
        """Return queues: experts of fewer than `bound` tokens, or the `first` ones, on slice 0, the others on slice 1.

        Without either, all are on slice 0.
        """
        import torch

        from ..kernels.routing import route
        from ..kernels.spec import TokenRule, encode_plan

        rule = None if bound is None else TokenRule(bounds=(bound,), slice_ids=(0, 1))
        if first is not None:
            rule = [int(e >= first) for e in range(self.spec.num_experts)]
        names = ("tiles_QC", "begins_QS", "tickets", "ready_2C")
        own = {name: torch.zeros_like(getattr(self._base, name)) for name in names}
        words = encode_plan(len(launch.slices), self.spec.num_experts, rule, tile_order=tile_order)
        ws = replace(self._base, **own, plan=words.to(self._base.plan.device), sizes={})
        # Routing is not timed here, and no kernel waits for it.
        route(self._logits_TE, self._router, replace(launch, dependent=False), ws)
        return Queues(ws=ws, launch=launch)

    def run(self, queues: Queues, slice_id: int, step: int) -> None:
        """Enqueue one slice's products of a step on the current stream."""
        from ..kernels.grouped import grouped_product

        ws, num_products = queues.ws, len(self.spec.products(self.shape.d_ff))
        for at in range(self.shape.sets_at_once):
            x = self.rows_ND
            for i, held in enumerate(self._sets[step * self.shape.sets_at_once + at]):
                out = ws.rows_ND if i == num_products - 1 else ws.hidden[i]
                grouped_product(
                    x, held, out, ws, queues.launch, slice_id=slice_id, product=i, num_products=num_products,
                    epilogue=self.epilogues[i],
                )  # fmt: skip
                x = out

    def torch_grouped(self, step: int) -> "torch.Tensor":
        """Return torch's grouped product of one projection."""
        from torch.nn import functional

        rows, held = self.rows_ND[: sum(self.counts_E)], self._sets[step][0]
        return functional.grouped_mm(rows, held.weight.mT, offs=self._ends_E)

    @property
    def weight(self) -> "torch.Tensor":
        """Return the first expert's weight [F, D] of the first product."""
        return self._sets[0][0].weight[0]

    @property
    def out(self) -> "torch.Tensor":
        """Return what the last product of a step stored: rows [N, F] in expert order, or at their places."""
        whole = self.shape.products == len(self.spec.products(self.shape.d_ff))
        held = self._base.rows_ND if whole else self._base.hidden[self.shape.products - 1]
        return held[: sum(self.counts_E)]

    @cached_property
    def bounds(self) -> list[int]:
        """Return the bounds that leave experts with tokens on either side."""
        hit = [n for n in self.counts_E if n]
        return [b for b in BOUNDS if min(hit) < b <= max(hit)]

    def bounds_beside(self, bound: int) -> list[int]:
        """Return the bounds that move the least experts from one side to the other, at most one each way."""
        counts = sorted({n for n in self.counts_E if n})
        at = bisect.bisect_left(counts, bound)
        # A bound divides between the counts before `at` and those from it on; both sides keep one.
        return [counts[i] for i in (at - 1, at + 1) if 0 < i < len(counts)]


def _logits_TE(shape: Shape, generator: "torch.Generator") -> "torch.Tensor":
    """Return logits whose top choices are even in number, or Zipf over a random order of the experts."""
    import torch

    from ..runtime.workload import ids_of_counts_TK, write_logits

    logits_TE = torch.empty(shape.tokens, shape.num_experts, device=generator.device)
    if not shape.zipf_s:
        import numpy as np

        even, rest = divmod(shape.tokens * shape.top_k, shape.num_experts)
        counts_E = np.array([even + (e < rest) for e in range(shape.num_experts)])
        ids_TK = torch.from_numpy(ids_of_counts_TK(counts_E, shape.tokens, shape.top_k))
        write_logits(logits_TE[None], ids_TK[None].to(logits_TE.device))
        return logits_TE
    logits_TE.uniform_(1e-7, 1 - 1e-7, generator=generator).log_().neg_().log_().neg_()
    rank_E = torch.randperm(shape.num_experts, device=generator.device, generator=generator)
    return logits_TE - shape.zipf_s * torch.log(rank_E + 1.0)


def lone(block_m: int) -> "LayerLaunch":
    """Return a launch to route under where no product follows."""
    from ..kernels.spec import LaunchSpec

    return one_tile(LaunchSpec(block_m=block_m, block_n=128, block_k=64, num_warps=4, num_stages=2, num_ctas=1))


def one_tile(*tiles: "LaunchSpec", dependent: bool = False) -> "LayerLaunch":
    """Return the launch of a slice for each tile, of all its products, on rows that lie in expert order."""
    from ..kernels.spec import LayerLaunch, SliceLaunch

    slices = tuple(SliceLaunch(up=tile, down=tile) for tile in tiles)
    return LayerLaunch(slices=slices, gathered=True, dependent=dependent)


def in_turn(load: Load, queues: Queues) -> Step:
    """Return the step that runs slices one after another."""

    def step(p: int) -> None:
        for slice_id in range(len(queues.launch.slices)):
            load.run(queues, slice_id, p)

    return step


def beside(parts: Sequence[Step], streams: Streams) -> Step:
    """Return the step that forks to a stream for each part, and joins."""
    import torch

    def step(p: int) -> None:
        main = torch.cuda.current_stream()
        # One event for all: torch hands out few streams, and where one is `main` no other may wait for its part.
        forked = main.record_event()
        for part, stream in zip(parts, streams, strict=True):
            stream.wait_event(forked)
            with torch.cuda.stream(stream):
                part(p)
        for stream in streams:
            main.wait_stream(stream)

    return step


def slices_of(load: Load, queues: Queues) -> list[Step]:
    """Return each slice's part of a step."""
    return [lambda p, s=s: load.run(queues, s, p) for s in range(len(queues.launch.slices))]


def quick(make: Callable[[], Step], num_sets: int) -> tuple[float, Step] | None:
    """Return the least of three replays, ns a step, and the step; None: the device cannot hold it."""
    from triton import OutOfResources

    try:
        arm: Captured = capture(step := make(), num_sets)
    except (ValueError, OutOfResources):
        return None
    return min(arm.time_ns() for _ in range(3)), step


def precompile(jobs: "Iterable[tuple[Shape, LayerLaunch]]") -> None:
    """Compile launches and routing on all cores, for small layers that stand for these, into the cache on disk."""
    found = {}
    for shape, launch in jobs:
        narrow = replace(shape, name="c", d_model=256, d_ff=256, sets_at_once=1, zipf_s=0.0)
        found[replace(narrow, num_experts=4, top_k=2, tokens=64), launch] = None
        found.setdefault((narrow, lone(16)))
    on_all_cores(_compile, found, chunksize=2)


def _compile(job: "tuple[Shape, LayerLaunch]") -> None:
    import torch
    from triton import OutOfResources

    shape, launch = job
    load = Load(shape, cold=False)
    # A tile that this device cannot hold is left out when launches are timed.
    with contextlib.suppress(OutOfResources):
        in_turn(load, load.route(launch))(0)
    torch.cuda.synchronize()
