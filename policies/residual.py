"""What measurement adds to the physics: a factor on the time of a slice's kernels, learned from a few of their figures.

A residual is a ridge regression of log(measured / modelled) on figures that the physics gives. It is bounded by the
roofline, knows the range that it was measured in, widens its error bar away from there, and refuses far outside.

Shape letters: L MoE layers, S slices, P products, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..traces.schema import F64
from .shares import Shares
from .tiles import TileConstants

FEATURES = (
    "log2 ns", "memory share", "wait share", "DRAM share", "matrix share", "L2 share", "log2 part of SMs",
    "log2 CTAs per SM", "log2 tile rows", "log2 tile columns", "log2 products", "log2 slices",
)  # fmt: skip
FLAGS = ("fused", "dependent", "gathered", "pingpong")
"""Of a launch: what plans cannot ask for, but measured launches may have."""
NAMES = FEATURES + FLAGS
LEAST_SCALE = 0.5
"""Of a feature that hardly varied: what a residual may be asked beyond it is in these units."""
FAR = 2.5
"""Distance from the measured ranges, in scales, at which a residual refuses."""
Row = tuple[float, ...]


def chain_ns_LSP2(sums: F64) -> F64:
    """Return the time of each segment alone at the burst clock; `sums` as `work.segment_sums` has them."""
    return np.maximum(sums[..., 0] + sums[..., 1], sums[..., 2])


def features_LSF(sums: F64, shares: Shares) -> F64:
    """Return the figures of each slice's kernels, flags left out; idle slices have zeros for shares."""
    solo_LSP2 = chain_ns_LSP2(sums)
    solo_LS = np.maximum(solo_LSP2.sum(axis=(2, 3)), 1.0)
    asked_LS7 = sums.sum(axis=(2, 3))
    tables, tile_columns = shares.tables, [up.block_n for up, _ in shares.tiles_S]
    of_slice = (
        np.log2(shares.sms_S / shares.device.sm_count),
        np.log2(np.maximum(1.0, shares.ctas_S / shares.sms_S)),
        np.log2(tables.rows_PS[0]),
        np.log2(tile_columns),
        np.full(len(shares.slices), np.log2(len(tables.rows_PS))),
        np.full(len(shares.slices), np.log2(len(shares.slices))),
    )
    found = np.empty((*solo_LS.shape, len(FEATURES)))
    found[..., 0] = np.log2(solo_LS)
    found[..., 1] = solo_LSP2[..., 1].sum(axis=2) / solo_LS
    found[..., 2] = asked_LS7[..., 1] / solo_LS
    found[..., 3] = asked_LS7[..., 2] / solo_LS
    found[..., 4] = asked_LS7[..., 5] / shares.flops_per_ns / solo_LS
    found[..., 5] = asked_LS7[..., 4] / shares.l2_bytes_per_ns / solo_LS
    found[..., 6:] = np.stack(of_slice, axis=-1)
    return found


