"""Statistics of routing: load skew, locality, dependence between layers, batches. Plain data that figures draw.

Every value is per layer; `median` over layers is what tables usually show. Definitions stand at the fields; they
reproduce published figures of gpt-oss-20b from its recording.

Shape letters: T tokens in reading order, S steps, R requests, L MoE layers, E experts, K top-k, G lags, Z batch sizes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .choice import multi_hot
from .dependence import (
    aligned_batches,
    conditional_recall,
    entropy_bits,
    information_bias_bits,
    jsd_bits,
    lru_hit_rate,
    mutual_information_bits,
    overlap_by_lag,
    step_statistics,
)
from .requests import Grouping, group_requests
from .schema import F64, I64, Floats, Ints, StepSource
from .trace import RoutingTrace, counts_by, total_counts

LAGS = (1, 2, 4, 8, 16, 32, 64)
BATCH_SIZES = (1, 8, 32, 128)
BATCH_STEPS = 200
FOLDS = 5
Column = float | list[float] | F64


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStatistics:
    """Per-layer statistics; a field is None where the source does not hold what it needs, nan where it is undefined.

    Counts give the first group, a token trace everything.
    """

    num_tokens: int
    num_requests: int | None
    gini_L: F64
    """Gini coefficient of the experts' load: 0 for even load."""
    max_mean_L: F64
    """Load of the fullest expert over the mean load."""
    zipf_s_L: F64
    """Minus the slope of log load over log rank, least squares on the fullest 75 % of the experts."""
    overlap_independent_L: F64
    """Overlap of two tokens that choose independently with the layer's load: sum of p squared over K."""

    lags_G: tuple[int, ...] = LAGS
    overlap_LG: F64 | None = None
    """Share of a token's experts that the token so many places before it in its request also used."""
    overlap_request_L: F64 | None = None
    """The same for two random tokens of one request; all such pairs weigh alike."""
    jsd_bits_L: F64 | None = None
    """Jensen-Shannon divergence of a request's load from the whole load, mean over requests; short ones read high."""

    top1_entropy_bits_L: F64 | None = None
    mutual_information_bits_L: F64 | None = None
    """Of the first choices of layers l and l + 1 (one entry less than layers); plug-in: too high by about the bias."""
    information_bias_bits_L: F64 | None = None
    recall_L: F64 | None = None
    """Share of the experts of layer l + 1 among the K that go most often with layer l's first choice.

    Learnt on four requests of five and judged on the fifth, each in turn; nan for one request.
    """
    recall_set_L: F64 | None = None
    """The same from all K choices of layer l, their conditional shares summed."""
    recall_popularity_L: F64 | None = None
    """The same from popularity alone: the K fullest experts of layer l + 1."""

    batch_sizes_Z: tuple[int, ...] = BATCH_SIZES
    distinct_LZ: F64 | None = None
    """Experts in use in a step of so many requests that started together, one token each, over 200 steps at most."""
    distinct_independent_LZ: F64 | None = None
    """Experts that as many tokens use on average when they choose independently with the layer's load."""
    step_max_mean_LZ: F64 | None = None
    """Mean over those steps of the fullest expert's load over the mean load."""
    autocorrelation_LZ: F64 | None = None
    """Lag-1 autocorrelation of counts over those steps, about each batch's own mean."""
    lru_hit_LE: F64 | None = None
    """Hit rate of a least-recently-used cache of 0..E experts, kept from request to request."""


def gini(load_E: Floats | Ints) -> float:
    """Return the Gini coefficient of a load; 0 where there is none."""
    ordered_E, num = np.sort(load_E).astype(np.float64), len(load_E)
    total = ordered_E.sum()
    return float((2 * np.arange(1, num + 1) - num - 1) @ ordered_E / (num * total)) if total else 0.0


def max_mean(load_E: Floats | Ints) -> float:
    """Return the fullest expert's load over the mean; nan where there is none."""
    return float(load_E.max() / load_E.mean()) if load_E.any() else np.nan


def zipf_s(load_E: Floats | Ints) -> float:
    """Return minus the slope of log load over log rank on the fullest 75 % of ranks; nan for fewer than two in use."""
    ordered_E = np.sort(load_E)[::-1][: int(0.75 * len(load_E))].astype(np.float64)
    ordered_E = ordered_E[ordered_E > 0]
    if len(ordered_E) < 2:
        return np.nan
    return float(-np.polyfit(np.log(np.arange(1, len(ordered_E) + 1)), np.log(ordered_E), 1)[0])


