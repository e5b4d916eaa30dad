"""What choices of one layer say of others: of the next layer, of the same request, of later tokens and steps.

Shape letters: N tokens, T tokens in reading order, R requests, E experts, K top-k, C conditions, G lags, P positions,
B requests of a batch.
"""

import numpy as np

from .choice import multi_hot
from .requests import Grouping
from .schema import F32, F64, I64, Ints
from .trace import counts_by


def entropy_bits(share: F64) -> F64:
    """Return the entropy over the last axis, in bits; shares sum to 1 there."""
    logs = np.log2(share, where=share > 0, out=np.zeros_like(share))
    return -(share * logs).sum(axis=-1)


def jsd_bits(counts_RE: Ints | F32) -> F64:
    """Return each row's Jensen-Shannon divergence from the load of all rows together, in bits."""
    row_RE = counts_RE / counts_RE.sum(axis=1, keepdims=True)
    whole_E = counts_RE.sum(axis=0) / counts_RE.sum()
    return entropy_bits((row_RE + whole_E) / 2) - (entropy_bits(row_RE) + entropy_bits(whole_E)) / 2


def mutual_information_bits(counts_EE: Ints) -> float:
    """Return the plug-in mutual information of a table of counts: biased upwards, see `information_bias_bits`."""
    joint_EE = counts_EE / max(counts_EE.sum(), 1)
    marginals = entropy_bits(joint_EE.sum(axis=0)) + entropy_bits(joint_EE.sum(axis=1))
    return float(marginals - entropy_bits(joint_EE.ravel()))


def information_bias_bits(counts_EE: Ints) -> float:
    """Return by how much the plug-in estimate is too high on average (Miller and Madow; from the cells in use)."""
    cells = np.count_nonzero(counts_EE)
    margins = np.count_nonzero(counts_EE.sum(axis=0)) + np.count_nonzero(counts_EE.sum(axis=1))
    return float(max(cells - margins + 1, 0) / (2 * max(counts_EE.sum(), 1) * np.log(2)))


def conditional_recall(given_NC: F32, chosen_NE: F32, fold_N: I64, k: int) -> float | None:
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
        best_MK = np.argpartition(-(given_MC @ share_CE), k - 1, axis=-1)[:, :k]
        found += float(np.take_along_axis(chosen_ME, best_MK, axis=1).sum())
    return found / float(chosen_NE.sum())


def overlap_by_lag(ids_TK: Ints, request_T: I64, num_experts: int, lags: tuple[int, ...]) -> F64:
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


def lru_hit_rate(ids_TK: Ints, num_experts: int) -> F64:
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


def aligned_batches(groups: Grouping, batch: int, max_positions: int, seed: int) -> list[I64]:
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


def step_statistics(ids_PBK: Ints, num_experts: int) -> tuple[float, float, float]:
    """Return means over steps of distinct experts and max / mean load, and the lag-1 autocorrelation of counts.

    The autocorrelation is that of each count's deviation from its mean over these steps, experts weighing by
    variance; nan where nothing varies. Every step must have tokens.
    """
    counts_PE = counts_by(np.arange(len(ids_PBK))[:, None, None], ids_PBK, len(ids_PBK), num_experts)
    away_PE = counts_PE - counts_PE.mean(axis=0)
    variance = float((away_PE**2).mean(axis=0).sum())
    follows = float((away_PE[1:] * away_PE[:-1]).mean(axis=0).sum()) if len(counts_PE) > 1 else np.nan
    peak = float((counts_PE.max(axis=1) / counts_PE.mean(axis=1)).mean())
    distinct = float(np.count_nonzero(counts_PE, axis=1).mean())
    return distinct, peak, follows / variance if variance else np.nan
