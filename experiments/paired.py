"""Paired statistics: which differences between policies are real. Knows no trace, device or file.

Everything rests on deviations: a bootstrap of the workload, and draws of the model's parameters, each give rows of
"how far every policy's effect might lie from its estimate", drawn jointly so that what policies share cancels in
their differences. An interval need not be symmetric: who is tuned to the nominal model only loses when it is wrong.

Shape letters: P policies, N steps of a series, B bootstrap draws, M draws of the model's parameters, C compositions.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_1samp, ttest_ind

Floats = NDArray[np.float64]

LEVEL = 0.95
NUM_DRAWS = 2000
CHUNK_BLOCKS = 100_000
"""Blocks drawn at once: memory does not grow with the number of draws times the number of steps."""
DIFFERENT_P = 0.02
"""Independent means are called different below this: stricter than `LEVEL`, which errs in 5 of 100 by its nature."""
EXACT_PERCENT = 1e-9
"""Differences below this are rounding, not effects."""


def _memory(series_N: Floats) -> tuple[Floats, NDArray[np.int64], Floats]:
    """Return the autocorrelation by lag, and the lags at which a series remembers itself with their weights.

    Lags reach to twice the last one before a run of five correlations that are all inside the noise; the first half
    counts whole, the second fades. There are none for a constant, a forgetful or a very short series.
    """
    n = len(series_N)
    centred_N = series_N - series_N.mean()
    variance = float(centred_N @ centred_N)
    if n < 8 or variance == 0:
        return np.ones(1), np.arange(0), np.zeros(0)
    max_lag = min(n - 1, int(np.ceil(np.sqrt(n))) + 5)
    rho = np.array([float(centred_N[lag:] @ centred_N[: n - lag]) for lag in range(max_lag + 1)]) / variance
    quiet = np.abs(rho[1:]) < 2 * np.sqrt(np.log10(n) / n)
    window = 2 * next((lag for lag in range(len(quiet)) if quiet[lag : lag + 5].all()), len(quiet))
    lags = np.arange(1, min(window, max_lag) + 1)
    return rho, lags, np.minimum(1.0, 2.0 - 2.0 * lags / max(1, window))


def block_length(series_N: Floats) -> int:
    """Return the length of moving blocks for the mean of a series: Politis and White's rule with Patton's correction.

    A half is added, because blocks that are too short find differences that are not there; a quarter of the series
    is the most, so that at least four blocks remain.
    """
    n, (rho, lags, weight) = len(series_N), _memory(series_N)
    spread = 1 + 2 * float(weight @ rho[lags])
    slope = 2 * float(weight @ (lags * rho[lags]))
    if not len(lags) or spread <= 0:
        return 1
    length = 1.5 * (1.5 * (slope / spread) ** 2 * n) ** (1 / 3)
    return int(np.clip(np.ceil(length), 1, max(1, n // 4)))


def _widening(series_N: Floats, length: int) -> float:
    """Return by how much blocks of that length understate the standard deviation of the mean, at least 1.

    Blocks cut correlations at their ends, which weights lags like a triangle; the flat-top window does not.
    """
    rho, lags, weight = _memory(series_N)
    if not len(lags):
        return 1.0
    whole = 1 + 2 * float(weight @ rho[lags])
    inside = np.arange(1, min(length, len(rho) - 1) + 1)
    cut = 1 + 2 * float((1 - inside / length) @ rho[inside])
    return float(np.sqrt(max(1.0, whole / max(cut, 0.05))))


def _paired_differences(times_PN: Floats, reference: int) -> list[Floats]:
    return [row - times_PN[reference] for p, row in enumerate(times_PN) if p != reference]


def common_block_length(times_PN: Floats, reference: int) -> int:
    """Return the longest block that any policy's paired difference to the reference asks for."""
    return max((block_length(d) for d in _paired_differences(times_PN, reference)), default=1)


def effect_percent(times_PN: Floats, reference: int) -> Floats:
    """Return how much longer each policy takes than the reference on average, in percent; negative is faster."""
    mean_P = times_PN.mean(axis=1)
    return 100 * (mean_P / mean_P[reference] - 1)