def summarise(
    source: StepSource, *, lags: tuple[int, ...] = LAGS, batch_sizes: tuple[int, ...] = BATCH_SIZES, seed: int = 0
) -> TraceStatistics:
    """Return the statistics of a `RoutingTrace`, or of the counts of any other source."""
    if not isinstance(source, RoutingTrace):
        return _summarise_counts(source)
    groups, num_experts = group_requests(source), source.num_experts
    ids_TLK = source.expert_ids_TLK[groups.order_T]
    batches = {size: aligned_batches(groups, size, BATCH_STEPS, seed) for size in batch_sizes}
    layers: list[dict[str, Column]] = []
    for level in range(source.num_layers):
        ids_TK = ids_TLK[:, level]
        layer = _load(np.bincount(ids_TK.ravel(), minlength=num_experts), source.num_tokens, source.top_k)
        layer |= _locality(ids_TK, groups, num_experts, lags)
        layer |= _batches(ids_TK, batches, num_experts)
        layer |= _dependence(ids_TLK[:, level - 1], ids_TK, groups, num_experts) if level else {}
        layers.append(layer)
    return TraceStatistics(
        num_tokens=source.num_tokens,
        num_requests=groups.num_requests,
        lags_G=lags,
        batch_sizes_Z=batch_sizes,
        **_columns(layers),
    )


def _columns(layers: list[dict[str, Column]]) -> dict[str, Any]:
    """Return each statistic over the layers that have it."""
    return {name: np.array([layer[name] for layer in layers if name in layer], np.float64) for name in layers[-1]}


def _summarise_counts(source: StepSource) -> TraceStatistics:
    counts_LE, num_tokens = total_counts(source)
    if not num_tokens:
        raise ValueError("the source has no tokens; record or import at least one step with tokens first")
    layers = [_load(counts_E, num_tokens, source.top_k) for counts_E in counts_LE]
    return TraceStatistics(num_tokens=num_tokens, num_requests=None, **_columns(layers))


def _load(counts_E: Ints, num_tokens: int, top_k: int) -> dict[str, Column]:
    return {
        "gini_L": gini(counts_E),
        "max_mean_L": max_mean(counts_E),
        "zipf_s_L": zipf_s(counts_E),
        "overlap_independent_L": float(((counts_E / num_tokens) ** 2).sum() / top_k),
    }


def _locality(ids_TK: Ints, groups: Grouping, num_experts: int, lags: tuple[int, ...]) -> dict[str, Column]:
    counts_RE = counts_by(groups.request_of[:, None], ids_TK, groups.num_requests, num_experts)
    num_pairs = int((groups.lengths * (groups.lengths - 1)).sum())
    shared = float((counts_RE.astype(np.float64) ** 2).sum() - counts_RE.sum())
    return {
        "overlap_LG": overlap_by_lag(ids_TK, groups.request_of, num_experts, lags),
        "overlap_request_L": shared / (num_pairs * ids_TK.shape[1]) if num_pairs else np.nan,
        "jsd_bits_L": jsd_bits(counts_RE).mean(),
        "lru_hit_LE": lru_hit_rate(ids_TK, num_experts),
    }


def _batches(ids_TK: Ints, batches: dict[int, list[I64]], num_experts: int) -> dict[str, Column]:
    inside_E = np.minimum(np.bincount(ids_TK.ravel(), minlength=num_experts) / len(ids_TK), 1)
    seen_Z3 = np.full((len(batches), 3), np.nan)
    for z, rows in enumerate(batches.values()):
        steps = [step_statistics(ids_TK[rows_PB], num_experts) for rows_PB in rows]
        seen_Z3[z] = np.mean(steps, axis=0) if steps else np.nan
    return {
        "distinct_LZ": seen_Z3[:, 0],
        "step_max_mean_LZ": seen_Z3[:, 1],
        "autocorrelation_LZ": seen_Z3[:, 2],
        "distinct_independent_LZ": [float((1 - (1 - inside_E) ** size).sum()) for size in batches],
    }


def _dependence(below_TK: Ints, ids_TK: Ints, groups: Grouping, num_experts: int) -> dict[str, Column]:
    counts_EE = counts_by(below_TK[:, 0], ids_TK[:, 0], num_experts, num_experts)
    chosen_TE, k = multi_hot(ids_TK, num_experts), ids_TK.shape[1]
    given = {
        "recall_L": multi_hot(below_TK[:, :1], num_experts),
        "recall_set_L": multi_hot(below_TK, num_experts),
        "recall_popularity_L": np.ones((len(ids_TK), 1), np.float32),
    }
    recall = {
        name: conditional_recall(given_TC, chosen_TE, groups.request_of % FOLDS, k) for name, given_TC in given.items()
    }
    return {
        "top1_entropy_bits_L": float(entropy_bits(counts_EE.sum(axis=0) / len(ids_TK))),
        "mutual_information_bits_L": mutual_information_bits(counts_EE),
        "information_bias_bits_L": information_bias_bits(counts_EE),
        **{name: np.nan if value is None else value for name, value in recall.items()},
    }
