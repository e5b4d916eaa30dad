"""Fitting the synthetic generator to a source: likelihood first, then moments, layer by layer.

Deterministic. A trace gives every mechanism but bursts; counts alone give the load and its drift over steps.

Shape letters: T tokens, S steps, P positions, R requests, L MoE layers, E experts, J matrices, H memories, B position
bins, N sampled tokens, C columns of a design matrix, W windows of steps, Q lengths.
"""

from dataclasses import replace

import numpy as np

from .choice import NUM_BINS, Ids, LayerChoice, gumbel, log_weight, top_k
from .likelihood import MAX_REQUESTS, Blocks, Panel, Sample, evenly, layer_sample, most_likely, panel_of
from .matching import match, noise_tape, with_trusted_profile
from .moments import Moments, moments
from .requests import group_requests, prompt_lengths
from .schema import F32, F64, I64, StepSource
from .spec import SynthSpec, logits_of_load, plain_layer
from .trace import RoutingTrace
from .variation import (
    LEAST_WINDOWS,
    MAX_WINDOWS,
    Tilt,
    drift_of,
    split_tilt,
    tilt_variance,
    typical_tilt,
    window_counts,
)

DRAWN_ENTRIES = 2_400_000
"""Marks per layer of the tokens drawn at each correction."""
ACROSS_TOKENS = 30_000
"""Tokens on which the dependence on the layer below is measured."""
LIKELIHOOD_ENTRIES = 9_000_000
"""Marks over all layers of the tokens that the likelihood sees."""
LOAD_TOKENS = 20_000
ROUNDS = ((1.0, 1.0, 0.9, 0.8, 0.7, 0.6), (0.7, 0.5, 0.4), (0.4, 0.3, 0.3))
"""Gains of the corrections; each round draws new requests, so that the fit does not adapt to one draw."""


def _layer(blocks: Blocks, sample: Sample, num_experts: int) -> LayerChoice:
    """Turn the likelihood's blocks into a layer.

    What the matrices add on average moves into the logits, so that scaling them later does not shift the load.
    """
    logit_E, tilt_RE, memory_HE, first_E, weight_CE = blocks
    mean_C = sample.design_NC.mean(axis=0)
    profile_BE, *below = np.split(weight_CE, range(NUM_BINS, len(weight_CE), num_experts))
    shift_JE = [mean_CE @ weight for mean_CE, weight in zip(np.split(mean_C[NUM_BINS:], 2), below, strict=False)]
    marks_J = (1, max(sample.ids_NK.shape[1] - 1, 1))
    names = ("below_first_EE", "below_rest_EE")
    centred = [weight - shift_E / marks for weight, shift_E, marks in zip(below, shift_JE, marks_J, strict=False)]
    return replace(
        plain_layer((logit_E + tilt_RE.mean(axis=0) + sum(shift_JE)).astype(np.float32)),
        first_E=first_E.astype(np.float32),
        profile_BE=profile_BE.astype(np.float32),
        memory_HE=memory_HE.astype(np.float32),
        **{name: weight.astype(np.float32) for name, weight in zip(names, centred, strict=False)},
    )


def fit(source: StepSource) -> SynthSpec:
    """Fit a specification to a `RoutingTrace`, or to the counts of any other source.

    Of a trace at most 512 requests are used, and of each at most its first 512 tokens (more where there are fewer than
    four requests).
    """
    return _fit_trace(source) if isinstance(source, RoutingTrace) else _fit_counts(source)


def _fit_trace(trace: RoutingTrace) -> SynthSpec:
    panel = panel_of(trace)
    layers, tilts = _likeliest(panel, trace.num_experts)
    num_domains = max(len(trace.domains), 1)
    tilt = split_tilt(tilts, panel.domain_R, num_domains)
    layers, scale_LE = _match_layers(panel, layers, tilt)
    drift = _trace_drift(trace)
    # What drift moves over the trace's steps was taken for a tilt of the requests.
    moved = drift**2 * trace.num_tokens / 6e6
    scale_LE *= np.sqrt(np.clip(1 - moved / np.maximum(tilt_variance(tilt) * scale_LE**2, 1e-9), 0.1, 1))
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
        drift_per_million=drift,
        source=f"fitted to {trace.provenance.model or trace.provenance.source}",
    )


