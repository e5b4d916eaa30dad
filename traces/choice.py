"""How one layer chooses experts: Gumbel top-k over logits.

The logits of a token are a sum: popularity, a profile over the position, a tilt of its request, what the layer below
chose for the same token, and what this layer chose for the tokens before it.

Shape letters: P positions, R requests, E experts, K top-k, H memories, B position bins, N rows of any kind.
"""

from dataclasses import dataclass

import numpy as np

from .schema import F32, F64, I32, I64, Bools, Ints

Ids = I32

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

    tokens_R: I64
    prompt_R: I64

    @property
    def alive(self) -> Bools:
        return np.arange(self.tokens_R[0])[:, None] < self.tokens_R

    @property
    def bins(self) -> I64:
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
    profile_BE: F32
    memory_HE: F32
    """Gain on having been chosen before, per memory."""
    below_first_EE: F32
    """[expert below, expert]: what the layer below's first choice adds."""
    below_rest_EE: F32
    lead_EE: F32
    """[first choice below, expert]: added for the first choice alone."""


def multi_hot(ids_NK: Ints, num_experts: int) -> F32:
    """Mark each row's experts with 1; `PAD` marks nothing."""
    hot_NE = np.zeros((len(ids_NK), num_experts + 1), np.float32)
    np.put_along_axis(hot_NE, np.where(ids_NK < 0, num_experts, ids_NK).astype(np.int64), 1, axis=1)
    return hot_NE[:, :num_experts]


def log_weight(inside_E: F64) -> F64:
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


def choose(
    layer: LayerChoice, tilt_RE: F32, shape: Shape, below_PRK: Ids | None, k: int, rng: np.random.Generator
) -> Ids:
    """Draw the experts of every token of a layer, given those of the layer below.

    Returns:
        ids_PRK, in the order of choice; `PAD` beyond a request's end.
    """
    standing_PRE = _standing(layer, tilt_RE, shape, below_PRK)
    lead_PRE = np.broadcast_to(layer.first_E, standing_PRE.shape)
    if below_PRK is not None:
        lead_PRE = (layer.lead_EE + layer.first_E)[np.maximum(below_PRK[..., 0], 0)]
    memory_HRE = np.zeros((len(MEMORY_H), *tilt_RE.shape), np.float32)
    alive_P = shape.alive.sum(axis=1)
    warm = slice(WARM_UP)
    _run(layer, standing_PRE[warm], lead_PRE[warm], memory_HRE, alive_P[warm], k, rng)
    return _run(layer, standing_PRE, lead_PRE, memory_HRE, alive_P, k, rng)


def _run(
    layer: LayerChoice,
    standing_PRE: F32,
    lead_PRE: F32,
    memory_HRE: F32,
    alive_P: I64,
    k: int,
    rng: np.random.Generator,
) -> Ids:
    """Draw position after position; `memory_HRE` is where the memories stand, before and after."""
    noise_PRE, lead_PRE = gumbel(rng, standing_PRE.shape), lead_PRE + gumbel(rng, standing_PRE.shape)
    ids_PRK = np.full((*standing_PRE.shape[:2], k), PAD, np.int32)
    for p, alive in enumerate(alive_P):
        past_HRE = memory_HRE[:, :alive]
        score_RE = standing_PRE[p, :alive] + np.einsum("he,hre->re", layer.memory_HE, past_HRE)
        ids_PRK[p, :alive] = ids_RK = _pick(score_RE + lead_PRE[p, :alive], score_RE + noise_PRE[p, :alive], k)
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


def remember(memory_HRE: F32, ids_RK: Ints) -> None:
    """Fade the memories in place and add what was just chosen."""
    hot_RE = np.zeros(memory_HRE.shape[1:], np.float32)
    hot_RE[np.arange(len(ids_RK))[:, None], ids_RK] = 1
    stays_H11 = np.asarray(MEMORY_H, np.float32)[:, None, None]
    memory_HRE *= stays_H11
    memory_HRE += (1 - stays_H11) * hot_RE
