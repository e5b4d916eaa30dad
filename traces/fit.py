"""Fitting the synthetic generator to a source, by drawing and correcting: see `matching`.

Deterministic. A trace gives every mechanism, counts alone give the load.

Shape letters: P positions, R requests, L MoE layers, E experts, F factors, D domains, X all experts of all layers,
Q lengths.
"""

from dataclasses import dataclass

import numpy as np

from .choice import PAD, Ids, LayerChoice, Shape, gumbel, log_weight, multi_hot, top_k
from .matching import Moments, match, moments
from .requests import Grouping, group_requests, prompt_lengths
from .schema import F64, I64, StepSource
from .spec import SynthSpec, Tilt, logits_of_load, plain_layer
from .trace import RoutingTrace, total_counts

MAX_REQUESTS = 512
MAX_POSITIONS = 512
PANEL_ENTRIES = 24_000_000
"""Marks per layer of the tokens that are kept."""
DRAWN_ENTRIES = 4_800_000
"""Marks per layer of the tokens drawn at each correction."""
ACROSS_TOKENS = 30_000
"""Tokens on which the dependence on the layer below is measured."""
LOAD_TOKENS = 20_000
MAX_FACTORS = 32
PRIOR_TOKENS = 10
"""A request's load is taken as if so many more tokens had chosen by the load of all."""
ROUNDS = ((1.0, 1.0, 0.9, 0.8, 0.7, 0.6), (0.7, 0.5, 0.4), (0.4, 0.3, 0.3))
"""Gains of the corrections; each round draws new requests, so that the fit does not adapt to one draw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Requests of a trace side by side, longest first, cut after the same number of positions."""

    shape: Shape
    ids_PRLK: Ids
    domain_R: I64
    """Index of the request's domain; 0 where none is named."""


def evenly(num: int, wanted: int) -> I64:
    """Return `wanted` of the numbers below `num`, evenly spread; repeated where there are too few."""
    return np.linspace(0, num - 1, wanted).round().astype(np.int64)


def fit(source: StepSource) -> SynthSpec:
    """Fit a specification to a `RoutingTrace`, or to the counts of any other source.

    Of a trace at most 512 requests are used, and of each at most its first 512 tokens (more where there are fewer than
    four requests).
    """
    return _fit_trace(source) if isinstance(source, RoutingTrace) else _fit_counts(source)


def _fit_trace(trace: RoutingTrace) -> SynthSpec:
    groups, num_domains = group_requests(trace), max(len(trace.domains), 1)
    panel = _panel(trace, groups)
    layers, tilt = _matched(panel, trace.num_experts, num_domains)
    kept_R = np.argsort(groups.lengths, kind="stable")[
        evenly(groups.num_requests, min(groups.num_requests, MAX_REQUESTS))
    ]
    prompt_R = prompt_lengths(trace, groups)[kept_R]
    return SynthSpec(
        top_k=trace.top_k,
        layers=tuple(layers),
        factor_FLE=tilt.factor_FLE,
        own_LE=tilt.own_LE,
        domain_DLE=tilt.domain_DLE,
        weight_D=np.bincount(panel.domain_R, minlength=num_domains) / len(panel.domain_R),
        domains=trace.domains,
        prompt_tokens_Q=prompt_R,
        decode_tokens_Q=groups.lengths[kept_R] - prompt_R,
        source=f"fitted to {trace.provenance.model or trace.provenance.source}",
    )


