"""Matching one layer's moments: draw the layer, compare its counts with the trace's, correct each parameter, and again.

A parameter is corrected by the log of wanted over drawn of what it governs. So the generator, which has only what it
drew itself for a past, comes to have the recorded statistics, and no error feeds back unseen.

Shape letters: P positions, R requests, E experts, K top-k, G lags, H memories, B position bins, N tokens, M some.
"""

from dataclasses import dataclass, replace

import numpy as np

from .choice import NUM_BINS, WIDTH_OF_BIN_B, Ids, LayerChoice, Shape, choose, log_weight, multi_hot
from .schema import F32, F64, I64

LAGS_G = (1, 4, 8, 16)
NEAR_POSITIONS = 200
"""Overlaps are matched on the first tokens of requests, where batches that start together are most alike."""
FEW_FIRSTS, FEW_PAIRS = 20, 5
"""Pairs of a choice below and one here that are seen less often than that say little."""
LOAD_GAIN = 0.8
GAIN_H = (1.6, 2.5, 3.0)
"""Memory gain per unit of log-odds of overlap, by memory: the slower, the less one unit moves the overlap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """What is matched; shares of tokens, float64."""

    inside_E: F64
    inside_BE: F64
    """By profile bin; a bin without tokens is 0."""
    tokens_B: I64
    first_E: F64
    together_E: F64
    """Share of the pairs of tokens of one request that both chose the expert."""
    overlap_G: F64
    """Share of a token's experts that the token `LAGS_G` before it chose, early in requests; nan: none is that long."""
    overlap_any: float
    """The same for any two tokens of a request."""
    firsts_EE: F32 | None = None
    """Tokens by first choice below and first choice here; None in the first layer, as what follows."""
    below_first_EE: F32 | None = None
    """Tokens by first choice below and any choice here."""
    below_rest_EE: F32 | None = None
    """By any other choice below and any choice here."""


def moments(ids_PRK: Ids, shape: Shape, below_PRK: Ids | None, num_experts: int, num_across: int) -> Moments:
    """Measure one layer, given what the layer below chose for the same tokens.

    What depends on the layer below is counted on `num_across` tokens, the same number wherever two measurements are
    compared.
    """
    k = ids_PRK.shape[2]
    hot_NE = multi_hot(ids_PRK.reshape(-1, k), num_experts)
    hot_PRE = hot_NE.reshape(*ids_PRK.shape[:2], num_experts)
    tokens, sum_RE = int(shape.tokens_R.sum()), hot_PRE.sum(axis=0)
    num_pairs = max(int((shape.tokens_R * (shape.tokens_R - 1)).sum()), 1)
    together_E = ((sum_RE.astype(np.float64) ** 2).sum(axis=0) - sum_RE.sum(axis=0)) / num_pairs
    alive_N, bin_N = shape.alive.ravel(), shape.bins.ravel()
    tokens_B = np.bincount(bin_N[alive_N], minlength=NUM_BINS)
    first_NE = multi_hot(ids_PRK.reshape(-1, k)[:, :1], num_experts)
    across: dict[str, F32] = {}
    if below_PRK is not None:
        some_M = np.random.default_rng([num_across]).choice(np.flatnonzero(alive_N), num_across, replace=False)
        below_MK, hot_ME = below_PRK.reshape(-1, k)[some_M], hot_NE[some_M]
        lead_ME, rest_ME = multi_hot(below_MK[:, :1], num_experts), multi_hot(below_MK[:, 1:], num_experts)
        across["firsts_EE"] = lead_ME.T @ first_NE[some_M]
        across |= {"below_first_EE": lead_ME.T @ hot_ME, "below_rest_EE": rest_ME.T @ hot_ME}
    return Moments(
        inside_E=sum_RE.sum(axis=0, dtype=np.float64) / tokens,
        inside_BE=(multi_hot(bin_N[:, None], NUM_BINS).T @ hot_NE) / np.maximum(tokens_B, 1)[:, None],
        tokens_B=tokens_B,
        first_E=first_NE.sum(axis=0, dtype=np.float64) / tokens,
        together_E=together_E,
        overlap_G=np.array([_overlap(hot_PRE, shape, lag, k) for lag in LAGS_G]),
        overlap_any=float(together_E.sum() / k),
        **across,
    )


def _overlap(hot_PRE: F32, shape: Shape, lag: int, k: int) -> float:
    hot_PRE = hot_PRE[:NEAR_POSITIONS]
    pairs = int(np.maximum(np.minimum(shape.tokens_R, NEAR_POSITIONS) - lag, 0).sum())
    return float(np.vdot(hot_PRE[lag:], hot_PRE[:-lag])) / (pairs * k) if pairs else np.nan


def _log_odds(share: F64 | float) -> F64:
    inside = np.clip(share, 1e-5, 1 - 1e-5)
    return np.log(inside / (1 - inside))


def _memory_step(wanted: Moments, seen: Moments) -> F64:
    """Return the change of the memories' gains: fast from lag 1 against 4, middle from 4 against 16, slow from 8."""
    gap_G = _log_odds(wanted.overlap_G) - _log_odds(seen.overlap_G)
    gap_any = float(_log_odds(wanted.overlap_any) - _log_odds(seen.overlap_any))
    gaps = np.array([gap_G[0] - gap_G[1], gap_G[1] - gap_G[3], gap_G[2] - 0.4 * gap_any])
    return np.nan_to_num(gaps) * GAIN_H


