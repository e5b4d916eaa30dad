"""The arms that the paper's tables need beside those of `bench`: stand-ins, a factorial, and parts of a layer.

Stand-ins do what FastMoE and Tutel do on one GPU, by torch alone; they are not those systems. Torch is imported inside
functions alone. Shape letters: T tokens, E experts, K top-k, N routed rows, C rows of the largest expert, D model,
P weight sets.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from ..runtime.partition import Partitions
from .bench_arms import Batch, activated, our_step, torch_route
from .bench_contenders import (
    ARMS,
    OUR_REL_DIFFERENCE,
    OURS,
    Contender,
    Parts,
    expert_graphs,
    one_by_one,
    ours_modelled,
    places_of,
    sequential,
    sequential_graph,
    sm_count,
    tuned_path,
)
from .slices_load import beside

if TYPE_CHECKING:
    import torch

    from ..kernels.spec import LayerLaunch, SliceLaunch

NUM_STREAMS = 8
"""Of a pool; the paper names none."""
SM_STEP = 8
KERNELS, GRAPHS = ("loop", "paper", "ours"), ("eager", "expert", "layer")
SLICES, STREAMS = ("none", "tiles", "SMs"), ("one", "many")
FACTORS = {"kernels": KERNELS, "graphs": GRAPHS, "slices": SLICES, "streams": STREAMS}
"""Levels, what is plainest first."""
Cell = tuple[str, str, str, str]


def impossible(kernels: str, graphs: str, slices: str, streams: str) -> str | None:
    """Return why a combination of the factorial cannot be; None: it can."""
    if kernels == "loop" and slices == "tiles":
        return "the matrix library picks its own tiles"
    if slices == "SMs" and streams == "one":
        return "a stream keeps to one set of SMs: the others would stand idle"
    if kernels != "loop" and graphs == "expert":
        return "one launch holds all experts: none has a graph of its own"
    if kernels != "loop" and slices == "none" and streams == "many":
        return "one launch for each product: nothing is left for a second stream"
    return None


def cells() -> dict[str, Cell]:
    """Return the combinations that can be, by name."""
    every = itertools.product(KERNELS, GRAPHS, SLICES, STREAMS)
    return {"/".join(cell): cell for cell in every if not impossible(*cell)}


@cache
def pool() -> "tuple[torch.cuda.Stream, ...]":
    """Return the streams that experts are spread over."""
    import torch

    return tuple(torch.cuda.Stream() for _ in range(NUM_STREAMS))


@cache
def splits() -> Partitions:
    """Return the device's green contexts; they last as long as the process, for graphs hold their streams."""
    return Partitions()


def on_streams(parts: Parts, streams: "Sequence[torch.cuda.Stream]", of: Mapping[int, int]) -> None:
    """Run each expert's part on the stream named, those of one stream in order."""
    by_stream = [[part for e, (_, part) in parts.items() if of[e] == s] for s in range(len(streams))]
    beside([lambda _, own=own: [part() for part in own] for own in by_stream], streams)(0)


def in_turns(parts: Parts) -> None:
    """Spread experts over the pool, as the paper does: number modulo streams (3.5)."""
    on_streams(parts, pool(), {e: e % NUM_STREAMS for e in parts})


def on_own_sms(batch: Batch) -> Callable[[Parts], None]:
    """Return what runs experts of more rows than the mean on SMs of their own, in proportion to their rows."""
    bound, hot_sms = hot_share(batch)

    def spread(parts: Parts) -> None:
        streams = splits()(sm_count() - hot_sms, hot_sms)
        on_streams(parts, streams, {e: int(rows >= bound) for e, (rows, _) in parts.items()})

    return spread


def hot_share(batch: Batch) -> tuple[int, int]:
    """Return from how many rows on an expert is hot, and the SMs that all hot ones get by their share of rows."""
    from ..kernels.launches import rows_per_expert

    spec = batch.spec
    _, mean = rows_per_expert(spec, len(batch.x_TD))
    counts_PE = [logits.topk(spec.top_k).indices.flatten().bincount(minlength=spec.num_experts).tolist()
                 for logits in batch.logits_PTE]  # fmt: skip
    bound = max(1, round(mean))
    share = sum(n for counts_E in counts_PE for n in counts_E if n >= bound) / sum(map(sum, counts_PE))
    most = sm_count() // SM_STEP * SM_STEP - SM_STEP
    return bound, min(most, max(SM_STEP, round(share * sm_count() / SM_STEP) * SM_STEP))


def cell_arm(batch: Batch, *, cell: Cell) -> Contender:
    """Return the arm of a cell of the factorial."""
    kernels, graphs, slices, streams = cell
    if kernels == "loop":
        spread = on_own_sms(batch) if slices == "SMs" else in_turns if streams == "many" else None
        return loop(batch, graphs, spread)
    if slices == "none":
        plain = ARMS["ours_paper"](batch) if kernels == "paper" else ours_here(batch)
        return replace(plain, in_graph=graphs == "layer")
    return sliced(batch, kernels, graphs, slices, streams)


