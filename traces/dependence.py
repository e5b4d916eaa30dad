"""What one choice says of another: information between layers, recall, divergence of requests.

Shape letters: N tokens, R requests, E experts, K top-k, C conditions.
"""

import numpy as np
from numpy.typing import NDArray

from .choice import F32


def entropy_bits(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the entropy over the last axis, in bits; shares sum to 1 there."""
    logs = np.log2(share, where=share > 0, out=np.zeros_like(share))
    return -(share * logs).sum(axis=-1)


def jsd_bits(counts_RE: NDArray[np.integer] | F32) -> NDArray[np.float64]:
    """Return each row's Jensen-Shannon divergence from the load of all rows together, in bits."""
    row_RE = counts_RE / counts_RE.sum(axis=1, keepdims=True)
    whole_E = counts_RE.sum(axis=0) / counts_RE.sum()
    return entropy_bits((row_RE + whole_E) / 2) - (entropy_bits(row_RE) + entropy_bits(whole_E)) / 2


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


def conditional_recall(given_NC: F32, chosen_NE: F32, fold_N: NDArray[np.int64], k: int) -> float | None:
    """Return which share of the chosen experts is among the k that go most often with what is given.

    P(expert | condition) is counted on the tokens of all folds but one and judged on that one, each in turn; with
    several conditions at once the shares are summed. None where all tokens are of one fold.
    """
    folds = np.unique(fold_N)
    if len(folds) < 2:
        return None
    parts = [(given_NC[fold_N == fold], chosen_NE[fold_N == fold]) for fold in folds]
    both = [given_MC.T @ chosen_ME for given_MC, chosen_ME in parts]
    marks = [given_MC.sum(axis=0) for given_MC, _ in parts]
    found = 0.0
    for (given_MC, chosen_ME), both_CE, marks_C in zip(parts, both, marks, strict=True):
        share_CE = (sum(both) - both_CE) / np.maximum(sum(marks) - marks_C, 1)[:, None]
        best_MK = best_k(given_MC @ share_CE, k)
        found += float(np.take_along_axis(chosen_ME, best_MK, axis=1).sum())
    return found / float(chosen_NE.sum())
