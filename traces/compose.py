"""Continuous batches from single requests, as an inference server makes them: who is in which step.

Not a simulation of time: who runs in a step is fixed before any policy, so that both backends see the same work.

Shape letters: T tokens, S steps, L MoE layers, K top-k.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .requests import Request, draw_requests
from .schema import PHASES, Phase, Provenance, RoutedStep
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
    done: int = 0
    arrival: float = 0.0

    def left(self, prompt: bool) -> int:
        return (self.request.prompt_tokens if prompt else len(self.request.rows_T)) - self.done


Segment = tuple[Request, int, int]
"""A request and the range of its tokens that a step runs."""


def _arrivals(requests: Iterable[Request], composition: Composition) -> Iterator[_Running]:
    """Yield requests with the step, a real number, at which each arrives; closed: all are there at 0."""
    rng, now = np.random.default_rng([composition.seed, 1]), 0.0
    for request in requests:
        if composition.arrival != "closed" and not request.with_previous:
            now += float(rng.exponential(1 / composition.arrival.per_step))
        yield _Running(request, arrival=now)


def _share(running: Iterable[_Running], composition: Composition) -> list[Segment]:
    """Give each running request its tokens of one step: decode first, oldest first, then prompts by chunk."""
    budget = composition.max_tokens_per_step or np.iinfo(np.int64).max
    chunk = composition.prefill_chunk_tokens or np.iinfo(np.int64).max
    segments: list[Segment] = []
    for prompt in (False, True):
        for one in running:
            left = one.left(prompt=True)
            if (left > 0) != prompt:
                continue
            tokens = min(budget, chunk, left) if prompt else min(budget, 1)
            if tokens:
                segments.append((one.request, one.done, one.done + tokens))
                budget -= tokens
    return segments


def schedule(requests: Iterable[Request], composition: Composition) -> Iterator[tuple[list[Segment], int | None]]:
    """Yield, step by step, what runs and when the youngest request that enters has arrived (None: none enters).

    A step always has tokens: where nobody runs, the clock jumps to the next arrival.
    """
    waiting = _arrivals(requests, composition)
    coming, running, now = next(waiting, None), deque[_Running](), 0.0
    step_ns = None if composition.arrival == "closed" else composition.arrival.step_ns
    while running or coming:
        if coming and not running:
            now = max(now, coming.arrival)
        entered: int | None = None
        while coming and len(running) < composition.batch_size and coming.arrival <= now:
            running.append(coming)
            entered = None if step_ns is None else int(coming.arrival * step_ns)
            coming = next(waiting, None)
        segments = _share(running, composition)
        yield segments, entered
        stop_of = {id(request): stop for request, _, stop in segments}
        for one in running:
            one.done = stop_of.get(id(one.request), one.done)
        running = deque(one for one in running if one.left(prompt=False))
        now += 1


def _phase(segments: list[Segment]) -> Phase:
    prefill = [start < request.prompt_tokens for request, start, _ in segments]
    return "prefill" if all(prefill) else "mixed" if any(prefill) else "decode"


def routed_steps(requests: Iterable[Request], composition: Composition, num_experts: int) -> Iterator[RoutedStep]:
    """Yield the composed steps; memory holds the running requests alone."""
    plan = itertools.islice(schedule(requests, composition), composition.num_steps)
    for step, (segments, arrival_ns) in enumerate(plan):
        ids_TLK = np.concatenate([request.expert_ids_TLK[start:stop] for request, start, stop in segments])
        yield RoutedStep(
            step=step,
            phase=_phase(segments),
            counts_LE=counts_of(ids_TLK, num_experts),
            arrival_ns=arrival_ns,
            num_tokens=len(ids_TLK),
            expert_ids_TLK=ids_TLK,
        )


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
        return self.composition.num_steps or sum(1 for _ in schedule(self._draw(), self.composition))

    @property
    def provenance(self) -> Provenance:
        return composed_provenance(self.trace.provenance, self.composition)

    def steps(self) -> Iterator[RoutedStep]:
        return routed_steps(self._draw(), self.composition, self.num_experts)

    def _draw(self) -> Iterator[Request]:
        return draw_requests(self.trace, self.composition.seed, forever=self.composition.num_steps is not None)


def composed_provenance(provenance: Provenance, composition: Composition) -> Provenance:
    """Return where composed batches come from."""
    notes = f"composed: batches of {composition.batch_size}, seed {composition.seed}"
    return replace(
        provenance, seed=composition.seed, notes=f"{provenance.notes}; {notes}" if provenance.notes else notes
    )


def compose(trace: RoutingTrace, composition: Composition) -> RoutingTrace:
    """Return the same steps as `ComposedSource`, in memory, with every column of the trace."""
    requests = draw_requests(trace, composition.seed, forever=composition.num_steps is not None)
    plan = list(itertools.islice(schedule(requests, composition), composition.num_steps))
    parts = [(step, part) for step, (segments, _) in enumerate(plan) for part in segments]
    rows_T = np.concatenate([request.rows_T[start:stop] for _, (request, start, stop) in parts])
    lengths = [stop - start for _, (_, start, stop) in parts]
    arrival_S = np.array([UNKNOWN if arrival is None else arrival for _, arrival in plan], np.int64)
    return take_tokens(
        trace,
        rows_T,
        provenance=composed_provenance(trace.provenance, composition),
        request_id_T=np.repeat([request.request_id for _, (request, _, _) in parts], lengths).astype(np.int64),
        step_T=np.repeat([step for step, _ in parts], lengths).astype(np.int64),
        step_table=StepTable(
            phase_S=np.array([PHASES.index(_phase(segments)) for segments, _ in plan], np.uint8),
            segment_S=np.zeros(len(plan), np.uint8),
            arrival_ns_S=None if (arrival_S == UNKNOWN).all() else arrival_S,
        ),
    )
