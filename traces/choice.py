"""How one layer chooses experts: Gumbel top-k over logits, and its likelihood (Plackett-Luce), fitted to tokens.

The logits of a token are a sum: popularity, a profile over the position, a tilt of its request, what the layer below
chose for the same token, and what this layer chose for the tokens before it.

Shape letters: P positions, R requests, E experts, K top-k, H memories, B position bins, N sampled tokens,
C columns of a design matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Ids = NDArray[np.int32]
Noise = Callable[[tuple[int, ...]], F32]
"""Gives standard Gumbel noise of a shape; not to be written to."""

MEMORY_H = (0.0, 0.7, 0.9)
"""How much of a memory stays from token to token: the token before, the last 3 or so, the last 10."""
FIRST_OF_BIN_B = np.array([*range(16), 20, 24, 32, 48, 64, 96, 128, 192, 256])
"""First position of each bin of the profile; bins of prefill come first, then as many of decode."""
WIDTH_OF_BIN_B = np.diff(FIRST_OF_BIN_B, append=2 * FIRST_OF_BIN_B[-1])
"""Positions of each bin; of the last, which has no end, about."""
NUM_BINS = 2 * len(FIRST_OF_BIN_B)
WARM_UP = 16
"""Tokens after which memories stand as they do at a request's start: a request does not begin from nothing."""
PAD = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Requests side by side, longest first: entries beyond a request's length are `PAD`."""

    tokens_R: NDArray[np.int64]
    prompt_R: NDArray[np.int64]

    @property
    def alive(self) -> NDArray[np.bool_]:
        return np.arange(self.tokens_R[0])[:, None] < self.tokens_R

    @property
    def bins(self) -> NDArray[np.int64]:
        """The profile bin of each token: counted from the prompt's start, then from the first decode token."""
        index_P1 = np.arange(self.tokens_R[0])[:, None]
        decode_PR = index_P1 >= self.prompt_R
        since_PR = np.where(decode_PR, index_P1 - self.prompt_R, index_P1)
        return np.searchsorted(FIRST_OF_BIN_B, since_PR, side="right") - 1 + decode_PR * len(FIRST_OF_BIN_B)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """Parameters of one layer; all arrays float32, natural-log units."""

    logit_E: F32
    first_E: F32
    """Added for the first choice alone: who leads is not who is in the set."""
    sharpness: float
    """Multiplies the logits of the first choice."""
    profile_BE: F32
    memory_HE: F32
    """Gain on having been chosen before, per memory."""
    below_first_EE: F32
    """[expert below, expert]: what the layer below's first choice adds."""
    below_rest_EE: F32


def multi_hot(ids_NK: NDArray[np.integer], num_experts: int) -> F32:
    """Mark each row's experts with 1; `PAD` marks nothing."""
    hot_NE = np.zeros((len(ids_NK), num_experts + 1), np.float32)
    np.put_along_axis(hot_NE, np.where(ids_NK < 0, num_experts, ids_NK).astype(np.int64), 1, axis=1)
    return hot_NE[:, :num_experts]


