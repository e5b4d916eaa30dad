"""The arms of `expertslice bench`: each is built for a batch, and all share its inputs and weights.

Torch is imported inside functions alone. Shape letters: T tokens, D model, E experts, K top-k, P weight sets.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.graphs import CAPTURE_RULES
from ..traces.schema import MoeSpec, next_power_of_two
from .bench_arms import Batch, clock_of, describe, our_step, torch_grouped
from .bench_hf import hugging_face

if TYPE_CHECKING:
    import torch

    from ..kernels.spec import LayerLaunch

OURS, GROUPED, EAGER_GROUPED = "ours", "torch_grouped_graph", "torch_grouped"
SEARCH_S = 12.0
OUR_REL_DIFFERENCE = 2e-3
"""Of ours from the sequential definition, where the matrix library does not walk K in order."""
MOST_REL_DIFFERENCE = 1e-2
"""Of an arm that rounds more often than the definition: to bf16 before its weighted sum, say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """An arm on one batch."""

    step: Callable[[int], Any]
    """Enqueues the layer on one weight set and returns its output."""
    in_graph: bool = True
    """Whether it is timed as a replayed graph; else launch by launch from the host."""
    most_difference: float = MOST_REL_DIFFERENCE
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])


def ours(batch: Batch) -> Contender:
    """Return our layer under the launch shipped for its shape, else under the best one found on the batch."""
    from ..kernels.tuned import load
    from .tune import search

    path = tuned_path(batch.spec)
    if path.exists():
        return _our(batch, load(path).launch_for(len(batch.x_TD)), "tuned")

    end, clock = time.monotonic() + SEARCH_S, clock_of({"batch": batch})
    launch, _ = search(batch.spec, len(batch.x_TD), clock, sm_count=sm_count(), expired=lambda: time.monotonic() > end)
    return _our(batch, launch, "searched on this batch")


def tuned_path(spec: MoeSpec) -> Path:
    """Return where the shipped launches of a shape on the current device would lie."""
    from ..kernels.tuned import FOLDER, path_of, shape_name

    return path_of(FOLDER, device_name(), shape_name(spec))


def ours_modelled(batch: Batch) -> Contender:
    """Return our layer under the launch that a model of the load picks, untimed."""
    import torch

    from ..kernels.launches import default_launch

    capability = torch.cuda.get_device_capability(0)
    launch = default_launch(batch.spec, len(batch.x_TD), sm_count=sm_count(), capability=capability)
    return _our(batch, launch, "modelled")


def ours_paper(batch: Batch) -> Contender:
    """Return our layer under the paper's block sizes (A.1)."""
    from ..kernels.tuned import paper_launch

    return _our(batch, paper_launch(batch.spec, len(batch.x_TD), sm_count=sm_count()), "the paper's tiles")


def _our(batch: Batch, launch: "LayerLaunch", source: str) -> Contender:
    return Contender(
        step=our_step(batch, launch),
        most_difference=OUR_REL_DIFFERENCE,
        about={"launch": describe(launch), "launch_source": source},
    )


def device_name() -> str:
    """Return the current device as its driver names it."""
    import torch

    return torch.cuda.get_device_name(0)


def sm_count() -> int:
    """Return the current device's SMs."""
    import torch

    return torch.cuda.get_device_properties(0).multi_processor_count


def sequential(batch: Batch) -> Contender:
    """Return the definition: a loop over the experts, which asks the device for each one's tokens."""
    from ..kernels import reference
    from ..kernels.spec import RouterSpec

    router = RouterSpec.of(batch.spec)
    return Contender(
        step=lambda p: reference.layer(batch.x_TD, batch.logits_PTE[p], batch.sets[p], router), in_graph=False
    )


Parts = Mapping[int, tuple[int, Callable[[], object]]]
"""By expert: its rows, and the call that computes them."""


def one_by_one(parts: Parts) -> None:
    """Run the experts in order on the current stream."""
    for _, part in parts.values():
        part()


def sequential_graph(batch: Batch, spread: Callable[[Parts], object] = one_by_one, *, live: bool = False) -> Contender:
    """Return the same loop for the batch's own routing, so that a graph can hold it: its best case, of no other use.

    `live`: for the routing of each call instead, which a graph cannot hold.
    """
    import torch

    from ..kernels import reference
    from ..kernels.spec import RouterSpec

    router, top_k = RouterSpec.of(batch.spec), batch.spec.top_k
    places_P = [places_of(reference.route(logits_TE, router)[0]) for logits_TE in batch.logits_PTE]

    def step(p: int) -> "torch.Tensor":
        ids_TK, weights_TK = reference.route(batch.logits_PTE[p], router)
        places = places_of(ids_TK) if live else places_P[p]
        rows_ND = torch.empty(weights_TK.numel(), batch.spec.d_model, dtype=batch.x_TD.dtype, device=batch.x_TD.device)

        def fill(e: int, place: "torch.Tensor", token: "torch.Tensor") -> None:
            rows_ND.index_copy_(0, place, reference.expert(batch.x_TD[token], batch.sets[p], e))

        spread({e: (len(place), partial(fill, e, place, token)) for e, (place, token) in places.items()})
        return reference.combine(rows_ND.unflatten(0, (-1, top_k)), weights_TK)

    return Contender(step=step, in_graph=not live)


