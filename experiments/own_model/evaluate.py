"""Held-out loss per domain, and how evenly and how specifically experts are used.

Shape letters: B sequences, C positions, D domains, L layers, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as fn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .model import Decoder


@torch.no_grad()
def evaluate(model: Decoder, chunks: list[NDArray[np.int64]]) -> tuple[list[float], NDArray[np.int64]]:
    """Give held-out loss per domain, and rows per expert as int64 [D, L, E]."""
    losses, counts = [], []
    with torch.compiler.set_stance("force_eager"):
        for tokens_BC in chunks:
            tokens = torch.from_numpy(tokens_BC).to(model.head.device)
            logits, routings = model(tokens[:, :-1])
            losses.append(fn.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item())
            ends_LE = torch.stack([r.ends_E for r in routings]).cpu().numpy().astype(np.int64)
            counts.append(np.diff(ends_LE, axis=1, prepend=0))
    return losses, np.stack(counts)


def balance_statistics(counts_DLE: NDArray[np.int64]) -> dict[str, list[float]]:
    """Give per layer: Gini and max / mean of the load, and the domains' divergence from it in bit."""
    share_DLE = counts_DLE / counts_DLE.sum(-1, keepdims=True)
    load_LE = share_DLE.mean(0)
    num_experts = load_LE.shape[1]
    rank_E = 2 * np.arange(1, num_experts + 1) - num_experts - 1
    return {
        "gini_L": ((np.sort(load_LE) * rank_E).sum(1) / num_experts).tolist(),
        "max_over_mean_L": (load_LE.max(1) * num_experts).tolist(),
        # Mean over domains of the divergence to their mixture: the mutual information of domain and expert.
        "domain_expert_information_bit_L": (entropy_bit(load_LE) - entropy_bit(share_DLE).mean(0)).tolist(),
    }


def entropy_bit(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the entropy of the last axis, where 0 log 0 is 0."""
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(-1)