def log_weight(inside_E: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return logits under which Gumbel top-k chooses experts with about these probabilities.

    Drawing without replacement is a race of exponential clocks stopped at the k-th ring: an expert is in with about
    1 - exp(-weight).
    """
    return np.log(-np.log1p(-np.clip(inside_E, 1e-5, 1 - 1e-3)))


def gumbel(rng: np.random.Generator, shape: tuple[int, ...]) -> F32:
    """Draw standard Gumbel noise."""
    noise = rng.standard_exponential(shape, dtype=np.float32)
    np.maximum(noise, 1e-30, out=noise)
    return np.negative(np.log(noise, out=noise), out=noise)


def top_k(score_NE: F32, k: int) -> Ids:
    """Return the k best of each row, best first; with Gumbel noise in the score, a draw without replacement."""
    return _pick(score_NE, score_NE.copy(), k)


def _standing(layer: LayerChoice, tilt_RE: F32, shape: Shape, below_PRK: Ids | None) -> F32:
    """Sum the logits that do not depend on the tokens before."""
    logit_PRE = layer.profile_BE[shape.bins]
    logit_PRE += layer.logit_E + tilt_RE
    if below_PRK is not None:
        rest_NE = multi_hot(below_PRK.reshape(-1, below_PRK.shape[2])[:, 1:], len(layer.logit_E))
        logit_PRE += (rest_NE @ layer.below_rest_EE).reshape(logit_PRE.shape)
        logit_PRE += layer.below_first_EE[np.maximum(below_PRK[..., 0], 0)]
    return logit_PRE


def choose(layer: LayerChoice, tilt_RE: F32, shape: Shape, below_PRK: Ids | None, k: int, noise: Noise) -> Ids:
    """Draw the experts of every token of a layer, given those of the layer below.

    Returns:
        ids_PRK, in the order of choice; `PAD` beyond a request's end.
    """
    standing_PRE = _standing(layer, tilt_RE, shape, below_PRK)
    memory_HRE = np.zeros((len(MEMORY_H), *tilt_RE.shape), np.float32)
    alive_P = shape.alive.sum(axis=1)
    _run(layer, standing_PRE[:WARM_UP], memory_HRE, alive_P[:WARM_UP], k, noise)
    return _run(layer, standing_PRE, memory_HRE, alive_P, k, noise)


def _run(
    layer: LayerChoice, standing_PRE: F32, memory_HRE: F32, alive_P: NDArray[np.int64], k: int, noise: Noise
) -> Ids:
    """Draw position after position; `memory_HRE` is where the memories stand, before and after."""
    noise_PRE, first_noise_PRE = noise(standing_PRE.shape), noise(standing_PRE.shape) + layer.first_E
    ids_PRK = np.full((*standing_PRE.shape[:2], k), PAD, np.int32)
    for p, alive in enumerate(alive_P):
        past_HRE = memory_HRE[:, :alive]
        score_RE = standing_PRE[p, :alive] + np.einsum("he,hre->re", layer.memory_HE, past_HRE)
        lead_RE = np.float32(layer.sharpness) * score_RE + first_noise_PRE[p, :alive]
        ids_PRK[p, :alive] = ids_RK = _pick(lead_RE, score_RE + noise_PRE[p, :alive], k)
        remember(past_HRE, ids_RK)
    return ids_PRK


def _pick(lead_RE: F32, score_RE: F32, k: int) -> Ids:
    """Pick the best of `lead_RE`, then the best k - 1 others of `score_RE`, which is spent."""
    rows_R = np.arange(len(score_RE))
    ids_RK = np.empty((len(score_RE), k), np.int32)
    ids_RK[:, 0] = lead_RE.argmax(axis=1)
    for j in range(1, k):
        score_RE[rows_R, ids_RK[:, j - 1]] = -np.inf
        ids_RK[:, j] = score_RE.argmax(axis=1)
    return ids_RK


def remember(memory_HRE: F32, ids_RK: NDArray[np.integer]) -> None:
    """Fade the memories in place and add what was just chosen."""
    hot_RE = np.zeros(memory_HRE.shape[1:], np.float32)
    hot_RE[np.arange(len(ids_RK))[:, None], ids_RK] = 1
    stays_H11 = np.asarray(MEMORY_H, np.float32)[:, None, None]
    memory_HRE *= stays_H11
    memory_HRE += (1 - stays_H11) * hot_RE


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Tokens of one layer to fit on, sorted by request."""

    ids_NK: NDArray[np.int64]
    request_N: NDArray[np.int64]
    num_requests: int
    design_NC: F32
    """Marks of the profile bin, then of the first choice below, then of the other choices below."""
    memory_HNE: F32


Blocks = tuple[NDArray[np.float64], ...]
"""logit_E, tilt_RE, memory_HE, first_E, weight_CE."""
PRECISION = (0.03, 1.5, 0.5, 0.03, 0.3)
"""Of the Gaussian prior of each block: weak, but for the tilt, which has few tokens per request."""


def split_blocks(flat: NDArray[np.float64], sample: Sample, num_experts: int) -> Blocks:
    """Cut the vector of all parameters into its blocks."""
    rows = (1, sample.num_requests, len(MEMORY_H), 1, sample.design_NC.shape[1])
    parts = np.split(flat.reshape(-1, num_experts), np.cumsum(rows)[:-1])
    return parts[0][0], parts[1], parts[2], parts[3][0], parts[4]


def _logits(blocks: Blocks, sample: Sample) -> F32:
    logit_E, tilt_RE, memory_HE, _, weight_CE = (block.astype(np.float32) for block in blocks)
    logit_NE = sample.design_NC @ weight_CE
    logit_NE += tilt_RE[sample.request_N]
    logit_NE += logit_E
    for gain_E, memory_NE in zip(memory_HE, sample.memory_HNE, strict=True):
        logit_NE += gain_E * memory_NE
    return logit_NE


def log_likelihood(logit_NE: F32, first_E: F32, ids_NK: NDArray[np.int64]) -> tuple[float, F32, F32]:
    """Return the log-likelihood of ordered choices and its slopes in the logits and in the first choice's extra.

    The first choice is a softmax over logit + first; each later one a softmax over the logits still left.
    """
    row_N = np.arange(len(ids_NK))
    weight_NE = np.exp(logit_NE - logit_NE.max(axis=1, keepdims=True))
    lead_NE = weight_NE * np.exp(first_E)
    lead_NE /= lead_NE.sum(axis=1, keepdims=True)
    chosen_NK = np.maximum(np.take_along_axis(weight_NE, ids_NK, axis=1), 1e-30)
    left_NJ = np.maximum(weight_NE.sum(axis=1, keepdims=True) - chosen_NK.cumsum(axis=1)[:, :-1], 1e-12)
    value = np.log(np.maximum(lead_NE[row_N, ids_NK[:, 0]], 1e-30)).sum() + np.log(chosen_NK[:, 1:] / left_NJ).sum()
    inverse_NJ = np.cumsum(1 / left_NJ, axis=1)
    slope_NE = -weight_NE * inverse_NJ[:, -1:] if inverse_NJ.shape[1] else np.zeros_like(weight_NE)
    slope_NE[row_N, ids_NK[:, 0]] = 0
    slope_NE[row_N[:, None], ids_NK[:, 1:]] = 1 - chosen_NK[:, 1:] * inverse_NJ
    lead_NE *= -1
    lead_NE[row_N, ids_NK[:, 0]] += 1
    return float(value), slope_NE + lead_NE, lead_NE


def _objective(flat: NDArray[np.float64], sample: Sample, num_experts: int) -> tuple[float, NDArray[np.float64]]:
    """Return the negative log-posterior per token and its gradient."""
    blocks = split_blocks(flat, sample, num_experts)
    value, slope_NE, lead_NE = log_likelihood(_logits(blocks, sample), blocks[3].astype(np.float32), sample.ids_NK)
    start_R = np.searchsorted(sample.request_N, np.arange(sample.num_requests))
    tilt_RE = np.zeros((sample.num_requests, num_experts))
    present_R = np.flatnonzero(np.bincount(sample.request_N, minlength=sample.num_requests))
    tilt_RE[present_R] = np.add.reduceat(slope_NE, start_R[present_R], axis=0)
    memory_HE = np.stack([np.einsum("ne,ne->e", slope_NE, memory_NE) for memory_NE in sample.memory_HNE])
    slopes = (slope_NE.sum(axis=0), tilt_RE, memory_HE, lead_NE.sum(axis=0), sample.design_NC.T @ slope_NE)
    gradient = np.concatenate(
        [(slope - weight * block).ravel() for slope, weight, block in zip(slopes, PRECISION, blocks, strict=True)]
    )
    penalty = sum(0.5 * weight * float((block**2).sum()) for weight, block in zip(PRECISION, blocks, strict=True))
    return (penalty - value) / len(sample.ids_NK), -gradient / len(sample.ids_NK)


def most_likely(sample: Sample, num_experts: int, max_iterations: int) -> Blocks:
    """Return the parameters of highest posterior density: a concave problem, begun at the load alone."""
    from scipy.optimize import minimize

    start = np.zeros((2 + sample.num_requests + len(MEMORY_H) + sample.design_NC.shape[1], num_experts))
    start[0] = log_weight(np.bincount(sample.ids_NK.ravel(), minlength=num_experts) / len(sample.ids_NK))
    found = minimize(
        _objective,
        start.ravel(),
        args=(sample, num_experts),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iterations, "maxcor": 8},
    )
    return split_blocks(np.asarray(found.x), sample, num_experts)
