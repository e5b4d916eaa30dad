"""The MoE layer in plain PyTorch: the definition that the Triton kernels are held to. Not made to be fast.

The bits law. For bf16 and fp16 every kernel gives the same bits as this file run on the same device, wherever the
matrix library walks K in ascending order, whatever the tile, grid, slice, stealing, batch or neighbour rows:
1. An expert's weight is a float32 number that depends on its token's logits alone. Exponentials and divisions are those
   of IEEE float32; the renormalising sum runs over the chosen experts in slot order; the softmax sum over all experts
   is taken in steps of 2^-40, where no order matters.
2. A product accumulates in float32 over ascending K, adds the bias in float32, and is rounded once to the dtype.
3. An activation reads the rounded product, works in float32, and is rounded once. SwiGLU is one activation.
4. A token's output is the float32 sum of weight times row over its slots in slot order, without fused multiply-add,
   rounded once.
For fp32 no rounding point hides the order inside a product: a kernel sums 32 columns at a time and then the sums, so
that its bits are the same everywhere and its error is not above torch's, but they are not torch's bits. Given float64
tensors, the same functions compute in float64 throughout: the exact answer that errors are measured against.

Ties and bad logits: equal scores go to the lower expert id; NaN counts as the lowest finite float, infinities as the
largest and lowest finite ones, so ids are always valid and weights finite. Rows past `num_tokens` are padding: ids -1,
weights 0, output 0.

Shape letters: T tokens, E routed experts, K top-k, N routed rows (T times K), D model, F ffn, G expert groups.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from .spec import RouterSpec
    from .weights import ExpertWeights

FLOAT_MAX = torch.finfo(torch.float32).max


def widen(x: Tensor) -> Tensor:
    """Return x in the type that accumulates: float32, or float64 for an exact run."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def finite_logits(logits_TE: Tensor) -> Tensor:
    """Return float32 logits with NaN as the lowest finite number and infinities as the outermost ones."""
    return torch.nan_to_num(logits_TE.float(), nan=-FLOAT_MAX, posinf=FLOAT_MAX, neginf=-FLOAT_MAX)


def exact_sum(x_TE: Tensor) -> Tensor:
    """Sum each row of numbers from 0 to 1 in steps of 2^-40, so that no order of adding matters."""
    return (x_TE * 2.0**40).long().sum(1).float() * 2.0**-40


def sum_slots(x_TK: Tensor) -> Tensor:
    """Sum each row in slot order."""
    total_T = x_TK[:, 0].clone()
    for slot in range(1, x_TK.shape[1]):
        total_T += x_TK[:, slot]
    return total_T


def allowed_experts(choice_TE: Tensor, router: "RouterSpec") -> Tensor:
    """Return which experts lie in the best groups: by their best score for softmax, by their best two for sigmoid."""
    num_best = 1 if router.score == "softmax" else 2
    grouped_TGE = choice_TE.unflatten(1, (router.num_groups, -1))
    best = grouped_TGE.sort(dim=2, descending=True, stable=True).values[..., :num_best]
    order_TG = best.sum(2).sort(dim=1, descending=True, stable=True).indices[:, : router.top_groups]
    chosen_TG = torch.zeros(grouped_TGE.shape[:2], dtype=torch.bool, device=choice_TE.device).scatter_(
        1, order_TG, True
    )
    return chosen_TG.repeat_interleave(grouped_TGE.shape[2], dim=1)


