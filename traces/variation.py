"""How log popularity varies: between requests, as domains, common factors and a rest; over steps, as a random walk.

Shape letters: R requests, L MoE layers, E experts, F factors, D domains, X all experts of all layers, W windows of
steps, U experts of all layers that carry load, J lags.
"""

from dataclasses import dataclass

import numpy as np

from .schema import F32, F64, I64, StepSource

MAX_WINDOWS = 32
LEAST_WINDOWS = 8
PERMUTATIONS = 99
MAX_FACTORS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Tilt:
    """Variation between requests: domains, common factors, and the rest per expert."""

    domain_DLE: F32
    factor_FLE: F32
    own_LE: F32


def split_tilt(tilt_RLE: F64, domain_R: I64, num_domains: int) -> Tilt:
    """Split the requests' tilts; a domain's mean is shrunk as if four more requests had none."""
    shape = tilt_RLE.shape
    tilt_RLE = tilt_RLE - tilt_RLE.mean(axis=0)
    domain_DLE = np.zeros((num_domains, *shape[1:]))
    if num_domains > 1:
        np.add.at(domain_DLE, domain_R, tilt_RLE)
        domain_DLE /= (np.bincount(domain_R, minlength=num_domains) + 1)[:, None, None]
    rest_RX = (tilt_RLE - domain_DLE[domain_R]).reshape(shape[0], -1)
    _, size_F, axis_FX = np.linalg.svd(rest_RX / np.sqrt(shape[0]), full_matrices=False)
    num_factors = min(MAX_FACTORS, shape[0] - 1, len(size_F))
    factor_FX = size_F[:num_factors, None] * axis_FX[:num_factors]
    own_X = np.sqrt(np.maximum((rest_RX**2).mean(axis=0) - (factor_FX**2).sum(axis=0), 0))
    return Tilt(
        domain_DLE=domain_DLE.astype(np.float32),
        factor_FLE=factor_FX.reshape(num_factors, *shape[1:]).astype(np.float32),
        own_LE=own_X.reshape(shape[1:]).astype(np.float32),
    )


def tilt_variance(tilt: Tilt) -> F32:
    """Return the variance of each expert's tilt within a domain, float32 [L, E]."""
    return (tilt.factor_FLE**2).sum(axis=0) + tilt.own_LE**2


def typical_tilt(tilt: Tilt, domain_R: I64, draw: int) -> F32:
    """Draw tilts that are typical for the model: each expert's lie at the quantiles of its normal distribution.

    So the matching does not adapt to the accidents of one draw; how experts move together is still random.
    """
    from scipy.special import ndtri

    rng, num = np.random.default_rng([len(domain_R), draw]), len(domain_R)
    factor_RF = rng.standard_normal((num, len(tilt.factor_FLE)))
    drawn_RLE = np.tensordot(factor_RF, tilt.factor_FLE, axes=1)
    drawn_RLE += tilt.own_LE * rng.standard_normal((num, *tilt.own_LE.shape))
    rank_RLE = drawn_RLE.argsort(axis=0).argsort(axis=0)
    size_LE = np.sqrt(tilt_variance(tilt))
    return (ndtri((rank_RLE + 0.5) / num) * size_LE + tilt.domain_DLE[domain_R]).astype(np.float32)


def window_counts(source: StepSource, num_windows: int) -> I64:
    """Sum the counts over equal stretches of steps, int64 [W, L, E]."""
    counts_WLE = np.zeros((num_windows, source.num_layers, source.num_experts), np.int64)
    for step in source.steps():
        counts_WLE[step.step * num_windows // source.num_steps] += step.counts_LE
    return counts_WLE


def drift_of(counts_WLE: I64, tokens_per_window: float) -> float:
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


def _slope(log_WU: F64) -> float:
    """Return by how much the mean squared difference grows per window of distance, over half of all distances.

    Not from distance 1: neighbours share requests.
    """
    lags_J = np.arange(2, len(log_WU) // 2 + 1)
    apart_J = np.array([((log_WU[lag:] - log_WU[:-lag]) ** 2).mean() for lag in lags_J])
    return float(np.polyfit(lags_J, apart_J, 1)[0])