def _panel(trace: RoutingTrace, groups: Grouping) -> Panel:
    """Lay the requests of a trace side by side: at most `MAX_REQUESTS` of them, drawn evenly over the trace."""
    chosen_R = evenly(groups.num_requests, min(groups.num_requests, MAX_REQUESTS))
    longest = min(max(PANEL_ENTRIES // (trace.num_experts * len(chosen_R)), 64), MAX_POSITIONS)
    longest = max(longest, 4 * MAX_POSITIONS // len(chosen_R))
    chosen_R = chosen_R[np.argsort(-groups.lengths[chosen_R], kind="stable")]
    tokens_R = np.minimum(groups.lengths[chosen_R], longest)
    ids_PRLK = np.full((tokens_R[0], len(chosen_R), trace.num_layers, trace.top_k), PAD, np.int32)
    for column, (start, tokens) in enumerate(zip(groups.offsets_R[chosen_R], tokens_R, strict=True)):
        ids_PRLK[:tokens, column] = trace.expert_ids_TLK[groups.order_T[start : start + tokens]]
    return Panel(
        shape=Shape(tokens_R=tokens_R, prompt_R=np.minimum(prompt_lengths(trace, groups)[chosen_R], tokens_R)),
        ids_PRLK=ids_PRLK,
        domain_R=np.maximum(trace.domain_T[groups.order_T[groups.offsets_R[chosen_R]]], 0).astype(np.int64),
    )


def _matched(panel: Panel, num_experts: int, num_domains: int) -> tuple[list[LayerChoice], Tilt]:
    """Match the layers from the first up, each on what was drawn of the one below; scale the tilt as they need it."""
    num_positions, num_requests = panel.ids_PRLK.shape[:2]
    affordable = max(DRAWN_ENTRIES // (num_positions * num_experts), 16)
    drawn_R = evenly(num_requests, min(affordable, max(2 * num_requests, 96), 384))
    shape = Shape(tokens_R=panel.shape.tokens_R[drawn_R], prompt_R=panel.shape.prompt_R[drawn_R])
    domain_R = panel.domain_R[drawn_R]
    num_across = min(int(panel.shape.tokens_R.sum()), int(shape.tokens_R.sum()), ACROSS_TOKENS)
    ids_LPRK = np.moveaxis(panel.ids_PRLK, 2, 0)
    wanted = [
        moments(ids_PRK, panel.shape, below_PRK, num_experts, num_across)
        for ids_PRK, below_PRK in zip(ids_LPRK, (None, *ids_LPRK[:-1]), strict=True)
    ]
    tilts_RLE = np.stack([_tilts(*one, panel.shape) for one in zip(ids_LPRK, wanted, strict=True)], axis=1)
    tilt = split_tilt(tilts_RLE, panel.domain_R, num_domains)
    layers = [plain_layer(log_weight(one.inside_E).astype(np.float32)) for one in wanted]
    for turn, gains in enumerate(ROUNDS):
        rng = np.random.default_rng([num_positions, num_requests, turn])
        tilt_RLE, scale_LE = tilt.draw(domain_R, rng), np.ones_like(tilt.own_LE)
        # Centred, so that the load does not adapt to the accidents of one draw.
        tilt_RLE -= (tilt_RLE - tilt.domain_DLE[domain_R]).mean(axis=0)
        below_PRK: Ids | None = None
        for level, layer in enumerate(layers):
            layers[level], below_PRK, scale_LE[level] = match(
                layer, tilt_RLE[:, level], shape, below_PRK, wanted[level], gains, num_across, rng
            )
        tilt = Tilt(
            factor_FLE=tilt.factor_FLE * scale_LE, own_LE=tilt.own_LE * scale_LE, domain_DLE=tilt.domain_DLE * scale_LE
        )
    return layers, tilt


def _tilts(ids_PRK: Ids, wanted: Moments, shape: Shape) -> F64:
    """Return log popularity in each request beyond that in all, float64 [R, E]: a start, which matching scales."""
    num_experts = len(wanted.inside_E)
    marks_NE = multi_hot(ids_PRK.reshape(-1, ids_PRK.shape[2]), num_experts)
    counts_RE = marks_NE.reshape(*ids_PRK.shape[:2], num_experts).sum(axis=0)
    prior_E = PRIOR_TOKENS * wanted.inside_E + 0.5
    return np.log((counts_RE + prior_E) / (shape.tokens_R[:, None] * wanted.inside_E + prior_E))


def split_tilt(tilt_RLE: F64, domain_R: I64, num_domains: int) -> Tilt:
    """Split the requests' tilts into domains, common factors and a rest per expert.

    A domain's mean is shrunk as if one more request had none.
    """
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


def _fit_counts(source: StepSource) -> SynthSpec:
    counts_LE, _ = total_counts(source)
    if not counts_LE.sum(axis=1).all():
        raise ValueError("a layer of the source has no tokens; give counts for every layer")
    return SynthSpec(
        top_k=source.top_k,
        layers=tuple(_load_only(counts_E / counts_E.sum(), source.top_k) for counts_E in counts_LE),
        factor_FLE=np.zeros((0, *counts_LE.shape), np.float32),
        own_LE=np.zeros(counts_LE.shape, np.float32),
        domain_DLE=np.zeros((1, *counts_LE.shape), np.float32),
        weight_D=np.ones(1),
        source=f"load of {source.provenance.model or source.provenance.source}",
    )


def _load_only(share_E: F64, k: int) -> LayerChoice:
    """Return a layer of this load, corrected until what it draws has it."""
    logit_E = logits_of_load(share_E, k)
    for turn in range(6):
        noise_NE = gumbel(np.random.default_rng([turn]), (LOAD_TOKENS, len(share_E)))
        drawn_E = np.bincount(top_k(logit_E + noise_NE, k).ravel(), minlength=len(share_E)) / LOAD_TOKENS
        logit_E += (log_weight(share_E * k) - log_weight(drawn_E)).astype(np.float32)
    return plain_layer(logit_E)
