"""Continuous batches from single requests, as an inference server makes them: who is in which step.

Not a simulation of time: who runs in a step is fixed before any policy, so that both backends see the same work.

Shape letters: T tokens, S steps, L MoE layers, K top-k.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .requests import Request, draw_requests
from .schema import I64, PHASES, Phase, Provenance, RoutedStep
from .trace import UNKNOWN, RoutingTrace, StepTable, counts_of, take_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson:
    """Requests arrive at random, `per_step` of them in a step on average, each step taken to last `step_ns`.

    Without `step_ns` the order of arrivals is known but no time: the steps' `arrival_ns` are None.
    """

    per_step: float
    step_ns: int | None = None

    def __post_init__(self) -> None:
        if not self.per_step > 0 or (self.step_ns is not None and self.step_ns < 1):
            raise ValueError(
                f"Poisson arrivals of {self.per_step} requests per step of {self.step_ns} ns; give a rate above 0 "
                "and a step time of at least 1 ns, or no step time"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """How a server batches: at most `batch_size` requests at once, first come, first served.

    A running request gives one token a step once its prompt is done; prompts use what is left of
    `max_tokens_per_step`, at most `prefill_chunk_tokens` of one prompt in a step (None: no limit). "closed": the
    next request waits already. With `num_steps`, requests are drawn again and again, each round shuffled anew, and
    the last ones are cut off; without, each is drawn once and runs to its end, so the batch shrinks in the last steps.
    """

    batch_size: int
    arrival: Literal["closed"] | Poisson = "closed"
    prefill_chunk_tokens: int | None = None
    max_tokens_per_step: int | None = None
    num_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "prefill_chunk_tokens", "max_tokens_per_step", "num_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"composition with {name} {value}; it must be at least 1")


@dataclass(slots=True)
class _Running:
    request: Request
    arrival: float
    """The step, a real number, at which it arrives; closed: 0."""
    done: int = 0

    @property
    def left(self) -> int:
        return len(self.request.rows_T) - self.done

    @property
    def prompt_left(self) -> int:
        return max(self.request.prompt_tokens - self.done, 0)


@dataclass(frozen=True, slots=True)
class _Batch:
    """What runs in one step: some rows of the trace, and the requests that they belong to there."""

    rows_T: I64
    request_id_T: I64
    phase: Phase
    arrival_ns: int | None
    """When the youngest request that enters has arrived; None: none enters, or steps have no time."""


def _arrivals(trace: RoutingTrace, composition: Composition) -> Iterator[_Running]:
    rng, now = np.random.default_rng([composition.seed, 1]), 0.0
    for request in draw_requests(trace, composition.seed, forever=composition.num_steps is not None):
        if composition.arrival != "closed":
            now += float(rng.exponential(1 / composition.arrival.per_step))
        yield _Running(request, now)


def _shares(running: Iterable[_Running], composition: Composition) -> Iterator[tuple[_Running, int]]:
    """Give each running request its tokens of one step: decode first, oldest first, then prompts by chunk."""
    budget = composition.max_tokens_per_step or np.iinfo(np.int64).max
    chunk = composition.prefill_chunk_tokens or np.iinfo(np.int64).max
    for one in sorted(running, key=lambda one: one.prompt_left > 0):
        tokens = min(budget, chunk, one.prompt_left or 1)
        if tokens:
            yield one, tokens
            budget -= tokens


def _batches(trace: RoutingTrace, composition: Composition) -> Iterator[_Batch]:
    """Yield what runs, step by step; memory holds the running requests alone.

    A step always has tokens: where nobody runs, the clock jumps to the next arrival.
    """
    waiting = _arrivals(trace, composition)
    coming, running, now = next(waiting, None), list[_Running](), 0.0
    step_ns = None if composition.arrival == "closed" else composition.arrival.step_ns
    for _ in itertools.count() if composition.num_steps is None else range(composition.num_steps):
        if not running and not coming:
            return
        if coming and not running:
            now = max(now, coming.arrival)
        entered: int | None = None
        while coming and len(running) < composition.batch_size and coming.arrival <= now:
            running.append(coming)
            entered = None if step_ns is None else int(coming.arrival * step_ns)
            coming = next(waiting, None)
        shares = list(_shares(running, composition))
        prompts = {one.prompt_left > 0 for one, _ in shares}
        yield _Batch(
            rows_T=np.concatenate([one.request.rows_T[one.done : one.done + tokens] for one, tokens in shares]),
            request_id_T=np.repeat([one.request.request_id for one, _ in shares], [tokens for _, tokens in shares]),
            phase="mixed" if len(prompts) > 1 else "prefill" if True in prompts else "decode",
            arrival_ns=entered,
        )
        for one, tokens in shares:
            one.done += tokens
        running = [one for one in running if one.left]
        now += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposedSource:
    """A trace's requests in continuous batches, one step at a time; satisfies `StepSource`.

    `steps()` starts anew at each call and gives the same steps.
    """

    trace: RoutingTrace
    composition: Composition

    @property
    def num_layers(self) -> int:
        return self.trace.num_layers

    @property
    def num_experts(self) -> int:
        return self.trace.num_experts

    @property
    def top_k(self) -> int:
        return self.trace.top_k

    @property
    def num_steps(self) -> int:
        return self.composition.num_steps or sum(1 for _ in _batches(self.trace, self.composition))

    @property
    def provenance(self) -> Provenance:
        made, seed = self.trace.provenance, self.composition.seed
        notes = f"composed: batches of {self.composition.batch_size}, seed {seed}"
        return replace(made, seed=seed, notes=f"{made.notes}; {notes}" if made.notes else notes)

    def steps(self) -> Iterator[RoutedStep]:
        for step, batch in enumerate(_batches(self.trace, self.composition)):
            ids_TLK = self.trace.expert_ids_TLK[batch.rows_T]
            yield RoutedStep(
                step=step,
                phase=batch.phase,
                counts_LE=counts_of(ids_TLK, self.num_experts),
                arrival_ns=batch.arrival_ns,
                num_tokens=len(ids_TLK),
                expert_ids_TLK=ids_TLK,
            )


def compose(trace: RoutingTrace, composition: Composition) -> RoutingTrace:
    """Return the same steps as `ComposedSource`, in memory, with every column of the trace."""
    batches = list(_batches(trace, composition))
    arrival_S = np.array([UNKNOWN if batch.arrival_ns is None else batch.arrival_ns for batch in batches], np.int64)
    return take_tokens(
        trace,
        np.concatenate([batch.rows_T for batch in batches]),
        provenance=ComposedSource(trace=trace, composition=composition).provenance,
        request_id_T=np.concatenate([batch.request_id_T for batch in batches]),
        step_T=np.repeat(np.arange(len(batches)), [len(batch.rows_T) for batch in batches]),
        step_table=StepTable(
            phase_S=np.array([PHASES.index(batch.phase) for batch in batches], np.uint8),
            segment_S=np.zeros(len(batches), np.uint8),
            arrival_ns_S=None if (arrival_S == UNKNOWN).all() else arrival_S,
        ),
    )
