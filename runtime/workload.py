"""What a trace's steps put on a device: the experts of tokens, logits that choose them, and plans as words.

A trace of counts alone gets experts drawn for it.

Shape letters: T tokens, L MoE layers, E experts, K top-k, W words of a plan.
"""

from typing import TYPE_CHECKING

import numpy as np

from ..policies.contract import ByTokens, Plan
from ..traces.schema import Ints, RoutedStep

if TYPE_CHECKING:
    import torch

CHOSEN, STEP_DOWN, OTHERS = 8.0, 0.125, -8.0
"""Logits of the first slot, how much lower each next one is, and those of experts not chosen: exact in any dtype."""


def expert_ids_LTK(step: RoutedStep, top_k: int) -> np.ndarray:
    """Return the experts of every token, int64: the trace's, or drawn so that the counts are the trace's.

    Raises:
        ValueError: no batch of the step's tokens can have its counts.
    """
    if step.expert_ids_TLK is not None:
        return np.ascontiguousarray(np.moveaxis(np.asarray(step.expert_ids_TLK, dtype=np.int64), 1, 0))
    return np.stack([ids_of_counts_TK(counts_E, step.num_tokens, top_k, step.step) for counts_E in step.counts_LE])


def ids_of_counts_TK(counts_E: Ints, num_tokens: int, top_k: int, step: int = 0) -> np.ndarray:
    """Return distinct experts for each token, so many tokens each; the same for the same counts.

    Dealt expert by expert over the tokens in a circle, no expert meets a token twice while it has no more tokens than
    there are.
    """
    if int(counts_E.sum()) != num_tokens * top_k or int(counts_E.max(initial=0)) > num_tokens:
        raise ValueError(
            f"step {step}: counts of {int(counts_E.sum())} rows, {int(counts_E.max(initial=0))} of one expert, for "
            f"{num_tokens} tokens of {top_k} experts each; each token takes {top_k} different ones"
        )
    dealt = np.repeat(np.arange(len(counts_E), dtype=np.int64), counts_E)
    return np.ascontiguousarray(dealt.reshape(top_k, num_tokens).T) if num_tokens else np.empty((0, top_k), np.int64)


def write_logits(logits_LTE: "torch.Tensor", ids_LTK: "torch.Tensor") -> None:
    """Fill logits with which routing chooses the given experts, in the order of slots; nothing waits."""
    import torch

    slots_K = torch.arange(ids_LTK.shape[2], device=ids_LTK.device, dtype=logits_LTE.dtype)
    values_LTK = (CHOSEN - STEP_DOWN * slots_K).expand(ids_LTK.shape)
    logits_LTE.fill_(OTHERS).scatter_(2, ids_LTK, values_LTK)


def plan_words_LW(plan: Plan, num_layers: int, num_experts: int) -> "torch.Tensor":
    """Return a plan as int32 words for every layer, on the host: what `kernels.spec.encode_plan` gives for each.

    By numpy, in a few microseconds: a policy may decide at every step.
    """
    import torch

    from ..kernels.spec import BOUNDS_AT, NUM_BOUNDS_AT, ORDER_AT, PINNED_AT, SLICE_IDS_AT, TILE_ORDERS, plan_words

    words_LW, placement = np.zeros((num_layers, plan_words(num_experts)), dtype=np.int32), plan.placement
    words_LW[:, ORDER_AT.value] = TILE_ORDERS.index(plan.tile_order)
    if isinstance(placement, ByTokens):
        runs = {BOUNDS_AT.value: placement.bounds, SLICE_IDS_AT.value: placement.slice_ids}
        words_LW[:, NUM_BOUNDS_AT.value] = len(placement.bounds)
    else:
        runs = {PINNED_AT.value: placement.slice_of_expert_LE}
        words_LW[:, NUM_BOUNDS_AT.value] = -1
    for start, values in runs.items():
        run = np.asarray(values, dtype=np.int32)
        words_LW[:, start : start + run.shape[-1]] = run
    return torch.from_numpy(words_LW)
