"""Drawing synthetic requests from a specification, as a trace; `compose` makes batches of them.

Each request has a domain and a tilt of its own (which experts its topic likes, shared over layers); its tokens then
choose layer by layer and position by position: see `choice`. `fit.fit` makes a specification from a trace,
`zipf_spec` from a few numbers. Random streams are keyed by seed, block of requests and layer.

Shape letters: T tokens, R requests, L MoE layers, E experts, K top-k, P positions.
"""

import numpy as np

from .choice import Ids, Shape, choose
from .requests import phases_of
from .schema import I64, Ints, Provenance
from .spec import SynthSpec, zipf_spec
from .trace import UNKNOWN, RoutingTrace, StepTable, id_dtype

__all__ = ["SynthSpec", "synthesise", "zipf_spec"]

BLOCK_ENTRIES = 6_000_000
"""Logits held at once: bounds memory while blocks of requests are drawn."""


def synthesise(spec: SynthSpec, num_requests: int, seed: int) -> RoutingTrace:
    """Draw requests that run one at a time: a prompt is one step, each decode token another."""
    if num_requests < 1:
        raise ValueError(f"{num_requests} requests to synthesise; give at least 1")
    per_block = int(np.clip(BLOCK_ENTRIES // (int(spec.tokens.max()) * spec.num_experts), 8, 512))
    rng = np.random.default_rng([seed, 1])
    # Each pair of lengths comes once in every round of all pairs.
    pair_R = np.concatenate([rng.permutation(len(spec.tokens)) for _ in range(0, num_requests, len(spec.tokens))])
    pair_R = pair_R[:num_requests]
    domain_R: I64 = rng.choice(len(spec.weight_D), num_requests, p=spec.weight_D / spec.weight_D.sum())
    ids_TLK = [
        _block(spec, pair_R[first : first + per_block], domain_R[first : first + per_block], [seed, first])
        for first in range(0, num_requests, per_block)
    ]
    tokens_R, prompt_R = spec.tokens[pair_R], spec.prompt_tokens_Q[pair_R]
    position_T = np.concatenate([np.arange(tokens) for tokens in tokens_R])
    phase_T = (position_T >= np.repeat(prompt_R, tokens_R)).astype(np.uint8)
    step_T = np.cumsum((position_T == 0) | (phase_T != 0)) - 1
    phase_S = phases_of(phase_T, step_T, int(step_T[-1]) + 1)
    return RoutingTrace(
        num_experts=spec.num_experts,
        provenance=Provenance(source="synthesised", seed=seed, notes=spec.source),
        request_id_T=np.repeat(np.arange(num_requests), tokens_R),
        position_T=position_T.astype(np.int32),
        phase_T=phase_T,
        step_T=step_T,
        domain_T=np.repeat(domain_R if spec.domains else np.full_like(domain_R, UNKNOWN), tokens_R).astype(np.int16),
        expert_ids_TLK=np.concatenate(ids_TLK),
        step_table=StepTable(phase_S=phase_S, segment_S=np.zeros_like(phase_S)),
        domains=spec.domains,
    )


def _block(spec: SynthSpec, pair_R: I64, domain_R: I64, key: list[int]) -> Ints:
    """Draw the tokens of some requests, [T, L, K], one request after another."""
    tilt_RLE = spec.draw(domain_R, np.random.default_rng(key))
    order_R = np.argsort(-spec.tokens[pair_R], kind="stable")
    pair_R, tilt_RLE = pair_R[order_R], tilt_RLE[order_R]
    shape = Shape(tokens_R=spec.tokens[pair_R], prompt_R=spec.prompt_tokens_Q[pair_R])
    below_PRK: Ids | None = None
    chosen: list[Ids] = []
    for level, layer in enumerate(spec.layers):
        rng = np.random.default_rng([*key, 1 + level])
        below_PRK = choose(layer, tilt_RLE[:, level], shape, below_PRK, spec.top_k, rng)
        chosen.append(below_PRK)
    ids_PRLK = np.stack(chosen, axis=2).astype(id_dtype(spec.num_experts))
    parts = [ids_PRLK[: shape.tokens_R[column], column] for column in np.argsort(order_R)]
    return np.concatenate(parts)