def route(
    logits_TE: Tensor, router: "RouterSpec", *, bias_E: Tensor | None = None, num_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return expert ids [T, K], int32, by falling score, and their weights [T, K], float32."""
    logits_TE = finite_logits(logits_TE)
    score_TE = logits_TE if router.score == "softmax" else 1 / (1 + torch.exp(-logits_TE))
    choice_TE = score_TE if bias_E is None else finite_logits(score_TE + bias_E)
    if router.num_groups > 1:
        choice_TE = choice_TE.masked_fill(~allowed_experts(choice_TE, router), float("-inf"))
    ids_TK = choice_TE.sort(dim=1, descending=True, stable=True).indices[:, : router.top_k]
    picked_TK = score_TE.gather(1, ids_TK)
    if router.score == "softmax":
        top_T1 = logits_TE.amax(1, keepdim=True)
        picked_TK = torch.exp(picked_TK - top_T1)
        whole_T = sum_slots(picked_TK) if router.renormalise else exact_sum(torch.exp(logits_TE - top_T1))
        picked_TK = picked_TK / whole_T[:, None]
    elif router.renormalise:
        picked_TK = picked_TK / (sum_slots(picked_TK) + 1e-20)[:, None]
    ids_TK, weights_TK = ids_TK.int(), picked_TK * router.scale
    if num_tokens is not None:
        ids_TK[num_tokens:], weights_TK[num_tokens:] = -1, 0.0
    return ids_TK, weights_TK


def dispatch(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return tokens per expert [E] and, expert by expert in token order, each routed row's place t * K + slot [N]."""
    flat_N = ids_TK.flatten().long()
    places = torch.arange(flat_N.numel(), device=flat_N.device)[flat_N >= 0]
    order = flat_N[places].sort(stable=True).indices
    counts_E = torch.bincount(flat_N[places], minlength=num_experts)
    return counts_E.int(), places[order].int()


def queues(
    counts_E: Sequence[int], slice_of_expert_E: Sequence[int], block_m_S: Sequence[int], tile_order: str
) -> list[list[tuple[int, int]]]:
    """Return each slice's row tiles as (expert, first row within the expert), in the order they are drained."""
    direction = {"expert": 0, "heavy": -1, "light": 1}[tile_order]
    experts = sorted(range(len(counts_E)), key=lambda e: (direction * counts_E[e], e))
    return [
        [(e, row) for e in experts if slice_of_expert_E[e] == s for row in range(0, counts_E[e], block_m)]
        for s, block_m in enumerate(block_m_S)
    ]


def activate(x_NF: Tensor, epilogue: str) -> Tensor:
    """Apply an epilogue to a rounded product: none, relu, gelu (exact), swiglu over gate columns then up columns.

    The clamped SwiGLU is gpt-oss's: gate at most 7, up within 7, sigmoid of 1.702 times the gate, up + 1.
    """
    wide = widen(x_NF)
    if epilogue == "relu":
        wide = torch.relu(wide)
    elif epilogue == "gelu":
        wide = functional.gelu(wide)
    elif epilogue == "swiglu":
        gate, up = wide.chunk(2, dim=1)
        wide = functional.silu(gate) * up
    elif epilogue == "swiglu_clamped":
        gate, up = wide.chunk(2, dim=1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        wide = gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    return wide.to(x_NF.dtype)


def product(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None, epilogue: str = "none") -> Tensor:
    """Return rows times transposed weights through an epilogue, for one expert."""
    return activate(functional.linear(x_ND, weight_FD, bias_F), epilogue)


def expert(x_ND: Tensor, weights: "ExpertWeights", expert_id: int) -> Tensor:
    """Return one expert's rows [N, D]: its products one after another."""
    for (weight, bias), epilogue in zip(weights.of_expert(expert_id), weights.epilogues, strict=True):
        x_ND = product(x_ND, weight.to(x_ND.dtype), None if bias is None else bias.to(x_ND.dtype), epilogue)
    return x_ND


def combine(rows_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Return each token's weighted sum over its slots, in slot order."""
    wide = torch.zeros_like(widen(rows_TKD[:, 0]))
    for slot in range(rows_TKD.shape[1]):
        wide = wide + weights_TK[:, slot, None].to(wide.dtype) * rows_TKD[:, slot].to(wide.dtype)
    return wide.to(rows_TKD.dtype)


def fill_rows(rows_ND: Tensor, x_TD: Tensor, ids_TK: Tensor, weights: "ExpertWeights", experts: Iterable[int]) -> None:
    """Compute the rows of some experts at their places t * K + slot; those without tokens are skipped."""
    for e in experts:
        place = (ids_TK.flatten() == e).nonzero()[:, 0]
        if len(place):
            rows_ND[place] = expert(x_TD[place // ids_TK.shape[1]], weights, e)


def experts(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, weights: "ExpertWeights") -> Tensor:
    """Return the layer's output [T, D] for given routing, expert after expert."""
    rows_ND = torch.zeros(ids_TK.numel(), x_TD.shape[1], dtype=x_TD.dtype, device=x_TD.device)
    fill_rows(rows_ND, x_TD, ids_TK, weights, range(weights.spec.num_experts))
    return combine(rows_ND.unflatten(0, (-1, ids_TK.shape[1])), weights_TK)


def layer(
    x_TD: Tensor,
    logits_TE: Tensor,
    weights: "ExpertWeights",
    router: "RouterSpec",
    *,
    bias_E: Tensor | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """Return the whole layer's output [T, D]: routing, experts one after another, combine."""
    ids_TK, weights_TK = route(logits_TE, router, bias_E=bias_E, num_tokens=num_tokens)
    return experts(x_TD, ids_TK, weights_TK, weights)