def expert_graphs(batch: Batch, spread: Callable[[Parts], object] | None = None) -> Contender:
    """Return the paper's graphs (3.3, A.2): one for each expert of enough tokens, rows copied in, its output cloned."""
    import torch

    from ..kernels import reference
    from ..kernels.spec import RouterSpec

    # What a graph returns is cloned before another runs, so that all may share their memory unless they run at once.
    router, pool = RouterSpec.of(batch.spec), None if spread else torch.cuda.graph_pool_handle()
    held: dict[tuple[int, int, int], tuple[Any, torch.Tensor, torch.Tensor]] = {}

    def captured(p: int, e: int, bucket: int) -> "tuple[Any, torch.Tensor, torch.Tensor]":
        rows_ND = torch.zeros(bucket, batch.spec.d_model, dtype=batch.x_TD.dtype, device=batch.x_TD.device)
        reference.expert(rows_ND, batch.sets[p], e)
        graph = torch.cuda.CUDAGraph()
        # Captured where it will run: nodes keep to the SMs of their stream.
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream() if spread else None):
            out_ND = reference.expert(rows_ND, batch.sets[p], e)
        return graph, rows_ND, out_ND

    def expert(x_ND: "torch.Tensor", p: int, e: int) -> "torch.Tensor":
        if len(x_ND) < CAPTURE_RULES["paper"].least_tokens:
            return reference.expert(x_ND, batch.sets[p], e)
        key = p, e, next_power_of_two(len(x_ND))
        if key not in held:
            held[key] = captured(*key)
        graph, rows_ND, out_ND = held[key]
        rows_ND[: len(x_ND)].copy_(x_ND)
        graph.replay()
        return out_ND[: len(x_ND)].clone()

    def step(p: int) -> "torch.Tensor":
        ids_TK, weights_TK = reference.route(batch.logits_PTE[p], router)
        rows_ND = torch.empty(ids_TK.numel(), batch.spec.d_model, dtype=batch.x_TD.dtype, device=batch.x_TD.device)

        def fill(e: int, place: "torch.Tensor", token: "torch.Tensor") -> None:
            rows_ND[place] = expert(batch.x_TD[token], p, e)

        parts = {e: (len(place), partial(fill, e, place, token)) for e, (place, token) in places_of(ids_TK).items()}
        (spread or one_by_one)(parts)
        return reference.combine(rows_ND.unflatten(0, ids_TK.shape), weights_TK)

    # The warm-up: no replay that is timed captures.
    for p in range(len(batch.sets)):
        step(p)
    return Contender(step=step, in_graph=False)


def places_of(ids_TK: "torch.Tensor") -> dict[int, tuple["torch.Tensor", "torch.Tensor"]]:
    """Return the places t * K + slot of each expert hit, and their tokens."""
    flat = ids_TK.flatten()
    places = {e: (flat == e).nonzero()[:, 0] for e in flat.unique().tolist()}
    return {e: (place, place // ids_TK.shape[1]) for e, place in places.items()}


def grouped(batch: Batch, *, in_graph: bool = True) -> Contender:
    """Return torch's grouped product."""
    return Contender(step=lambda p: torch_grouped(batch.x_TD, batch.logits_PTE[p], batch.sets[p]), in_graph=in_graph)


def grouped_compiled(batch: Batch) -> Contender:
    """Return torch's grouped product with what lies around it compiled for this batch's shape."""
    import torch

    # Shapes of earlier batches would count towards dynamo's limit.
    torch.compiler.reset()
    compiled = torch.compile(torch_grouped, fullgraph=True, dynamic=False)
    return Contender(step=lambda p: compiled(batch.x_TD, batch.logits_PTE[p], batch.sets[p]))


def hf(batch: Batch, *, implementation: str) -> Contender:
    """Return Hugging Face's experts under one of their implementations; the loop waits for the device."""
    return Contender(step=hugging_face(batch, implementation), in_graph=implementation != "eager")


ARMS: dict[str, Callable[[Batch], Contender]] = {
    OURS: ours,
    "ours_modelled": ours_modelled,
    "ours_paper": ours_paper,
    "sequential": sequential,
    "sequential_graph": sequential_graph,
    "expert_graphs": expert_graphs,
    EAGER_GROUPED: partial(grouped, in_graph=False),
    GROUPED: grouped,
    "torch_grouped_compiled": grouped_compiled,
    **{f"hf_{name}": partial(hf, implementation=name) for name in ("eager", "grouped_mm", "batched_mm")},
}
"""Measured in this order; those of Hugging Face are their own code on our weights."""