def _likeliest(panel: Panel, num_experts: int) -> tuple[list[LayerChoice], F64]:
    """Return each layer's most likely parameters, and the tilts of the panel's requests [R, L, E]."""
    num_layers = panel.ids_PRLK.shape[2]
    num_tokens = int(np.clip(LIKELIHOOD_ENTRIES // (num_layers * num_experts), 4_000, 12_000))
    layers, tilts = list[LayerChoice](), list[F64]()
    for level in range(num_layers):
        sample = layer_sample(panel, level, num_experts, num_tokens)
        blocks = most_likely(sample, num_experts, max_iterations=30)
        layers.append(_layer(blocks, sample, num_experts))
        tilts.append(blocks[1])
    return layers, np.stack(tilts, axis=1)


def _wanted(panel: Panel, num_experts: int, num_across: int) -> list[Moments]:
    ids_LPRK = np.moveaxis(panel.ids_PRLK, 2, 0)
    below = (None, *ids_LPRK[:-1])
    return [
        moments(ids_PRK, panel.shape, below_PRK, num_experts, num_across)
        for ids_PRK, below_PRK in zip(ids_LPRK, below, strict=True)
    ]


def _match_layers(panel: Panel, layers: list[LayerChoice], tilt: Tilt) -> tuple[list[LayerChoice], F32]:
    """Match the layers from the first up, each on what was drawn of the one below.

    Returns:
        The layers, and the factor on each expert's tilt, float32 [L, E].
    """
    num_experts = tilt.own_LE.shape[1]
    num_positions, num_requests = panel.ids_PRLK.shape[:2]
    affordable = max(DRAWN_ENTRIES // (num_experts * num_positions), 16)
    num_drawn = min(affordable, max(2 * num_requests, 96), 384)
    drawn = panel.pick(evenly(num_requests, num_drawn))
    num_across = min(int(panel.shape.tokens_R.sum()), int(drawn.shape.tokens_R.sum()), ACROSS_TOKENS)
    wanted = _wanted(panel, num_experts, num_across)
    layers = [with_trusted_profile(layer, one) for layer, one in zip(layers, wanted, strict=True)]
    # The prior has shrunk the tilts it could not see well.
    scale_LE = np.full_like(tilt.own_LE, 2.0)
    noise = noise_tape(num_positions * len(drawn.domain_R) * num_experts)
    for turn, gains in enumerate(ROUNDS):
        tilt_RLE = typical_tilt(tilt, drawn.domain_R, turn)
        below_PRK: Ids | None = None
        for level, layer in enumerate(layers):
            tilt_RE = tilt_RLE[:, level] * scale_LE[level]
            layers[level], below_PRK, factor_E = match(
                layer, tilt_RE, drawn.shape, below_PRK, wanted[level], gains, num_across, noise
            )
            scale_LE[level] *= factor_E
    return layers, scale_LE


def _lengths(trace: RoutingTrace) -> tuple[I64, I64]:
    """Return prompt and decode lengths in pairs, thinned evenly where there are many requests."""
    groups = group_requests(trace)
    order_R = np.argsort(groups.lengths, kind="stable")
    kept_R = order_R[evenly(len(order_R), min(len(order_R), MAX_REQUESTS))]
    prompt_R = prompt_lengths(trace, groups)[kept_R]
    return prompt_R, groups.lengths[kept_R] - prompt_R


def _trace_drift(trace: RoutingTrace) -> float:
    """Return the drift of a trace whose requests ran side by side; of requests one by one the order says no time."""
    groups = group_requests(trace)
    step_T = trace.step_T[groups.order_T]
    lifetime = float((step_T[groups.offsets_R[1:] - 1] - step_T[groups.offsets_R[:-1]] + 1).mean())
    # Neighbouring windows must hardly share requests.
    num_windows = int(min(trace.num_steps / (2 * lifetime), MAX_WINDOWS))
    if groups.num_requests * lifetime < 2 * trace.num_steps or num_windows < LEAST_WINDOWS:
        return 0.0
    return drift_of(window_counts(trace, num_windows), trace.num_tokens / num_windows)


def _fit_counts(source: StepSource) -> SynthSpec:
    """Fit the load, and its drift where the steps are not labelled as something else than a time."""
    num_windows = 1 if getattr(source, "labels", ()) else min(source.num_steps, MAX_WINDOWS)
    counts_WLE = window_counts(source, max(num_windows, 1))
    counts_LE = counts_WLE.sum(axis=0)
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
        drift_per_million=drift_of(counts_WLE, counts_LE[0].sum() / source.top_k / len(counts_WLE)),
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