def loop(batch: Batch, graphs: str, spread: Callable[[Parts], None] | None) -> Contender:
    """Return the loop over experts, spread over streams or not."""
    if graphs == "expert":
        return expert_graphs(batch, spread)
    if graphs == "eager" and spread is None:
        return sequential(batch)
    return sequential_graph(batch, spread or one_by_one, live=graphs == "eager")


def sliced(batch: Batch, kernels: str, graphs: str, slices: str, streams: str) -> Contender:
    """Return our layer in two slices, cold experts and hot ones by the device's own counts."""
    from ..kernels.layer import in_turn
    from ..kernels.spec import TokenRule, encode_plan
    from ..kernels.workspace import Workspace

    bound, hot_sms = hot_share(batch)
    own = (sm_count() - hot_sms, hot_sms)
    launch = two_slices(batch, kernels, own if slices == "SMs" else None)
    ws = Workspace.allocate(batch.spec, len(batch.x_TD), batch.x_TD.device)
    rule = TokenRule(bounds=(bound,), slice_ids=(0, 1))
    ws.plan.copy_(encode_plan(2, batch.spec.num_experts, rule))

    def apart(parts: Sequence[Callable[[], None]]) -> None:
        held = splits()(*own) if slices == "SMs" else pool()[:2]
        beside([lambda _, part=part: part() for part in parts], held)(0)

    return Contender(
        step=our_step(batch, launch, ws, apart if streams == "many" else in_turn),
        in_graph=graphs == "layer",
        most_difference=OUR_REL_DIFFERENCE,
        about={"launch": f"slices of {own[0]} and {own[1]} SMs" if slices == "SMs" else "two tiles", "bound": bound},
    )


def two_slices(batch: Batch, kernels: str, own: tuple[int, int] | None) -> "LayerLaunch":
    """Return launches for cold and hot experts: two tiles over all SMs, or one tile over SMs of each."""
    from ..kernels.launches import default_launch, rows_per_expert, tile_for
    from ..kernels.spec import LaunchSpec, LayerLaunch, SliceLaunch
    from ..kernels.tuned import paper_launch

    spec, num_tokens, sms = batch.spec, len(batch.x_TD), sm_count()
    make = paper_launch if kernels == "paper" else default_launch
    (one,) = make(spec, num_tokens, sm_count=sms).slices
    if own:
        return LayerLaunch(slices=tuple(on_sms(one, of, sms) for of in own))
    if kernels == "paper":
        # The two tiles of its appendix A.1.
        pair = [
            LaunchSpec(block_m=m, block_n=m, block_k=k, num_warps=4, num_stages=3, num_ctas=sms)
            for m, k in ((64, 32), (128, 64))
        ]
    else:
        hit, rows = rows_per_expert(spec, num_tokens)
        pair = [tile_for(m, hit, rows, spec.d_ff_of(0), sm_count=sms) for m in (16, 64)]
    return LayerLaunch(slices=tuple(SliceLaunch(up=tile, down=tile) for tile in pair))


