"""Variation of log popularity between requests: split into domains, common factors and a rest, and drawn.

Shape letters: R requests, L MoE layers, E experts, F factors, D domains, X all experts of all layers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .choice import F32

MAX_FACTORS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Tilt:
    """Variation between requests: domains, common factors, and the rest per expert."""

    domain_DLE: F32
    factor_FLE: F32
    own_LE: F32


def split_tilt(tilt_RLE: NDArray[np.float64], domain_R: NDArray[np.int64], num_domains: int) -> Tilt:
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


def typical_tilt(tilt: Tilt, domain_R: NDArray[np.int64], draw: int) -> F32:
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
