"""Continuous batches from single requests, as an inference server makes them: who is in which step.

Not a simulation of time: who runs in a step is fixed before any policy, so that both backends see the same work.

Shape letters: T tokens, S steps, L MoE layers, K top-k.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .requests import group_requests, prompt_lengths
from .schema import I64, PHASES, Phase
from .trace import UNKNOWN, RoutingTrace, StepTable, take_tokens


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
    request_id: int
    rows_T: I64
    """Its rows of the trace, in reading order."""
    prompt_tokens: int
    arrival: float
    """The step, a real number, at which it arrives; closed: 0."""
    done: int = 0

    @property
    def prompt_left(self) -> int:
        return max(self.prompt_tokens - self.done, 0)


def _arrivals(trace: RoutingTrace, composition: Composition) -> Iterator[_Running]:
    """Yield the requests of a trace in random order: once, or with `num_steps` in rounds without end.

    A request keeps its id in the first round; later rounds add a stride, so that ids stay unique.
    """
    if len(np.unique(trace.step_table.segment_S[trace.step_T])) > 1:
        raise ValueError(
            f"the trace holds the segments {', '.join(trace.step_table.segments)}, which never shared a batch; "
            "choose one (--segment, or StoredTrace.select)"
        )
    groups = group_requests(trace)
    prompt_R, rows = prompt_lengths(trace, groups), list(groups.rows())
    id_R = trace.request_id_T[groups.order_T[groups.offsets_R[:-1]]]
    stride, seed, now = int(id_R.max()) + 1, composition.seed, 0.0
    between = np.random.default_rng([seed, 1])
    for draw in itertools.count() if composition.num_steps else range(1):
        for r in np.random.default_rng([seed, 0, draw]).permutation(len(rows)):
            if composition.arrival != "closed":
                now += float(between.exponential(1 / composition.arrival.per_step))
            yield _Running(draw * stride + int(id_R[r]), rows[r], int(prompt_R[r]), now)


def _shares(running: Iterable[_Running], composition: Composition) -> Iterator[tuple[_Running, int]]:
    """Give each running request its tokens of one step: decode first, oldest first, then prompts by chunk."""
    budget = composition.max_tokens_per_step or np.iinfo(np.int64).max
    chunk = composition.prefill_chunk_tokens or np.iinfo(np.int64).max
    for one in sorted(running, key=lambda one: one.prompt_left > 0):
        tokens = min(budget, chunk, one.prompt_left or 1)
        if tokens:
            yield one, tokens
            budget -= tokens


@dataclass(frozen=True, slots=True)
class _Batch:
    """What runs in one step: some rows of the trace, and the requests that they belong to there."""

    rows_T: I64
    request_id_T: I64
    phase: Phase
    arrival_ns: int
    """When the youngest request that enters has arrived; UNKNOWN: none enters, or steps have no time."""


def _batches(trace: RoutingTrace, composition: Composition) -> Iterator[_Batch]:
    """Yield what runs, step by step.

    A step always has tokens: where nobody runs, the clock jumps to the next arrival.
    """
    waiting = _arrivals(trace, composition)
    coming, running, now = next(waiting, None), list[_Running](), 0.0
    step_ns = None if composition.arrival == "closed" else composition.arrival.step_ns
    while running or coming:
        if coming and not running:
            now = max(now, coming.arrival)
        arrival_ns = UNKNOWN
        while coming and len(running) < composition.batch_size and coming.arrival <= now:
            running.append(coming)
            arrival_ns = UNKNOWN if step_ns is None else int(coming.arrival * step_ns)
            coming = next(waiting, None)
        shares = list(_shares(running, composition))
        prompts = {one.prompt_left > 0 for one, _ in shares}
        yield _Batch(
            rows_T=np.concatenate([one.rows_T[one.done : one.done + tokens] for one, tokens in shares]),
            request_id_T=np.repeat([one.request_id for one, _ in shares], [tokens for _, tokens in shares]),
            phase="mixed" if len(prompts) > 1 else "prefill" if True in prompts else "decode",
            arrival_ns=arrival_ns,
        )
        for one, tokens in shares:
            one.done += tokens
        running = [one for one in running if one.done < len(one.rows_T)]
        now += 1


def compose(trace: RoutingTrace, composition: Composition, *, skip: int = 0) -> RoutingTrace:
    """Return a trace's requests in continuous batches, with every column of the trace, less the first `skip` steps."""
    batches = list(itertools.islice(_batches(trace, composition), skip, composition.num_steps))
    arrival_S = np.array([batch.arrival_ns for batch in batches], np.int64)
    made, notes = trace.provenance, f"composed: batches of {composition.batch_size}, seed {composition.seed}"
    return take_tokens(
        trace,
        np.concatenate([batch.rows_T for batch in batches]),
        provenance=replace(made, seed=composition.seed, notes="; ".join(filter(None, (made.notes, notes)))),
        request_id_T=np.concatenate([batch.request_id_T for batch in batches]),
        step_T=np.repeat(np.arange(len(batches)), [len(batch.rows_T) for batch in batches]),
        step_table=StepTable(
            phase_S=np.array([PHASES.index(batch.phase) for batch in batches], np.uint8),
            segment_S=np.zeros(len(batches), np.uint8),
            arrival_ns_S=None if (arrival_S == UNKNOWN).all() else arrival_S,
        ),
    )
