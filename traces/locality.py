"""Locality of one layer's routing: overlap in time, hits of a cache of experts, batches of concurrent requests.

Shape letters: T tokens in reading order, R requests, E experts, K top-k, G lags, P positions.
"""

import numpy as np
from numpy.typing import NDArray

from .choice import multi_hot
from .requests import Grouping


def overlap_by_lag(
    ids_TK: NDArray[np.integer], request_T: NDArray[np.int64], num_experts: int, lags: tuple[int, ...]
) -> NDArray[np.float64]:
    """Return the share of a token's experts that the token `lag` places before it, of the same request, also used.

    Tokens weigh alike; nan for a lag that no request is long enough for.
    """
    marks_TE = multi_hot(ids_TK, num_experts) != 0
    shares = np.full(len(lags), np.nan)
    for g, lag in enumerate(lags):
        same_T = request_T[lag:] == request_T[:-lag]
        if same_T.any():
            shared_TE = marks_TE[lag:] & marks_TE[:-lag] & same_T[:, None]
            shares[g] = np.count_nonzero(shared_TE) / (same_T.sum() * ids_TK.shape[1])
    return shares


def overlap_within_requests(counts_RE: NDArray[np.integer], tokens_R: NDArray[np.int64], top_k: int) -> float | None:
    """Return the overlap of two random tokens of one request, all pairs weighing alike; None: no request has two."""
    num_pairs = int((tokens_R * (tokens_R - 1)).sum())
    shared = float((counts_RE.astype(np.float64) ** 2).sum() - counts_RE.sum())
    return shared / (num_pairs * top_k) if num_pairs else None


def overlap_independent(counts_E: NDArray[np.integer], num_tokens: int, top_k: int) -> float:
    """Return the overlap of two tokens that choose independently with this load."""
    return float(((counts_E / num_tokens) ** 2).sum() / top_k)


def distinct_independent(counts_E: NDArray[np.integer], num_tokens: int, batch: int) -> float:
    """Return how many experts `batch` tokens use on average when they choose independently with this load."""
    return float((1 - (1 - np.minimum(counts_E / num_tokens, 1)) ** batch).sum())


def lru_hit_rate(ids_TK: NDArray[np.integer], num_experts: int) -> NDArray[np.float64]:
    """Return the hit rate of a least-recently-used cache of experts with 0..E slots, float64 [E + 1].

    Accesses run token by token in reading order, each token's experts in stored order; the cache starts empty and is
    kept from one request to the next.
    """
    num_tokens, k = ids_TK.shape
    ids_TK = ids_TK.astype(np.int64)
    time_TE = np.full((num_tokens + 1, num_experts), -1)
    np.put_along_axis(time_TE[1:], ids_TK, np.arange(num_tokens * k).reshape(num_tokens, k), axis=1)
    last_TE = np.maximum.accumulate(time_TE, axis=0)[:-1]
    last_TK = np.take_along_axis(last_TE, ids_TK, axis=1)
    hits = np.zeros(num_experts + 1)
    for j in range(k):
        # Above it in the stack: what was used since, and the token's own earlier choices, counted once.
        newer_T = (last_TE > last_TK[:, j : j + 1]).sum(axis=1)
        already_T = (last_TK[:, :j] > last_TK[:, j : j + 1]).sum(axis=1)
        depth_T = (newer_T - already_T + j)[last_TK[:, j] >= 0]
        hits[1:] += np.bincount(depth_T, minlength=num_experts)[:num_experts]
    return np.cumsum(hits) / (num_tokens * k)


def aligned_batches(groups: Grouping, batch: int, max_positions: int, seed: int) -> list[NDArray[np.int64]]:
    """Draw batches of requests that start together, as ordered row numbers [P, batch]; empty: too few requests.

    P is `max_positions`, less where fewer than `batch` requests are that long. Requests of a batch differ; batches
    may share some. There are as many as hold each request twice, but at least 8.
    """
    if groups.num_requests < batch:
        return []
    num_positions = int(min(max_positions, np.sort(groups.lengths)[-batch]))
    long_R = np.flatnonzero(groups.lengths >= num_positions)
    rng = np.random.default_rng([seed, batch])
    num_batches = max(min(1024, 2 * len(long_R)) // batch, 8)
    starts = [groups.offsets_R[rng.permutation(long_R)[:batch]] for _ in range(num_batches)]
    return [start_R + np.arange(num_positions)[:, None] for start_R in starts]


def step_statistics(counts_PE: NDArray[np.int64]) -> tuple[float, float, float]:
    """Return means over steps of distinct experts and max / mean load, and the lag-1 autocorrelation of counts.

    The autocorrelation is that of each count's deviation from its mean over these steps, experts weighing by
    variance; nan where nothing varies. Every step must have tokens.
    """
    away_PE = counts_PE - counts_PE.mean(axis=0)
    variance = float((away_PE**2).mean(axis=0).sum())
    follows = float((away_PE[1:] * away_PE[:-1]).mean(axis=0).sum()) if len(counts_PE) > 1 else np.nan
    peak = float((counts_PE.max(axis=1) / counts_PE.mean(axis=1)).mean())
    distinct = float(np.count_nonzero(counts_PE, axis=1).mean())
    return distinct, peak, follows / variance if variance else np.nan
