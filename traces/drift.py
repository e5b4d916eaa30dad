"""Drift of the load over steps, as a random walk of each expert's log popularity.

Shape letters: S steps, W windows, L MoE layers, E experts, U experts of all layers that are in use, J lags.
"""

import numpy as np
from numpy.typing import NDArray

from .schema import StepSource

MAX_WINDOWS = 32
LEAST_WINDOWS = 8


def window_counts(source: StepSource, num_windows: int) -> NDArray[np.int64]:
    """Sum the counts over equal stretches of steps, int64 [W, L, E]."""
    counts_WLE = np.zeros((num_windows, source.num_layers, source.num_experts), np.int64)
    for step in source.steps():
        counts_WLE[step.step * num_windows // source.num_steps] += step.counts_LE
    return counts_WLE


def drift_per_step(counts_WLE: NDArray[np.int64], steps_per_window: float) -> float:
    """Return the standard deviation of the walk per step; 0 where the windows differ by no more than chance.

    Squared differences of log load grow in proportion to the distance in time where there is a walk, and do not
    where there is only noise; every expert with at least half the mean load is one witness.
    """
    num_windows = len(counts_WLE)
    if num_windows < LEAST_WINDOWS or not counts_WLE.sum(axis=2).all():
        return 0.0
    share_WLE = (counts_WLE + 0.5) / (counts_WLE + 0.5).sum(axis=2, keepdims=True)
    used_LE = share_WLE.mean(axis=0) >= 0.5 / counts_WLE.shape[2]
    log_WU = np.log(share_WLE[:, used_LE])
    lags_J = np.arange(1, num_windows // 2 + 1)
    apart_JU = np.stack([((log_WU[lag:] - log_WU[:-lag]) ** 2).mean(axis=0) for lag in lags_J])
    centred_J = lags_J - lags_J.mean()
    slope_U = centred_J @ apart_JU / (centred_J**2).sum()
    error = slope_U.std() / np.sqrt(len(slope_U))
    slope = float(slope_U.mean())
    return float(np.sqrt(slope / steps_per_window)) if slope > 3 * error else 0.0
