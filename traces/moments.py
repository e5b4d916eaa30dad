"""Moments of one layer's choices: what a fitted generator is to have in common with its trace.

Shape letters: P positions, R requests, E experts, K top-k, G lags, B position bins, N tokens, M some of them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .choice import NUM_BINS, Ids, Shape, multi_hot
from .dependence import conditional_recall, jsd_bits, mutual_information_bits
from .schema import F32, F64, I64
from .trace import counts_by

LAGS_G = (1, 4, 8, 16)
NEAR_POSITIONS = 200
"""Overlaps are matched on the first tokens of requests, where batches that start together are most alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """What is matched; shares of tokens, float64."""

    inside_E: F64
    inside_BE: F64
    """By profile bin; a bin without tokens is 0."""
    tokens_B: I64
    first_E: F64
    together_E: F64
    """Share of the pairs of tokens of one request that both chose the expert."""
    overlap_G: F64
    """Share of a token's experts that the token `LAGS_G` before it chose, early in requests; nan: none is that long."""
    overlap_any: float
    """The same for any two tokens of a request."""
    divergence_bits: float
    """Jensen-Shannon divergence of a request's load from the whole load."""
    firsts_EE: I64 | None = None
    """Tokens by first choice below and first choice here; None in the first layer, as what follows."""
    information_bits: float | None = None
    recall_first: float | None = None
    recall_set: float | None = None


def moments(ids_PRK: Ids, shape: Shape, below_PRK: Ids | None, num_experts: int, num_across: int) -> Moments:
    """Measure one layer, given what the layer below chose for the same tokens.

    What depends on the layer below is measured on `num_across` tokens, the same number wherever two measurements are
    compared: such measures are biased by how many there are.
    """
    k = ids_PRK.shape[2]
    hot_NE = multi_hot(ids_PRK.reshape(-1, k), num_experts)
    hot_PRE = hot_NE.reshape(*ids_PRK.shape[:2], num_experts)
    tokens, sum_RE = int(shape.tokens_R.sum()), hot_PRE.sum(axis=0)
    num_pairs = max(int((shape.tokens_R * (shape.tokens_R - 1)).sum()), 1)
    together_E = ((sum_RE.astype(np.float64) ** 2).sum(axis=0) - sum_RE.sum(axis=0)) / num_pairs
    alive_N, bin_N = shape.alive.ravel(), shape.bins.ravel()
    tokens_B = np.bincount(bin_N[alive_N], minlength=NUM_BINS)
    inside_BE = (multi_hot(bin_N[:, None], NUM_BINS).T @ hot_NE) / np.maximum(tokens_B, 1)[:, None]
    return Moments(
        inside_E=sum_RE.sum(axis=0, dtype=np.float64) / tokens,
        inside_BE=inside_BE,
        tokens_B=tokens_B,
        first_E=np.bincount(ids_PRK[..., 0].ravel()[alive_N], minlength=num_experts) / tokens,
        together_E=together_E,
        overlap_G=np.array([_overlap(hot_PRE, shape, lag, k) for lag in LAGS_G]),
        overlap_any=float(together_E.sum() / k),
        divergence_bits=float(jsd_bits(sum_RE).mean()),
        **({} if below_PRK is None else _across(ids_PRK, hot_NE, shape, below_PRK, num_across)),
    )


def _overlap(hot_PRE: F32, shape: Shape, lag: int, k: int) -> float:
    hot_PRE = hot_PRE[:NEAR_POSITIONS]
    pairs = int(np.maximum(np.minimum(shape.tokens_R, NEAR_POSITIONS) - lag, 0).sum())
    return float(np.vdot(hot_PRE[lag:], hot_PRE[:-lag])) / (pairs * k) if pairs else np.nan


def _across(ids_PRK: Ids, hot_NE: F32, shape: Shape, below_PRK: Ids, num_across: int) -> dict[str, Any]:
    """Measure the dependence on the layer below; recall is learnt on every other request and judged on the rest."""
    k, num_experts = ids_PRK.shape[2], hot_NE.shape[1]
    alive_N = np.flatnonzero(shape.alive)
    some_M = np.sort(np.random.default_rng([num_across]).choice(alive_N, num_across, replace=False))
    below_MK, first_M = below_PRK.reshape(-1, k)[some_M], ids_PRK[..., 0].ravel()[some_M]
    fold_M = some_M % len(shape.tokens_R) % 2
    recall = [
        conditional_recall(multi_hot(below_MK[:, :width], num_experts), hot_NE[some_M], fold_M, k) for width in (1, k)
    ]
    firsts_EE = counts_by(below_MK[:, 0], first_M, num_experts, num_experts)
    return {
        "firsts_EE": firsts_EE,
        "information_bits": mutual_information_bits(firsts_EE),
        "recall_first": recall[0],
        "recall_set": recall[1],
    }
