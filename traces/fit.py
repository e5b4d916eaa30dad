"""Fitting the synthetic generator to a source: likelihood first, then moments, layer by layer.

Deterministic. A trace gives every mechanism; counts alone give the load and, from enough unlabelled steps, its drift.

Shape letters: T tokens, S steps, P positions, R requests, L MoE layers, E experts, K top-k, F factors, D domains,
H memories, N sampled tokens, B position bins.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .choice import (
    F32,
    MEMORY_H,
    NUM_BINS,
    PAD,
    WARM_UP,
    Blocks,
    Ids,
    LayerChoice,
    Sample,
    Shape,
    most_likely,
    multi_hot,
    remember,
)
from .matching import match, moments, profile_trust
from .requests import group_requests, prompt_lengths
from .schema import StepSource
from .spec import SynthSpec, logits_of_load, plain_layer
from .trace import RoutingTrace

MAX_REQUESTS = 512
MAX_POSITIONS = 512
MAX_FACTORS = 32
PANEL_ENTRIES = 24_000_000
"""Marks per layer of the tokens that moments are measured on."""
DRAWN_ENTRIES = 3_000_000
"""Marks per layer of the tokens drawn at each correction."""
ACROSS_TOKENS = 30_000
"""Tokens on which the dependence on the layer below is measured."""
LIKELIHOOD_ENTRIES = 12_000_000
"""Marks over all layers of the tokens that the likelihood sees."""
ROUNDS = ((1.0, 1.0, 0.9, 0.8, 0.7, 0.6), (0.7, 0.5, 0.4), (0.4, 0.3, 0.3))
"""Gains of the corrections; each round draws new requests, so that the fit does not adapt to one draw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Requests of a trace side by side, longest first, cut after the same number of positions."""

    shape: Shape
    ids_PRLK: Ids
    domain_R: NDArray[np.int64]
    """Index of the request's domain; 0 where none is named."""

    def pick(self, columns_R: NDArray[np.int64]) -> "Panel":
        """Return some of the requests (ascending, repeats allowed)."""
        shape = Shape(tokens_R=self.shape.tokens_R[columns_R], prompt_R=self.shape.prompt_R[columns_R])
        ids_PRLK = self.ids_PRLK[: shape.tokens_R[0], columns_R]
        return Panel(shape=shape, ids_PRLK=ids_PRLK, domain_R=self.domain_R[columns_R])


