"""Drawing synthetic requests from a specification: in memory as a trace, or endlessly as batches.

Each request has a domain and a tilt of its own (which experts its topic likes, shared over layers); its tokens then
choose layer by layer and position by position: see `choice`. `fit.fit` makes a specification from a trace,
`zipf_spec` from a few numbers. Random streams are keyed by seed, block of requests and layer.

Shape letters: T tokens, S steps, R requests, L MoE layers, E experts, K top-k, F factors of the tilt, P positions.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from .choice import Ids, Shape, choose, gumbel
from .compose import Composition, composed_provenance, routed_steps
from .requests import Request, phases_of
from .schema import F32, I64, Bools, Ints, Provenance, RoutedStep
from .spec import SynthSpec, zipf_spec
from .trace import UNKNOWN, RoutingTrace, StepTable, id_dtype

__all__ = ["SynthSource", "SynthSpec", "synthesise", "zipf_spec"]

BLOCK_ENTRIES = 6_000_000
"""Logits held at once: bounds memory while blocks of requests are drawn."""


def _bursts(spec: SynthSpec, num_requests: int, rng: np.random.Generator) -> Bools:
    """Say for each request whether it arrives with the one before it, so that `burst_share` are in bursts."""
    if spec.burst_size == 1 or not spec.burst_share:
        return np.zeros(num_requests, np.bool_)
    starts = spec.burst_share / (spec.burst_share + spec.burst_size * (1 - spec.burst_share))
    groups = np.where(rng.random(num_requests) < starts, spec.burst_size, 1)
    leads_R = np.isin(np.arange(num_requests), np.concatenate([[0], np.cumsum(groups)]))
    return ~leads_R


def _pairs(spec: SynthSpec, seed: int, first: int, num_requests: int) -> I64:
    """Return the lengths' indices of consecutive requests: each pair comes once in every round of all pairs."""
    num_pairs = len(spec.tokens)
    rounds, places_R = np.divmod(np.arange(first, first + num_requests), num_pairs)
    order_of = {int(r): np.random.default_rng([seed, int(r), 2]).permutation(num_pairs) for r in np.unique(rounds)}
    return np.array([order_of[int(r)][place] for r, place in zip(rounds, places_R, strict=True)], np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Topics:
    """What is decided of some requests before their first token."""

    prompt_R: I64
    tokens_R: I64
    domain_R: I64
    with_previous_R: Bools
    tilt_RLE: F32


def _topics(spec: SynthSpec, seed: int, block: int, first: int, num_requests: int) -> _Topics:
    rng = np.random.default_rng([seed, block, 0])
    with_previous_R = _bursts(spec, num_requests, rng)
    lead_R = np.maximum.accumulate(np.where(with_previous_R, 0, np.arange(num_requests)))
    pair_R = _pairs(spec, seed, first, num_requests)
    domain_R = rng.choice(len(spec.weight_D), num_requests, p=spec.weight_D / spec.weight_D.sum())[lead_R]
    factor_RF = rng.standard_normal((num_requests, len(spec.factor_FLE)), np.float32)[lead_R]
    own_RLE = rng.standard_normal((num_requests, spec.num_layers, spec.num_experts), np.float32)[lead_R]
    tilt_RLE = np.tensordot(factor_RF, spec.factor_FLE, axes=1)
    tilt_RLE += spec.own_LE * own_RLE
    tilt_RLE += spec.domain_DLE[domain_R]
    return _Topics(
        prompt_R=spec.prompt_tokens_Q[pair_R],
        tokens_R=spec.tokens[pair_R],
        domain_R=domain_R,
        with_previous_R=with_previous_R,
        tilt_RLE=tilt_RLE,
    )


def _walk(spec: SynthSpec, tokens_R: I64, key: list[int]) -> F32:
    """Return how far the drift goes during each request, float32 [R, L, E]."""
    rng = np.random.default_rng(key)
    pace_R11 = spec.drift_per_million * np.sqrt(tokens_R / 1e6)[:, None, None]
    return (rng.standard_normal((len(tokens_R), spec.num_layers, spec.num_experts)) * pace_R11).astype(np.float32)


def _token_ids(spec: SynthSpec, topics: _Topics, tilt_RLE: F32, key: list[int]) -> Iterator[Ints]:
    """Yield each request's ids [T, L, K], in the order of `topics`; each layer has a random stream of its own."""
    order_R = np.argsort(-topics.tokens_R, kind="stable")
    shape = Shape(tokens_R=topics.tokens_R[order_R], prompt_R=topics.prompt_R[order_R])
    below_PRK: Ids | None = None
    chosen: list[Ids] = []
    for level, layer in enumerate(spec.layers):
        noise = partial(gumbel, np.random.default_rng([*key, level]))
        below_PRK = choose(layer, tilt_RLE[order_R, level], shape, below_PRK, spec.top_k, noise)
        chosen.append(below_PRK)
    ids_PRLK = np.stack(chosen, axis=2)
    for column, tokens in zip(np.argsort(order_R), topics.tokens_R, strict=True):
        yield ids_PRLK[:tokens, column].astype(id_dtype(spec.num_experts))


def synth_requests(spec: SynthSpec, seed: int, *, num_requests: int | None = None) -> Iterator[Request]:
    """Yield requests, without end unless `num_requests` is given."""
    walk_LE = np.zeros((spec.num_layers, spec.num_experts), np.float32)
    per_block = int(np.clip(BLOCK_ENTRIES // (int(spec.tokens.max()) * spec.num_experts), 8, 512))
    for block in itertools.count():
        first = block * per_block
        here = per_block if num_requests is None else min(per_block, num_requests - first)
        if here <= 0:
            return
        topics = _topics(spec, seed, block, first, here)
        tilt_RLE = topics.tilt_RLE
        if spec.drift_per_million:
            walk_RLE = walk_LE + _walk(spec, topics.tokens_R, [seed, block, 3]).cumsum(axis=0)
            walk_LE, tilt_RLE = walk_RLE[-1], tilt_RLE + walk_RLE
        for r, ids_TLK in enumerate(_token_ids(spec, topics, tilt_RLE, [seed, block, 1])):
            yield Request(
                request_id=first + r,
                prompt_tokens=int(topics.prompt_R[r]),
                expert_ids_TLK=ids_TLK,
                rows_T=np.arange(len(ids_TLK)),
                domain=int(topics.domain_R[r]) if spec.domains else UNKNOWN,
                with_previous=bool(topics.with_previous_R[r]),
            )


def _step_of_tokens(requests: list[Request]) -> I64:
    """Lay requests one after another, bursts side by side: a prompt is one step, each decode token another."""
    start, stop, step_T = 0, 0, list[I64]()
    for request in requests:
        start = start if request.with_previous else stop
        prompt = request.prompt_tokens
        since_T = np.maximum(request.rows_T - prompt + (prompt > 0), 0)
        step_T.append(start + since_T)
        stop = max(stop, start + int(since_T[-1]) + 1)
    return np.concatenate(step_T)


def synthesise(spec: SynthSpec, num_requests: int, seed: int) -> RoutingTrace:
    """Draw requests that run one at a time (bursts: side by side), as a trace; `compose` makes batches of them."""
    if num_requests < 1:
        raise ValueError(f"{num_requests} requests to synthesise; give at least 1")
    requests = list(synth_requests(spec, seed, num_requests=num_requests))
    step_T = _step_of_tokens(requests)
    order_T = np.argsort(step_T, kind="stable")
    lengths = [len(request.rows_T) for request in requests]
    position_T = np.concatenate([request.rows_T for request in requests])
    phase_T = position_T >= np.repeat([request.prompt_tokens for request in requests], lengths)
    num_steps = int(step_T.max()) + 1
    return RoutingTrace(
        num_experts=spec.num_experts,
        provenance=Provenance(source="synthesised", seed=seed, notes=spec.source),
        request_id_T=np.repeat(np.arange(num_requests), lengths)[order_T],
        position_T=position_T[order_T].astype(np.int32),
        phase_T=phase_T[order_T].astype(np.uint8),
        step_T=step_T[order_T],
        domain_T=np.repeat([request.domain for request in requests], lengths)[order_T].astype(np.int16),
        expert_ids_TLK=np.concatenate([request.expert_ids_TLK for request in requests])[order_T],
        step_table=StepTable(
            phase_S=phases_of(phase_T.astype(np.uint8), step_T, num_steps), segment_S=np.zeros(num_steps, np.uint8)
        ),
        domains=spec.domains,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthSource:
    """Synthetic requests in continuous batches, one step at a time, in bounded memory; satisfies `StepSource`.

    The composition says how requests arrive and must name `num_steps`; `seed` is the generator's own.
    """

    spec: SynthSpec
    composition: Composition
    seed: int

    def __post_init__(self) -> None:
        if self.composition.num_steps is None:
            raise ValueError("a synthetic source never ends by itself; give the composition num_steps")

    @property
    def num_layers(self) -> int:
        return self.spec.num_layers

    @property
    def num_experts(self) -> int:
        return self.spec.num_experts

    @property
    def top_k(self) -> int:
        return self.spec.top_k

    @property
    def num_steps(self) -> int:
        return self.composition.num_steps or 0

    @property
    def provenance(self) -> Provenance:
        return composed_provenance(Provenance(source="synthesised", notes=self.spec.source), self.composition)

    def steps(self) -> Iterator[RoutedStep]:
        """Yield the steps in order; each call starts anew and gives the same steps."""
        requests = synth_requests(self.spec, self.seed)
        return routed_steps(requests, self.composition, self.num_experts)
