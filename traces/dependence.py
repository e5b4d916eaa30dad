"""What one layer's choice says of the next layer's: information and recall.

Shape letters: N tokens, E experts, K top-k, C conditions.
"""

import numpy as np
from numpy.typing import NDArray

from .choice import F32


def entropy_bits(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the entropy over the last axis, in bits; shares sum to 1 there."""
    logs = np.log2(share, where=share > 0, out=np.zeros_like(share))
    return -(share * logs).sum(axis=-1)


def joint_counts(one_N: NDArray[np.integer], other_N: NDArray[np.integer], num_experts: int) -> NDArray[np.int64]:
    """Count how often each pair of experts goes together, int64 [E, E]."""
    flat_N = one_N.astype(np.int64) * num_experts + other_N
    return np.bincount(flat_N, minlength=num_experts**2).reshape(num_experts, num_experts)


def mutual_information_bits(counts_EE: NDArray[np.integer]) -> float:
    """Return the plug-in mutual information of a table of counts: biased upwards, see `information_bias_bits`."""
    joint_EE = counts_EE / max(counts_EE.sum(), 1)
    marginals = entropy_bits(joint_EE.sum(axis=0)) + entropy_bits(joint_EE.sum(axis=1))
    return float(marginals - entropy_bits(joint_EE.ravel()))


def information_bias_bits(counts_EE: NDArray[np.integer]) -> float:
    """Return by how much the plug-in estimate is too high on average (Miller and Madow; from the cells in use)."""
    cells = np.count_nonzero(counts_EE)
    margins = np.count_nonzero(counts_EE.sum(axis=0)) + np.count_nonzero(counts_EE.sum(axis=1))
    return float(max(cells - margins + 1, 0) / (2 * max(counts_EE.sum(), 1) * np.log(2)))


def best_k(score_NE: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """Return the k highest of each row, in no order."""
    return np.argpartition(-score_NE, k - 1, axis=-1)[..., :k]


def conditional_recall(given_NC: F32, chosen_NE: F32, learn_N: NDArray[np.bool_], k: int) -> float | None:
    """Return which share of the chosen experts is among the k that go most often with what is given.

    P(expert | condition) is counted on the `learn_N` tokens; with several conditions at once the shares are summed.
    Judged on the other tokens. None where either part is empty.
    """
    judge_N = ~learn_N
    if not learn_N.any() or not judge_N.any():
        return None
    share_CE = given_NC[learn_N].T @ chosen_NE[learn_N]
    share_CE /= np.maximum(given_NC[learn_N].sum(axis=0), 1)[:, None]
    found_NK = np.take_along_axis(chosen_NE[judge_N], best_k(given_NC[judge_N] @ share_CE, k), axis=1)
    return float(found_NK.sum() / chosen_NE[judge_N].sum())
