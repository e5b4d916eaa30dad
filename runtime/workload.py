"""What a trace's steps put on a device: the experts of tokens, logits that choose them, and plans as words.

A trace of counts alone gets experts drawn for it.

Shape letters: T tokens, L MoE layers, E experts, K top-k, W words of a plan.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ..policies.contract import ByTokens, Plan
from ..traces.schema import I32, Ints, RoutedStep

if TYPE_CHECKING:
    import torch

CHOSEN, STEP_DOWN, OTHERS = 8.0, 0.125, -8.0
"""Logits of the first slot, how much lower each next one is, and those of experts not chosen: exact in any dtype."""


def expert_ids_LTK(step: RoutedStep, top_k: int) -> np.ndarray:
    """Return the experts of every token: the trace's, as a view, or drawn so that the counts are the trace's.

    Raises:
        ValueError: no batch of the step's tokens can have its counts.
    """
    if step.expert_ids_TLK is not None:
        return step.expert_ids_TLK.transpose(1, 0, 2)
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
    values_K = _values_K(ids_LTK.shape[2], ids_LTK.device, logits_LTE.dtype)
    logits_LTE.fill_(OTHERS).scatter_(2, ids_LTK, values_K.expand(ids_LTK.shape))


@lru_cache
def _values_K(top_k: int, device: "torch.device", dtype: "torch.dtype") -> "torch.Tensor":
    import torch

    return CHOSEN - STEP_DOWN * torch.arange(top_k, device=device, dtype=dtype)


def fill_words(words_LW: I32, plan: Plan) -> None:
    """Fill a plan's int32 words for every layer, on the host; the plan is known to be sound."""
    from ..kernels.spec import fill_plan

    placement = plan.placement
    if isinstance(placement, ByTokens):
        fill_plan(words_LW, placement.bounds, placement.slice_ids, tile_order=plan.tile_order)
    else:
        fill_plan(words_LW, None, placement.slice_of_expert_LE, tile_order=plan.tile_order)


def plan_words_LW(plan: Plan, num_layers: int, num_experts: int) -> "torch.Tensor":
    """Return a plan as int32 words for every layer, on the host."""
    import torch

    from ..kernels.spec import plan_words

    words_LW = np.zeros((num_layers, plan_words(num_experts)), dtype=np.int32)
    fill_words(words_LW, plan)
    return torch.from_numpy(words_LW)