def block_bootstrap(
    times_PN: Floats, reference: int, *, seed: int, length: int | None = None, num_draws: int = NUM_DRAWS
) -> Floats:
    """Return deviations [B, P] of the effect under resampling of moving blocks of steps, the same for every policy."""
    n = times_PN.shape[1]
    block = min(n, length or common_block_length(times_PN, reference))
    num_blocks = -(-n // block)
    rng = np.random.default_rng([seed, n, block])
    # Sums up to each step are enough, and cost memory by block instead of by step.
    prefix_PN = np.concatenate([np.zeros((len(times_PN), 1)), np.cumsum(times_PN, axis=1)], axis=1)
    chunks: list[Floats] = []
    chunk = max(1, CHUNK_BLOCKS // num_blocks)
    for first in range(0, num_draws, chunk):
        size = (min(chunk, num_draws - first), num_blocks)
        starts = rng.integers(0, n - block + 1, size=size)
        chunks.append(np.stack([(row[starts + block] - row[starts]).mean(axis=1) for row in prefix_PN], axis=1))
    mean_BP = np.concatenate(chunks)
    effect_BP = 100 * (mean_BP / mean_BP[:, [reference]] - 1)
    # Moving blocks see the middle of the series more often than its ends; centring removes that bias.
    deviation_BP = effect_BP - effect_BP.mean(axis=0)
    widen = max((_widening(d, block) for d in _paired_differences(times_PN, reference)), default=1.0)
    # Few independent blocks know their own spread badly: divide by its draw, as Student's t does.
    freedom = max(2, num_blocks - 1)
    return widen * deviation_BP * np.sqrt(freedom / rng.chisquare(freedom, num_draws))[:, None]


def t_draws(deviations_MP: Floats, *, seed: int, about_mean: bool = False, num_draws: int = NUM_DRAWS) -> Floats:
    """Return [B, P] draws with the spread of a few deviations: multivariate t, wider the fewer there were.

    A handful of parameter draws cannot give a 95 % quantile; their covariance and its uncertainty can. NaN stands for
    a draw that a policy was left out of. With `about_mean` the draws also have the deviations' mean, and predict one
    more deviation of the same kind; a single deviation has no spread about its mean, and is taken about 0.
    """
    known_P = np.isfinite(deviations_MP).sum(axis=0)
    total_P = np.nan_to_num(deviations_MP).sum(axis=0)
    shift_P = np.where(known_P > 1, total_P / np.maximum(known_P, 1), 0.0) if about_mean else np.zeros(len(known_P))
    freedom_P = np.where(known_P > 1, known_P - 1, known_P) if about_mean else known_P
    predict_P = np.sqrt(1 + 1 / np.maximum(known_P, 1)) if about_mean else np.ones(len(known_P))
    rng = np.random.default_rng([seed, len(deviations_MP)])
    normal_BM = rng.standard_normal((num_draws, len(deviations_MP)))
    draws_BP = normal_BM @ np.nan_to_num(deviations_MP - shift_P) * (predict_P / np.sqrt(np.maximum(freedom_P, 1)))
    for freedom in np.unique(freedom_P[freedom_P > 0]).tolist():
        scale_B = np.sqrt(freedom / rng.chisquare(freedom, num_draws))
        draws_BP[:, freedom_P == freedom] *= scale_B[:, None]
    return draws_BP + shift_P


def between_compositions(effect_CP: Floats, within_sd_CP: Floats) -> Floats:
    """Return deviations [C, P] between compositions, less what blocks within each already explain.

    `within_sd_CP` is the block bootstrap's standard deviation of each composition's effect.
    """
    c = len(effect_CP)
    if c < 2:
        return np.zeros((0, effect_CP.shape[1]))
    deviation_CP = (effect_CP - effect_CP.mean(axis=0)) * np.sqrt(c / (c - 1))
    total = float((deviation_CP**2).mean())
    excess = 0.0 if total == 0 else max(0.0, 1 - float((within_sd_CP**2).mean()) / total)
    return deviation_CP * np.sqrt(excess)


def mean_draws(effect_CP: Floats, *, seed: int, num_draws: int = NUM_DRAWS) -> Floats:
    """Return deviations [B, P] of the mean over independent compositions: multivariate t, by their spread."""
    c = len(effect_CP)
    rng = np.random.default_rng([seed, c])
    draws_BP = rng.standard_normal((num_draws, c)) @ (effect_CP - effect_CP.mean(axis=0)) / np.sqrt(c * (c - 1))
    return draws_BP * np.sqrt((c - 1) / rng.chisquare(c - 1, num_draws))[:, None]


def p_of_mean(effect_C: Floats) -> float:
    """Return how likely independent effects are as far from 0 on average as these, if their mean is 0."""
    if not np.ptp(effect_C):
        return float(abs(effect_C[0]) < EXACT_PERCENT)
    return float(np.asarray(ttest_1samp(effect_C, 0.0))[1])


def p_of_difference(one_C: Floats, other_C: Floats) -> float:
    """Return how likely means of two sets of independent compositions differ as much, if they do not (Welch)."""
    return float(np.asarray(ttest_ind(one_C, other_C, equal_var=False))[1])


def holm(p_Q: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number: none of them is below the level by chance, but with that chance."""
    adjusted, highest = [1.0] * len(p_Q), 0.0
    for place, q in enumerate(sorted(range(len(p_Q)), key=lambda q: p_Q[q])):
        highest = max(highest, min(1.0, (len(p_Q) - place) * p_Q[q]))
        adjusted[q] = highest
    return adjusted


def half_width(deviation_BP: Floats) -> Floats:
    """Return the half-width of each policy's interval, for deviations without a side."""
    return np.quantile(np.abs(deviation_BP), LEVEL, axis=0)


def interval(effect_P: Floats, deviation_BP: Floats) -> Floats:
    """Return [2, P] low and high ends; the estimate itself is always inside."""
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low_P, high_P = effect_P + np.quantile(deviation_BP, tails, axis=0)
    return np.stack([np.minimum(low_P, effect_P), np.maximum(high_P, effect_P)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Every pair of policies: the difference in percentage points and its simultaneous interval."""

    difference_PP: Floats
    low_PP: Floats
    high_PP: Floats
    differ_PP: NDArray[np.bool_]
    """Whether the pair's interval leaves out 0."""


def compare_all(effect_P: Floats, deviation_BP: Floats) -> Comparison:
    """Compare every pair so that with probability `LEVEL` no interval misses its difference (max-T).

    Intervals are as wide as the deviations spread about their mean, shifted by that mean, and reach to the estimate.
    """
    p = len(effect_P)
    upper = np.triu_indices(p, 1)
    difference_PP = effect_P[:, None] - effect_P[None, :]
    pairs_BQ = deviation_BP[:, upper[0]] - deviation_BP[:, upper[1]]
    mean_Q, sd_Q = pairs_BQ.mean(axis=0), pairs_BQ.std(axis=0)
    shift_PP, half_PP = np.zeros((p, p)), np.zeros((p, p))
    moving = sd_Q > 0
    if moving.any():
        largest_B = (np.abs(pairs_BQ[:, moving] - mean_Q[moving]) / sd_Q[moving]).max(axis=1)
        half_PP[upper] = float(np.quantile(largest_B, LEVEL)) * sd_Q
    shift_PP[upper] = mean_Q
    shift_PP, half_PP = shift_PP - shift_PP.T, half_PP + half_PP.T
    low_PP = np.minimum(difference_PP, difference_PP + shift_PP - half_PP)
    high_PP = np.maximum(difference_PP, difference_PP + shift_PP + half_PP)
    differ_PP = (low_PP > EXACT_PERCENT) | (high_PP < -EXACT_PERCENT)
    return Comparison(difference_PP=difference_PP, low_PP=low_PP, high_PP=high_PP, differ_PP=differ_PP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """A place in the ranking; `tied` when it is shared."""

    rank: int
    tied: bool


def ranks_with_ties(effect_P: Floats, differ_PP: NDArray[np.bool_]) -> list[Rank]:
    """Rank policies, fastest first; who cannot be told from the best of a group shares its rank (1, 1, 3, ...)."""
    places: dict[int, int] = {}
    leader, first = 0, 1
    for place, p in enumerate(np.argsort(effect_P, kind="stable").tolist(), 1):
        if place == 1 or differ_PP[leader, p]:
            leader, first = p, place
        places[p] = first
    shared = Counter(places.values())
    return [Rank(rank=places[p], tied=shared[places[p]] > 1) for p in range(len(effect_P))]
