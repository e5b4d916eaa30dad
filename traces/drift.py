"""Drift of the load over steps, as a random walk of each expert's log popularity.

Shape letters: S steps, W windows, L MoE layers, E experts, U experts of all layers that carry load, J lags.
"""

import numpy as np
from numpy.typing import NDArray

from .schema import StepSource

MAX_WINDOWS = 32
LEAST_WINDOWS = 8
PERMUTATIONS = 99


def window_counts(source: StepSource, num_windows: int) -> NDArray[np.int64]:
    """Sum the counts over equal stretches of steps, int64 [W, L, E]."""
    counts_WLE = np.zeros((num_windows, source.num_layers, source.num_experts), np.int64)
    for step in source.steps():
        counts_WLE[step.step * num_windows // source.num_steps] += step.counts_LE
    return counts_WLE


def drift_of(counts_WLE: NDArray[np.int64], tokens_per_window: float) -> float:
    """Return the walk's standard deviation over a million tokens; 0 where the windows' order could be any other.

    Squared differences of log load grow in proportion to the distance in time where there is a walk, and do not
    where there is only noise. Experts with less than half the mean load say too little.
    """
    num_windows = len(counts_WLE)
    if num_windows < LEAST_WINDOWS or not counts_WLE.sum(axis=2).all():
        return 0.0
    share_WLE = (counts_WLE + 0.5) / (counts_WLE + 0.5).sum(axis=2, keepdims=True)
    log_WU = np.log(share_WLE[:, share_WLE.mean(axis=0) >= 0.5 / counts_WLE.shape[2]])
    rng = np.random.default_rng([num_windows])
    by_chance = [_slope(log_WU[rng.permutation(num_windows)]) for _ in range(PERMUTATIONS)]
    slope = _slope(log_WU)
    return float(np.sqrt(slope * 1e6 / tokens_per_window)) if slope > max(*by_chance, 0.0) else 0.0


def _slope(log_WU: NDArray[np.float64]) -> float:
    """Return by how much the mean squared difference grows per window of distance, over half of all distances.

    Not from distance 1: neighbours share requests.
    """
    lags_J = np.arange(2, len(log_WU) // 2 + 1)
    apart_J = np.array([((log_WU[lag:] - log_WU[:-lag]) ** 2).mean() for lag in lags_J])
    return float(np.polyfit(lags_J, apart_J, 1)[0])