def _tilt_step(wanted: Moments, seen: Moments, gain: float) -> F64:
    """Return the factor on each expert's tilt that brings its variance between requests to the wanted one.

    Late corrections, of small gain, move all experts of the layer together: a single expert's variance is known
    from the drawn requests only roughly, and what overshoots adds more than what undershoots takes away.
    """
    extra_E = np.maximum(wanted.together_E - wanted.inside_E**2, 0)
    seen_E = np.maximum(seen.together_E - seen.inside_E**2, 0)
    floor = max(float(extra_E.mean()), 1e-9) / 30
    ratio_E = np.clip((extra_E + floor) / (seen_E + floor), 0.3, 3)
    together = np.clip((extra_E.sum() + floor) / (seen_E.sum() + floor), 0.3, 3)
    return ratio_E ** (1.2 * gain**2) * together ** (0.8 * (1 - gain))


def _profile_trust(wanted: Moments) -> F64:
    """Return how much of each bin's deviation from the whole is more than chance, 0..1 per bin.

    Chance is the chi-square of as many independent tokens; those of one request count for fewer, as they are alike.
    """
    variance_E = np.maximum(wanted.inside_E * (1 - wanted.inside_E), 1e-9)
    independent = float((wanted.inside_E**2).sum() / wanted.inside_E.sum())
    alike = np.clip((wanted.overlap_any - independent) / max(1 - independent, 1e-9), 0, 1)
    count_B = wanted.tokens_B / (1 + (np.tile(WIDTH_OF_BIN_B, 2) - 1) * alike)
    excess_B = count_B * ((wanted.inside_BE - wanted.inside_E) ** 2 / variance_E).sum(axis=1)
    return np.maximum(1 - len(variance_E) / np.maximum(excess_B, 1e-9), 0)


def _profile_step(wanted: Moments, seen: Moments) -> F64:
    """Return the change of the profile: what a bin lacks beyond what all tokens lack, as far as that is to trust."""
    lacks_BE = log_weight(np.maximum(wanted.inside_BE, 1e-3)) - log_weight(np.maximum(seen.inside_BE, 1e-3))
    lacks_E = log_weight(np.maximum(wanted.inside_E, 1e-3)) - log_weight(np.maximum(seen.inside_E, 1e-3))
    return np.clip(lacks_BE - lacks_E, -1, 1) * (_profile_trust(wanted) * (seen.tokens_B > 0))[:, None]


def _pairs_step(wanted_EE: F32 | None, seen_EE: F32 | None, few: int) -> F64 | float:
    """Return the change of what a choice below adds, beyond what the expert's whole load lacks."""
    if wanted_EE is None or seen_EE is None:
        return 0.0
    lacks_EE = np.log(wanted_EE + few) - np.log(seen_EE + few)
    lacks_E = np.log(wanted_EE.sum(axis=0) + few) - np.log(seen_EE.sum(axis=0) + few)
    return np.clip(lacks_EE - lacks_E, -1, 1)


def _corrected(layer: LayerChoice, wanted: Moments, seen: Moments, gain: float, k: int) -> LayerChoice:
    logit_E = LOAD_GAIN * np.clip(log_weight(wanted.inside_E) - log_weight(seen.inside_E), -2, 2)
    memory_H1 = gain * _memory_step(wanted, seen)[:, None]
    steps = {
        # What a memory adds on average leaves the logit again, or the load would shift.
        "logit_E": logit_E - memory_H1.sum() * wanted.inside_E,
        "first_E": LOAD_GAIN * np.clip(_log_odds(wanted.first_E) - _log_odds(seen.first_E), -2, 2) - logit_E,
        "memory_HE": memory_H1,
        "profile_BE": 0.5 * gain * _profile_step(wanted, seen),
        "below_first_EE": 0.5 * gain * _pairs_step(wanted.below_first_EE, seen.below_first_EE, FEW_PAIRS),
        # A token has k - 1 of these; their steps add up.
        "below_rest_EE": gain / max(k - 1, 1) * _pairs_step(wanted.below_rest_EE, seen.below_rest_EE, FEW_PAIRS),
    }
    if k > 1:
        steps["lead_EE"] = 0.8 * gain * _pairs_step(wanted.firsts_EE, seen.firsts_EE, FEW_FIRSTS)
    return replace(layer, **{name: (getattr(layer, name) + step).astype(np.float32) for name, step in steps.items()})


def match(
    layer: LayerChoice,
    tilt_RE: F32,
    shape: Shape,
    below_PRK: Ids | None,
    wanted: Moments,
    gains: tuple[float, ...],
    num_across: int,
    rng: np.random.Generator,
) -> tuple[LayerChoice, Ids, F32]:
    """Correct a layer once per gain; `tilt_RE` and `below_PRK` stay the same, the noise is drawn anew each time.

    Returns:
        The layer, what was drawn of it last, and the factor on its tilt, float32 [E].
    """
    k = round(float(wanted.inside_E.sum()))
    scale_E = np.ones(tilt_RE.shape[1], np.float32)
    for gain in gains:
        ids_PRK = choose(layer, tilt_RE * scale_E, shape, below_PRK, k, rng)
        seen = moments(ids_PRK, shape, below_PRK, tilt_RE.shape[1], num_across)
        layer = _corrected(layer, wanted, seen, gain, k)
        scale_E = np.clip(scale_E * _tilt_step(wanted, seen, gain), 0.02, 10).astype(np.float32)
    return layer, choose(layer, tilt_RE * scale_E, shape, below_PRK, k, rng), scale_E
