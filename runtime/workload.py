"""What a trace's steps put on a device: the experts of tokens, and logits that choose them.

A trace of counts alone gets experts drawn for it.

Shape letters: T tokens, L MoE layers, E experts, K top-k.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ..traces.schema import Ints, RoutedStep

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