def least_factor_LS(sums: F64, shares: Shares) -> F64:
    """Return the factors at which each slice's kernels would run at the device's best rates."""
    solo_LS = np.maximum(chain_ns_LSP2(sums).sum(axis=(2, 3)), 1.0)
    asked_LS7 = sums.sum(axis=(2, 3))
    read_per_ns = max(shares.device.read_curve_bytes_per_s) / 1e9
    return np.maximum(asked_LS7[..., 6] / read_per_ns, asked_LS7[..., 5] / shares.flops_per_ns) / solo_LS


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """A fitted residual; a value. Features are centred and scaled before use."""

    mean: Row
    scale: Row
    low: Row
    high: Row
    """Least and greatest of each feature where it was measured."""
    weights: Row
    """The intercept first."""
    covariance: tuple[Row, ...]
    """Of the weights, for noise of 1."""
    noise: float
    """Standard deviation of log(measured / predicted) where it was fitted."""
    bar: float
    """Half of the 90 % interval of log(measured / predicted) in the middle of what was measured."""
    flags: Row = (0.0,) * len(FLAGS)
    constants: TileConstants = field(default_factory=TileConstants)
    """Of the physics that it corrects."""

    def factors_LS(self, sums: F64, shares: Shares) -> F64:
        """Return the factor on each slice's kernels; 1 for idle slices.

        Raises:
            ValueError: a slice is far outside what was measured; the message says what to profile.
        """
        busy_LS = chain_ns_LSP2(sums).sum(axis=(2, 3)) > 0
        x_LSF = self._with_flags(features_LSF(sums, shares))
        self._refuse_far(x_LSF[busy_LS])
        factor_LS = np.exp(self.log_factor(x_LSF))
        return np.where(busy_LS, np.maximum(factor_LS, least_factor_LS(sums, shares)), 1.0)

    def widening(self, x_XF: F64) -> F64:
        """Return how much wider the error bar is at some features [..., F] than in the middle of what was measured."""
        z_XF = self._design(x_XF)
        leverage = np.einsum("...f,fg,...g->...", z_XF, np.array(self.covariance), z_XF)
        return np.sqrt(1.0 + leverage) * (1.0 + np.linalg.norm(self._beyond(x_XF), axis=-1))

    def drawn(self, seed: int) -> "Residual":
        """Return one draw of the weights' error."""
        normal = np.random.default_rng([seed, 0x5E51D]).standard_normal(len(self.weights))
        shift = self.noise * np.linalg.cholesky(np.array(self.covariance)) @ normal
        return replace(self, weights=tuple((np.array(self.weights) + shift).tolist()))

    def _with_flags(self, x_LSF: F64) -> F64:
        flags = np.broadcast_to(self.flags, (*x_LSF.shape[:-1], len(FLAGS)))
        return np.concatenate([x_LSF, flags], axis=-1)

    def _design(self, x_XF: F64) -> F64:
        z_XF = (x_XF - self.mean) / self.scale
        return np.concatenate([np.ones((*z_XF.shape[:-1], 1)), z_XF], axis=-1)

    def log_factor(self, x_XF: F64) -> F64:
        """Return the log of the factor at some features [..., F]; outside the measured range as at its edge."""
        return self._design(np.clip(x_XF, self.low, self.high)) @ np.array(self.weights)

    def _beyond(self, x_XF: F64) -> F64:
        """Return how far each feature lies outside the measured range, in scales."""
        return np.maximum(0.0, np.maximum(np.array(self.low) - x_XF, x_XF - np.array(self.high))) / self.scale

    def _refuse_far(self, x_XF: F64) -> None:
        beyond_XF = self._beyond(x_XF)
        if not beyond_XF.size or np.linalg.norm(beyond_XF, axis=-1).max() <= FAR:
            return
        at, f = np.unravel_index(int(beyond_XF.argmax()), beyond_XF.shape)
        raise ValueError(
            f"the device model was measured at a {NAMES[f]} of {self.low[f]:.3g} to {self.high[f]:.3g} and is asked "
            f"for {x_XF[at, f]:.3g}, which is too far; profile slices and loads like that and calibrate again"
        )


def fit(x_NF: F64, log_ratio_N: F64, *, ridge: float = 1.0) -> Residual:
    """Fit a residual to features and log(measured / modelled) of some measurements; its bar is in-sample.

    `ridge` is the strength of the pull to no effect, in measurements.
    """
    mean, scale = x_NF.mean(axis=0), np.maximum(x_NF.std(axis=0), LEAST_SCALE)
    z_NF = np.concatenate([np.ones((len(x_NF), 1)), (x_NF - mean) / scale], axis=1)
    # The intercept is pulled too little to matter, so that the matrix stays invertible.
    pull = np.diag([1e-3] + [ridge] * x_NF.shape[1])
    covariance = np.linalg.inv(z_NF.T @ z_NF + pull)
    weights = covariance @ z_NF.T @ log_ratio_N
    noise = float(np.sqrt(np.mean((log_ratio_N - z_NF @ weights) ** 2)))
    return Residual(
        mean=_row(mean), scale=_row(scale), low=_row(x_NF.min(axis=0)), high=_row(x_NF.max(axis=0)),
        weights=_row(weights), covariance=tuple(_row(one) for one in covariance), noise=noise, bar=1.645 * noise,
    )  # fmt: skip


def _row(values: Sequence[float] | F64) -> Row:
    return tuple(float(value) for value in values)
