"""Matching one layer's moments: draw the layer, compare with the trace, correct, and again.

The likelihood knows each token's past; a generator has only what it drew itself, so small errors feed back. The
corrections make the drawn statistics equal the recorded ones.

Shape letters: P positions, R requests, E experts, K top-k, G lags, H memories.
"""

import math
from dataclasses import replace

import numpy as np

from .choice import WIDTH_OF_BIN_B, Ids, LayerChoice, Noise, Shape, choose, gumbel, log_weight
from .moments import Moments, moments
from .schema import F32, F64

FEW_TOKENS = 5
"""Pairs of experts seen less often than that say little."""
LOAD_GAIN = 0.8
GAIN_H = (1.6, 2.5, 3.0)
"""Memory gain per unit of log-odds of overlap, by memory: the slower, the less one unit moves the overlap."""


def _log_odds(share: F64 | float) -> F64:
    inside = np.clip(share, 1e-5, 1 - 1e-5)
    return np.log(inside / (1 - inside))


def _ratio(wanted: float | None, seen: float | None, least: float) -> float:
    return 1.0 if wanted is None or seen is None else float(np.clip((wanted + least) / (max(seen, 0) + least), 0.5, 2))


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
    # Once by overlap, which full experts decide, and once by divergence, which counts every expert alike.
    overlap = (extra_E.sum() + floor) / (seen_E.sum() + floor)
    divergence = wanted.divergence_bits / max(seen.divergence_bits, 1e-9)
    together = np.clip(overlap**0.3 * divergence**0.7, 0.3, 3)
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


def with_trusted_profile(layer: LayerChoice, wanted: Moments) -> LayerChoice:
    """Return the layer with as much of its profile as is more than chance."""
    return replace(layer, profile_BE=layer.profile_BE * _profile_trust(wanted).astype(np.float32)[:, None])


def _profile_step(wanted: Moments, seen: Moments) -> F64:
    """Return the change of the profile: what a bin lacks beyond what all tokens lack, as far as that is to trust."""
    lacks_BE = log_weight(np.maximum(wanted.inside_BE, 1e-3)) - log_weight(np.maximum(seen.inside_BE, 1e-3))
    lacks_E = log_weight(np.maximum(wanted.inside_E, 1e-3)) - log_weight(np.maximum(seen.inside_E, 1e-3))
    return np.clip(lacks_BE - lacks_E, -1, 1) * (_profile_trust(wanted) * (seen.tokens_B > 0))[:, None]


def _load_error(wanted: Moments, seen: Moments) -> F64:
    return np.clip(log_weight(wanted.inside_E) - log_weight(seen.inside_E), -2, 2)


def _calmed(gain_E: F64, error_E: F64, before_E: F64) -> F64:
    """Halve the gain of each expert whose error has changed sign: its memory answers a correction with more than it."""
    return np.where(error_E * before_E < 0, gain_E / 2, np.minimum(gain_E * 1.2, LOAD_GAIN))


def _lead_step(wanted: Moments, seen: Moments) -> F64 | float:
    """Return the change of the first choice's logits given the first choice below, beyond what its load lacks."""
    if wanted.firsts_EE is None or seen.firsts_EE is None or wanted.inside_E.sum() < 1.5:
        return 0.0
    lacks_EE = np.log(wanted.firsts_EE + FEW_TOKENS) - np.log(seen.firsts_EE + FEW_TOKENS)
    lacks_E = np.log(wanted.firsts_EE.sum(axis=0) + FEW_TOKENS) - np.log(seen.firsts_EE.sum(axis=0) + FEW_TOKENS)
    return np.clip(lacks_EE - lacks_E, -1, 1)


def _corrected(layer: LayerChoice, wanted: Moments, seen: Moments, gain: float, load_gain_E: F64) -> LayerChoice:
    logit_E = load_gain_E * _load_error(wanted, seen)
    first_E = LOAD_GAIN * np.clip(_log_odds(wanted.first_E) - _log_odds(seen.first_E), -2, 2) - logit_E
    memory_H1 = gain * _memory_step(wanted, seen)[:, None]
    first_scale = _ratio(wanted.recall_first, seen.recall_first, 0.02) ** (2 * gain)
    rest_scale = _ratio(wanted.recall_set, seen.recall_set, 0.02) ** (2 * gain)
    # Of a single choice, sharpness would only scale everything.
    several = wanted.inside_E.sum() > 1.5
    sharper = _ratio(wanted.information_bits, seen.information_bits, 0.02) ** (0.4 * gain * several)
    return replace(
        layer,
        # What a memory adds on average leaves the logit again, or the load would shift.
        logit_E=(layer.logit_E + logit_E - memory_H1.sum() * wanted.inside_E).astype(np.float32),
        first_E=(layer.first_E + first_E).astype(np.float32),
        profile_BE=(layer.profile_BE + 0.5 * gain * _profile_step(wanted, seen)).astype(np.float32),
        memory_HE=(layer.memory_HE + memory_H1).astype(np.float32),
        below_first_EE=layer.below_first_EE * np.float32(first_scale),
        below_rest_EE=layer.below_rest_EE * np.float32(rest_scale),
        lead_EE=(layer.lead_EE + 0.5 * gain * _lead_step(wanted, seen)).astype(np.float32),
        sharpness=float(np.clip(layer.sharpness * sharper, 0.2, 5)),
    )


def noise_tape(length: int) -> Noise:
    """Return a source of noise that reads one tape from random places: much faster than fresh noise each time."""
    rng = np.random.default_rng([length])
    tape = gumbel(rng, (2 * length,))

    def read(shape: tuple[int, ...]) -> F32:
        size = math.prod(shape)
        start = int(rng.integers(len(tape) - size + 1))
        return tape[start : start + size].reshape(shape)

    return read


def match(
    layer: LayerChoice,
    tilt_RE: F32,
    shape: Shape,
    below_PRK: Ids | None,
    wanted: Moments,
    gains: tuple[float, ...],
    num_across: int,
    noise: Noise,
) -> tuple[LayerChoice, Ids, F32]:
    """Correct a layer once per gain; `tilt_RE` and `below_PRK` stay the same, the noise is drawn anew each time.

    Returns:
        The layer, what was drawn of it last, and the factor on its tilt, float32 [E].
    """
    k = round(float(wanted.inside_E.sum()))
    scale_E, load_gain_E = np.ones(tilt_RE.shape[1], np.float32), np.full(tilt_RE.shape[1], LOAD_GAIN)
    error_E = np.zeros(tilt_RE.shape[1])
    for gain in gains:
        ids_PRK = choose(layer, tilt_RE * scale_E, shape, below_PRK, k, noise)
        seen = moments(ids_PRK, shape, below_PRK, tilt_RE.shape[1], num_across)
        before_E, error_E = error_E, _load_error(wanted, seen)
        load_gain_E = _calmed(load_gain_E, error_E, before_E)
        layer = _corrected(layer, wanted, seen, gain, load_gain_E)
        scale_E = np.clip(scale_E * _tilt_step(wanted, seen, gain), 0.02, 10).astype(np.float32)
    return layer, choose(layer, tilt_RE * scale_E, shape, below_PRK, k, noise), scale_E