def on_sms(one: "SliceLaunch", own: int, sms: int) -> "SliceLaunch":
    """Return a slice's launches with as many CTAs an SM on fewer SMs, which it owns."""
    up, down = (replace(tile, num_ctas=tile.num_ctas // sms * own) for tile in (one.up, one.down))
    return replace(one, up=up, down=down, sm_count=own)


def scattered(batch: Batch, p: int) -> "tuple[torch.Tensor, torch.Tensor, list[int], torch.Tensor]":
    """Return tokens in expert order, where each row came from [N], rows of each expert, and weights [T, K]."""
    ids_TK, weights_TK = torch_route(batch.logits_PTE[p], batch.spec)
    sorted_N, order_N = ids_TK.flatten().sort(stable=True)
    counts_E = sorted_N.bincount(minlength=batch.spec.num_experts).tolist()
    return batch.x_TD[order_N // batch.spec.top_k], order_N, counts_E, weights_TK


def gathered(rows_ND: "torch.Tensor", order_N: "torch.Tensor", weights_TK: "torch.Tensor") -> "torch.Tensor":
    """Return tokens' weighted sums of rows in expert order."""
    import torch

    placed = torch.empty_like(rows_ND).index_copy_(0, order_N, rows_ND).unflatten(0, weights_TK.shape)
    return (placed * weights_TK[:, :, None].to(placed.dtype)).sum(1)


def like_fastmoe(batch: Batch) -> Contender:
    """Return a stand-in for FastMoE on one GPU: scatter, a product of the matrix library for each expert, gather.

    Experts go to a pool of streams in turn. What FasterMoE adds, shadowed experts and overlapped exchange, has no
    object on one GPU.
    """
    from torch.nn import functional

    def step(p: int) -> "torch.Tensor":
        rows_ND, order_N, counts_E, weights_TK = scattered(batch, p)
        weights, out_ND = batch.sets[p], rows_ND.new_empty(rows_ND.shape)
        starts = list(itertools.accumulate(counts_E, initial=0))

        def run(e: int) -> None:
            rows = rows_ND[starts[e] : starts[e + 1]]
            for held, epilogue in zip(weights.products, weights.epilogues, strict=True):
                rows = activated(functional.linear(rows, held.weight[e]), epilogue)
            out_ND[starts[e] : starts[e + 1]] = rows

        in_turns({e: (rows, partial(run, e)) for e, rows in enumerate(counts_E) if rows})
        return gathered(out_ND, order_N, weights_TK)

    return Contender(step=step, in_graph=False)


def like_tutel(batch: Batch) -> Contender:
    """Return a stand-in for Tutel on one GPU: rows padded to the largest expert's, one batched product, combine."""
    import torch

    def step(p: int) -> "torch.Tensor":
        rows_ND, order_N, counts_E, weights_TK = scattered(batch, p)
        weights, most, device = batch.sets[p], max(counts_E), rows_ND.device
        starts = list(itertools.accumulate(counts_E, initial=0))
        shift_E = torch.tensor([e * most - start for e, start in enumerate(starts[:-1])], device=device)
        counts = torch.tensor(counts_E, device=device)
        at_N = torch.arange(len(rows_ND), device=device) + shift_E.repeat_interleave(counts, output_size=len(rows_ND))
        rows = rows_ND.new_zeros(len(counts_E) * most, rows_ND.shape[1]).index_copy_(0, at_N, rows_ND)
        rows = rows.unflatten(0, (len(counts_E), most))
        for held, epilogue in zip(weights.products, weights.epilogues, strict=True):
            rows = activated(torch.bmm(rows, held.weight.mT), epilogue)
        return gathered(rows.flatten(0, 1)[at_N], order_N, weights_TK)

    return Contender(step=step, in_graph=False)


def ours_here(batch: Batch) -> Contender:
    """Return our layer without a search: as tuned where launches are shipped, else as modelled."""
    return ARMS[OURS](batch) if tuned_path(batch.spec).exists() else ours_modelled(batch)


FASTMOE, TUTEL = "like FastMoE (stand-in)", "like Tutel (stand-in)"
TABLE: dict[str, Callable[[Batch], Contender]] = {
    **ARMS,
    OURS: ours_here,
    FASTMOE: like_fastmoe,
    TUTEL: like_tutel,
    **{name: partial(cell_arm, cell=cell) for name, cell in cells().items()},
}
"""All arms of the tables."""


def parts_of(batch: Batch) -> dict[str, Callable[[int], Any]]:
    """Return steps of a layer's operations, of the loop over experts and of ours.

    Our experts count tiles that routing lays out, so they run behind it: routing is taken off afterwards.
    """
    import torch

    from ..kernels import reference
    from ..kernels.combine import combine
    from ..kernels.gather import gather
    from ..kernels.layer import run_experts
    from ..kernels.routing import route
    from ..kernels.spec import RouterSpec
    from ..kernels.workspace import Workspace

    spec, x_TD, router = batch.spec, batch.x_TD, RouterSpec.of(batch.spec)
    launch = launch_of(batch)
    ws = Workspace.allocate(spec, len(x_TD), x_TD.device)
    places_P = [places_of(reference.route(logits_TE, router)[0]) for logits_TE in batch.logits_PTE]
    rows_ND = torch.zeros(len(x_TD) * spec.top_k, spec.d_model, dtype=x_TD.dtype, device=x_TD.device)
    ids_TK, weights_TK = reference.route(batch.logits_PTE[0], router)

    def routed(p: int) -> None:
        probabilities_TE = torch.softmax(batch.logits_PTE[p], dim=-1)
        picked_TK, chosen_TK = torch.topk(probabilities_TE, spec.top_k)
        picked_TK /= picked_TK.sum(-1, keepdim=True)
        torch.histc(chosen_TK.float(), bins=spec.num_experts, min=0, max=spec.num_experts - 1)

    def looped(p: int) -> None:
        for e, (place, token) in places_P[p].items():
            rows_ND.index_copy_(0, place, reference.expert(x_TD[token], batch.sets[p], e))

    def ours_routed(p: int) -> None:
        route(batch.logits_PTE[p], router, launch, ws)

    def ours_routed_and_run(p: int) -> None:
        ours_routed(p)
        run_experts(gather(x_TD, ws) if launch.gathered else x_TD, batch.sets[p], ws, launch)

    return {
        "loop routing": routed,
        "loop experts": looped,
        "loop aggregation": lambda _: reference.combine(rows_ND.unflatten(0, ids_TK.shape), weights_TK),
        "ours routing": ours_routed,
        "ours routing and experts": ours_routed_and_run,
        "ours aggregation": lambda _: combine(ws.rows_ND, ws.weights_TK, ws.out_TD[: len(x_TD)]),
    }


def launch_of(batch: Batch) -> "LayerLaunch":
    """Return the launch shipped for a batch's shape, else the modelled one."""
    from ..runtime.experts import default_launch_on

    return default_launch_on(batch.x_TD.device, batch.spec, len(batch.x_TD))
