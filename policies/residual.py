"""What measurement adds to the physics: a factor on the time of a slice's kernels, learned from a few of their figures.

A residual is a Gaussian process: log(measured / modelled) of what was measured near by, over figures that the physics
gives. It is bounded by the roofline, tends to the physics away from what was measured, widens its error bar there, and
refuses far outside.

Shape letters: L MoE layers, S slices, P products, F features, N measurements, X places asked for, R waves of a draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from ..traces.schema import F64
from .shares import Shares
from .tiles import TileConstants, matrix_rate_per_s

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
    flops_per_ns = matrix_rate_per_s(shares.device, shares.model.dtype) / 1e9
    return np.maximum(asked_LS7[..., 6] / read_per_ns, asked_LS7[..., 5] / flops_per_ns) / solo_LS


@dataclass(frozen=True, kw_only=True)
class Residual:
    """A fitted residual; a value. Features are centred and scaled before use."""

    mean: Row
    scale: Row
    low: Row
    high: Row
    """Least and greatest of each feature where it was measured."""
    lengths: Row
    """Over which each feature matters, in scales."""
    amplitude: float
    """Standard deviation of the log factor over all that could have been measured."""
    noise: float
    """Of log(measured / predicted) where it was fitted, likewise."""
    points: tuple[Row, ...]
    """Features of the measurements."""
    log_ratios: Row
    """log(measured / modelled) of each."""
    bar: float
    """Half of the 90 % interval of log(measured / predicted) in the middle of what was measured."""
    flags: Row = (0.0,) * len(FLAGS)
    constants: TileConstants = field(default_factory=TileConstants)
    """Of the physics that it corrects."""
    draw: int | None = None
    """Seed of one draw of its error; None: what is most likely."""

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

    def log_factor(self, x_XF: F64) -> F64:
        """Return the log of the factor at some features [..., F]; outside the measured range as at its edge."""
        z_XF = self._placed(x_XF)
        found_X = self._kernel(z_XF) @ self._weights_N
        return found_X if self.draw is None else found_X + self._wave(z_XF)

    def widening(self, x_XF: F64) -> F64:
        """Return how much wider the error bar is at some features [..., F] than in the middle of what was measured."""
        k_XN = self._kernel(self._placed(x_XF))
        known_X = np.einsum("...n,n...->...", k_XN, cho_solve(self._chol, np.moveaxis(k_XN, -1, 0)))
        unknown_X = np.maximum(0.0, self.amplitude**2 - known_X)
        return np.sqrt(1.0 + unknown_X / self.noise**2) * (1.0 + np.linalg.norm(self._beyond(x_XF), axis=-1))

    def drawn(self, seed: int) -> "Residual":
        """Return one draw of the factor, as likely as the measurements leave it."""
        return replace(self, draw=seed)

    @cached_property
    def _points_NF(self) -> F64:
        return self._placed(np.array(self.points))

    @cached_property
    def _chol(self) -> tuple[F64, bool]:
        k_NN = self._kernel(self._points_NF)
        return cho_factor(k_NN + self.noise**2 * np.eye(len(k_NN)))

    @cached_property
    def _weights_N(self) -> F64:
        log_ratio_N = np.array(self.log_ratios)
        if self.draw is not None:
            # A draw before anything was measured, plus what the measurements correct of it (Matheron).
            noise_N = np.random.default_rng([self.draw, 0x5E51D]).standard_normal(len(log_ratio_N))
            log_ratio_N = log_ratio_N - self._wave(self._points_NF) - self.noise * noise_N
        return cho_solve(self._chol, log_ratio_N)

    @cached_property
    def _waves(self) -> tuple[F64, F64]:
        """Return frequencies [F, R] and phases [R] whose waves add up to a draw of the process (random features)."""
        rng = np.random.default_rng([self.draw or 0, 0xF0])
        return rng.standard_normal((len(self.mean), WAVES)), rng.uniform(0.0, 2 * np.pi, WAVES)

    def _wave(self, z_XF: F64) -> F64:
        frequency_FR, phase_R = self._waves
        return self.amplitude * np.sqrt(2 / WAVES) * np.cos(z_XF @ frequency_FR + phase_R).sum(axis=-1)

    def _kernel(self, z_XF: F64) -> F64:
        return _kernel(z_XF, self._points_NF, self.amplitude)

    def _with_flags(self, x_LSF: F64) -> F64:
        flags = np.broadcast_to(self.flags, (*x_LSF.shape[:-1], len(FLAGS)))
        return np.concatenate([x_LSF, flags], axis=-1)

    def _placed(self, x_XF: F64) -> F64:
        return (np.clip(x_XF, self.low, self.high) - self.mean) / self._lengths_F

    @cached_property
    def _lengths_F(self) -> F64:
        return np.array(self.scale) * self.lengths

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


def _kernel(a_XF: F64, b_NF: F64, amplitude: float) -> F64:
    """Return the covariance of the log factor at two sets of places, in lengths."""
    squares = np.square(a_XF).sum(axis=-1)[..., None] + np.square(b_NF).sum(axis=-1) - 2 * (a_XF @ b_NF.T)
    return amplitude**2 * np.exp(-0.5 * np.maximum(squares, 0.0))


WAVES = 256
"""Of a draw."""
LENGTHS, AMPLITUDE, NOISE = (4.5, 1.0), 0.08, 0.02
"""What is expected: of lengths, with the standard deviation of their log, and where the search begins."""
LEAST_NOISE = 0.003
MOST_SOUGHT = 250
"""Measurements that lengths are sought from; all are kept."""


def fit(x_NF: F64, log_ratio_N: F64, like: Residual | None = None) -> Residual:
    """Fit a residual to features and log(measured / modelled) of some measurements; its bar is in-sample.

    Lengths, amplitude and noise are the most likely ones, or those of another fit.
    """
    mean, scale = x_NF.mean(axis=0), np.maximum(x_NF.std(axis=0), LEAST_SCALE)
    if like is None:
        lengths, amplitude, noise = _sought((x_NF - mean) / scale, log_ratio_N)
    else:
        lengths, amplitude, noise = like.lengths, like.amplitude, like.noise
    return Residual(
        mean=_row(mean), scale=_row(scale), low=_row(x_NF.min(axis=0)), high=_row(x_NF.max(axis=0)), lengths=lengths,
        amplitude=amplitude, noise=noise, points=tuple(_row(one) for one in x_NF), log_ratios=_row(log_ratio_N),
        bar=1.645 * noise,
    )  # fmt: skip


def _sought(z_NF: F64, log_ratio_N: F64) -> tuple[Row, float, float]:
    """Return the most likely lengths, amplitude and noise (type II maximum likelihood)."""
    # It takes longer to import than a small simulation takes.
    from scipy.optimize import minimize

    taken = np.unique(np.linspace(0, len(z_NF) - 1, min(MOST_SOUGHT, len(z_NF))).astype(int))
    z_NF, log_ratio_N = z_NF[taken], log_ratio_N[taken]
    expected, spread = LENGTHS

    def surprise(logs: F64) -> float:
        *log_lengths, log_amplitude, log_noise = logs
        at_NF = z_NF / np.exp(log_lengths)
        k_NN = _kernel(at_NF, at_NF, float(np.exp(log_amplitude)))
        chol, lower = cho_factor(k_NN + (np.exp(2 * log_noise) + LEAST_NOISE**2) * np.eye(len(at_NF)))
        misfit = 0.5 * log_ratio_N @ cho_solve((chol, lower), log_ratio_N) + np.log(np.diag(chol)).sum()
        return float(misfit + 0.5 * np.square((np.array(log_lengths) - np.log(expected)) / spread).sum())

    start = np.log([*[expected] * z_NF.shape[1], AMPLITUDE, NOISE])
    bounds = [(-1.5, 5.0)] * z_NF.shape[1] + [(-5.0, 0.0), (-7.0, -1.0)]
    found = np.exp(minimize(surprise, start, method="L-BFGS-B", bounds=bounds, options={"maxiter": 25}).x)
    return _row(found[:-2]), float(found[-2]), float(np.hypot(found[-1], LEAST_NOISE))


def _row(values: Sequence[float] | F64) -> Row:
    return tuple(float(value) for value in values)