def panel_of(trace: RoutingTrace) -> Panel:
    """Lay the requests of a trace side by side: at most `MAX_REQUESTS` of them, drawn evenly over the trace."""
    groups = group_requests(trace)
    chosen_R = _evenly(groups.num_requests, min(groups.num_requests, MAX_REQUESTS))
    longest = min(max(PANEL_ENTRIES // (trace.num_experts * len(chosen_R)), 64), MAX_POSITIONS)
    longest = max(longest, 4 * MAX_POSITIONS // len(chosen_R))
    chosen_R = chosen_R[np.argsort(-groups.lengths[chosen_R], kind="stable")]
    tokens_R = np.minimum(groups.lengths[chosen_R], longest)
    ids_PRLK = np.full((tokens_R[0], len(chosen_R), trace.num_layers, trace.top_k), PAD, np.int32)
    rows = [
        groups.order_T[groups.offsets_R[r] : groups.offsets_R[r] + n] for r, n in zip(chosen_R, tokens_R, strict=True)
    ]
    for column, rows_T in enumerate(rows):
        ids_PRLK[: len(rows_T), column] = trace.expert_ids_TLK[rows_T]
    return Panel(
        shape=Shape(tokens_R=tokens_R, prompt_R=np.minimum(prompt_lengths(trace, groups)[chosen_R], tokens_R)),
        ids_PRLK=ids_PRLK,
        domain_R=np.maximum([int(trace.domain_T[rows_T[0]]) for rows_T in rows], 0),
    )


def _evenly(num: int, wanted: int) -> NDArray[np.int64]:
    return np.linspace(0, num - 1, wanted).round().astype(np.int64)


def _memories(ids_PRK: Ids, num_experts: int) -> F32:
    """Return what each token's layer remembers before it chooses, float32 [H, P, R, E]."""
    num_positions, num_requests, _ = ids_PRK.shape
    memory_HPRE = np.zeros((len(MEMORY_H), num_positions, num_requests, num_experts), np.float32)
    for ids_RK in ids_PRK[:WARM_UP]:
        alive = int((ids_RK[:, 0] >= 0).sum())
        remember(memory_HPRE[:, 0, :alive], ids_RK[:alive])
    for p in range(1, num_positions):
        memory_HPRE[:, p] = memory_HPRE[:, p - 1]
        remember(memory_HPRE[:, p], ids_PRK[p - 1])
    return memory_HPRE


def _sample(panel: Panel, level: int, num_experts: int, num_tokens: int) -> Sample:
    """Take tokens of one layer for the likelihood, sorted by request."""
    alive_RP = panel.shape.alive.T
    column_N, position_N = np.nonzero(alive_RP)
    if len(column_N) > num_tokens:
        kept_N = np.sort(np.random.default_rng([level]).choice(len(column_N), num_tokens, replace=False))
        column_N, position_N = column_N[kept_N], position_N[kept_N]
    at = (position_N, column_N)
    marks = [multi_hot(panel.shape.bins[at][:, None], NUM_BINS)]
    if level:
        below_NK = panel.ids_PRLK[:, :, level - 1][at]
        marks += [multi_hot(below_NK[:, :1], num_experts), multi_hot(below_NK[:, 1:], num_experts)]
    return Sample(
        ids_NK=panel.ids_PRLK[:, :, level][at].astype(np.int64),
        request_N=column_N,
        num_requests=alive_RP.shape[0],
        design_NC=np.concatenate(marks, axis=1),
        memory_HNE=_memories(panel.ids_PRLK[:, :, level], num_experts)[:, position_N, column_N],
    )


def _layer(blocks: Blocks, sample: Sample, num_experts: int) -> LayerChoice:
    """Turn the likelihood's blocks into a layer.

    What the matrices add on average moves into the logits, so that scaling them later does not shift the load.
    """
    logit_E, tilt_RE, memory_HE, first_E, weight_CE = blocks
    mean_C = sample.design_NC.mean(axis=0)
    profile_BE, *below = np.split(weight_CE, range(NUM_BINS, len(weight_CE), num_experts))
    shift_JE = [mean_CE @ weight for mean_CE, weight in zip(np.split(mean_C[NUM_BINS:], 2), below, strict=False)]
    marks_J = (1, max(sample.ids_NK.shape[1] - 1, 1))
    centred = [weight - shift_E / marks for weight, shift_E, marks in zip(below, shift_JE, marks_J, strict=False)]
    first_EE, rest_EE = centred or (np.zeros((num_experts, num_experts)),) * 2
    return LayerChoice(
        logit_E=(logit_E + tilt_RE.mean(axis=0) + sum(shift_JE)).astype(np.float32),
        first_E=first_E.astype(np.float32),
        sharpness=1.0,
        profile_BE=profile_BE.astype(np.float32),
        memory_HE=memory_HE.astype(np.float32),
        below_first_EE=first_EE.astype(np.float32),
        below_rest_EE=rest_EE.astype(np.float32),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tilt:
    """Variation between requests: domains, common factors, and the rest per expert."""

    domain_DLE: F32
    factor_FLE: F32
    own_LE: F32


def _tilt(tilt_RLE: NDArray[np.float64], domain_R: NDArray[np.int64], num_domains: int) -> _Tilt:
    """Split the requests' tilts; a domain's mean is shrunk as if four more requests had none."""
    shape = tilt_RLE.shape
    tilt_RLE = tilt_RLE - tilt_RLE.mean(axis=0)
    domain_DLE = np.zeros((num_domains, *shape[1:]))
    if num_domains > 1:
        np.add.at(domain_DLE, domain_R, tilt_RLE)
        domain_DLE /= (np.bincount(domain_R, minlength=num_domains) + 4)[:, None, None]
    rest_RX = (tilt_RLE - domain_DLE[domain_R]).reshape(shape[0], -1)
    _, size_F, axis_FX = np.linalg.svd(rest_RX / np.sqrt(shape[0]), full_matrices=False)
    num_factors = min(MAX_FACTORS, shape[0] - 1, len(size_F))
    factor_FX = size_F[:num_factors, None] * axis_FX[:num_factors]
    own_X = np.sqrt(np.maximum((rest_RX**2).mean(axis=0) - (factor_FX**2).sum(axis=0), 0))
    return _Tilt(
        domain_DLE=domain_DLE.astype(np.float32),
        factor_FLE=factor_FX.reshape(num_factors, *shape[1:]).astype(np.float32),
        own_LE=own_X.reshape(shape[1:]).astype(np.float32),
    )


def _typical_tilt(tilt: _Tilt, domain_R: NDArray[np.int64], draw: int) -> F32:
    """Draw tilts that are typical for the model: each expert's lie at the quantiles of its normal distribution.

    So the matching does not adapt to the accidents of one draw; how experts move together is still random.
    """
    from scipy.special import ndtri

    rng, num = np.random.default_rng([len(domain_R), draw]), len(domain_R)
    factor_RF = rng.standard_normal((num, len(tilt.factor_FLE)))
    drawn_RLE = np.tensordot(factor_RF, tilt.factor_FLE, axes=1)
    drawn_RLE += tilt.own_LE * rng.standard_normal((num, *tilt.own_LE.shape))
    rank_RLE = drawn_RLE.argsort(axis=0).argsort(axis=0)
    size_LE = np.sqrt((tilt.factor_FLE**2).sum(axis=0) + tilt.own_LE**2)
    return (ndtri((rank_RLE + 0.5) / num) * size_LE + tilt.domain_DLE[domain_R]).astype(np.float32)


def fit(source: StepSource) -> SynthSpec:
    """Fit a specification to a `RoutingTrace`, or to the counts of any other source."""
    return _fit_trace(source) if isinstance(source, RoutingTrace) else _fit_counts(source)


def _fit_trace(trace: RoutingTrace) -> SynthSpec:
    panel, num_experts = panel_of(trace), trace.num_experts
    layers, tilts = _likeliest(panel, num_experts)
    num_domains = max(len(trace.domains), 1)
    tilt = _tilt(tilts, panel.domain_R, num_domains)
    layers, scale_LE = _match_layers(panel, layers, tilt, num_experts)
    prompt_Q, decode_Q = _lengths(trace)
    return SynthSpec(
        top_k=trace.top_k,
        layers=tuple(layers),
        factor_FLE=tilt.factor_FLE * scale_LE,
        own_LE=tilt.own_LE * scale_LE,
        domain_DLE=tilt.domain_DLE * scale_LE,
        weight_D=np.bincount(panel.domain_R, minlength=num_domains) / len(panel.domain_R),
        domains=trace.domains,
        prompt_tokens_Q=prompt_Q,
        decode_tokens_Q=decode_Q,
        source=f"fitted to {trace.provenance.model or trace.provenance.source}",
    )


def _likeliest(panel: Panel, num_experts: int) -> tuple[list[LayerChoice], NDArray[np.float64]]:
    """Return each layer's most likely parameters, and the tilts of the panel's requests [R, L, E]."""
    num_layers = panel.ids_PRLK.shape[2]
    num_tokens = max(LIKELIHOOD_ENTRIES // (num_layers * num_experts), 4000)
    layers, tilts = list[LayerChoice](), list[NDArray[np.float64]]()
    for level in range(num_layers):
        sample = _sample(panel, level, num_experts, num_tokens)
        blocks = most_likely(sample, num_experts, max_iterations=40)
        layers.append(_layer(blocks, sample, num_experts))
        tilts.append(blocks[1])
    return layers, np.stack(tilts, axis=1)


def _match_layers(
    panel: Panel, layers: list[LayerChoice], tilt: _Tilt, num_experts: int
) -> tuple[list[LayerChoice], F32]:
    """Match the layers from the first up, each on what was drawn of the one below.

    Returns:
        The layers, and the factor on each expert's tilt, float32 [L, E].
    """
    num_positions, num_requests = panel.ids_PRLK.shape[:2]
    wanted_drawn = int(np.clip(DRAWN_ENTRIES // (num_experts * num_positions), 16, 384))
    drawn = panel.pick(_evenly(num_requests, wanted_drawn))
    num_across = min(int(panel.shape.tokens_R.sum()), int(drawn.shape.tokens_R.sum()), ACROSS_TOKENS)
    wanted = [
        moments(ids_PRK, panel.shape, below_PRK, num_experts, num_across)
        for below_PRK, ids_PRK in itertools.pairwise([None, *np.moveaxis(panel.ids_PRLK, 2, 0)])
        if ids_PRK is not None
    ]
    for level, layer in enumerate(layers):
        trust_B1 = profile_trust(wanted[level]).astype(np.float32)[:, None]
        layers[level] = replace(layer, profile_BE=layer.profile_BE * trust_B1)
    # The prior has shrunk the tilts it could not see well.
    scale_LE = np.full_like(tilt.own_LE, 2.0)
    for turn, gains in enumerate(ROUNDS):
        tilt_RLE = _typical_tilt(tilt, drawn.domain_R, turn)
        below_PRK: Ids | None = None
        for level, layer in enumerate(layers):
            tilt_RE = tilt_RLE[:, level] * scale_LE[level]
            matched = match(layer, tilt_RE, drawn.shape, below_PRK, wanted[level], gains, num_across)
            layers[level], below_PRK = matched.layer, matched.ids_PRK
            scale_LE[level] *= matched.tilt_scale_E
    return layers, scale_LE


def _lengths(trace: RoutingTrace) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return prompt and decode lengths in pairs, thinned evenly where there are many requests."""
    groups = group_requests(trace)
    order_R = np.argsort(groups.lengths, kind="stable")
    kept_R = order_R[_evenly(len(order_R), min(len(order_R), MAX_REQUESTS))]
    prompt_R = prompt_lengths(trace, groups)[kept_R]
    return prompt_R, groups.lengths[kept_R] - prompt_R


def _fit_counts(source: StepSource) -> SynthSpec:
    counts_LE = np.zeros((source.num_layers, source.num_experts), np.int64)
    for step in source.steps():
        counts_LE += step.counts_LE
    if not counts_LE.sum(axis=1).all():
        raise ValueError("a layer of the source has no tokens; give counts for every layer")
    shape = counts_LE.shape
    return SynthSpec(
        top_k=source.top_k,
        layers=tuple(_load_only(counts_E / counts_E.sum(), source.top_k) for counts_E in counts_LE),
        factor_FLE=np.zeros((0, *shape), np.float32),
        own_LE=np.zeros(shape, np.float32),
        domain_DLE=np.zeros((1, *shape), np.float32),
        weight_D=np.ones(1),
        source=f"load of {source.provenance.model or source.provenance.source}",
    )


def _load_only(share_E: NDArray[np.float64], top_k: int) -> LayerChoice:
    return plain_layer(logits_of_load(share_E, top_k))
