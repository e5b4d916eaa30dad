"""What is simulated: the trace's own steps, samples of them, and independent batches of the same requests.

Shape letters: N steps, L MoE layers, E experts, T tokens.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..traces.compose import Composition, compose
from ..traces.schema import PHASES, Provenance, RoutedStep, StepSource
from ..traces.trace import RoutingTrace

MOST_SKIPPED = 2000
LEAST_REQUESTS = 8
"""Re-batching fewer requests than this says nothing about other batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedSteps:
    """A few steps in memory, counts alone; satisfies `StepSource`."""

    top_k: int
    num_layers: int
    num_experts: int
    provenance: Provenance
    kept: tuple[RoutedStep, ...]

    @property
    def num_steps(self) -> int:
        return len(self.kept)

    def steps(self) -> Iterator[RoutedStep]:
        yield from self.kept


def fixed(steps: Iterable[RoutedStep], source: StepSource) -> FixedSteps:
    """Hold steps of a source in memory; they follow each other at once."""
    return FixedSteps(
        top_k=source.top_k,
        num_layers=source.num_layers,
        num_experts=source.num_experts,
        provenance=source.provenance,
        kept=tuple(replace(step, expert_ids_TLK=None, arrival_ns=None) for step in steps),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """One pass over a source: its mean load and a few windows of consecutive steps, spread evenly."""

    num_steps: int
    num_tokens: int
    steps_of_phase: dict[str, int]
    tokens_of_phase: dict[str, int]
    mean_LE: NDArray[np.float64]
    """Mean tokens of each expert per step."""
    windows: FixedSteps


def survey(source: StepSource, *, num_windows: int, window_steps: int, limit: int | None = None) -> Survey:
    """Look at every step, or at the first `limit`, once, holding the windows alone.

    Raises:
        ValueError: the source has no step, or none with a token.
    """
    num_steps = min(source.num_steps, limit or source.num_steps)
    # The middles of equal parts: the very first steps, where every request starts at once, are like no others.
    middles = (np.arange(num_windows) + 0.5) * num_steps / num_windows - window_steps / 2
    starts = np.maximum(middles, 0).astype(int)
    wanted = {int(s) + i for s in starts for i in range(window_steps)}
    total_LE = np.zeros((source.num_layers, source.num_experts), dtype=np.int64)
    steps, tokens = dict.fromkeys(PHASES, 0), dict.fromkeys(PHASES, 0)
    kept: list[RoutedStep] = []
    for index, step in enumerate(itertools.islice(source.steps(), num_steps)):
        total_LE += step.counts_LE
        steps[step.phase] += 1
        tokens[step.phase] += step.num_tokens
        if index in wanted:
            kept.append(step)
    if not total_LE.any():
        raise ValueError(f"the trace has {num_steps} steps and no token in them; record or choose another part of it")
    return Survey(
        num_steps=num_steps,
        num_tokens=sum(tokens.values()),
        steps_of_phase=steps,
        tokens_of_phase=tokens,
        mean_LE=total_LE / num_steps,
        windows=fixed(kept, source),
    )


def composition_like(trace: RoutingTrace) -> Composition | None:
    """Return how a trace's requests were batched, as far as it shows; None when it has too few requests.

    Batches hold as many requests as a busy step of the trace does, and no more tokens than its largest step.
    """
    step_request = np.unique(np.stack([trace.step_T, trace.request_id_T]), axis=1)
    if len(np.unique(trace.request_id_T)) < LEAST_REQUESTS:
        return None
    requests_N = np.bincount(step_request[0], minlength=trace.num_steps)
    tokens_N = np.bincount(trace.step_T, minlength=trace.num_steps)
    return Composition(
        batch_size=max(1, int(np.quantile(requests_N[requests_N > 0], 0.9))),
        max_tokens_per_step=int(tokens_N.max()),
        prefill_chunk_tokens=_chunk(trace),
    )


def _chunk(trace: RoutingTrace) -> int | None:
    """Return the longest stretch of one prompt inside a mixed step; None when the trace mixes no phases."""
    mixed_T = trace.step_table.phase_S[trace.step_T] == PHASES.index("mixed")
    prompt_T = mixed_T & (trace.phase_T == 0)
    if not prompt_T.any():
        return None
    pairs = np.stack([trace.step_T[prompt_T], trace.request_id_T[prompt_T]])
    return int(np.unique(pairs, axis=1, return_counts=True)[1].max())


def rebatched(trace: RoutingTrace, like: Composition, *, num_steps: int, seed: int) -> FixedSteps:
    """Return another batching of a trace's requests.

    Batches start empty, with every prompt at once: steps are taken from when as many have passed as a request lasts.
    """
    skip = min(MOST_SKIPPED, int((trace.phase_T != 0).sum()) // len(np.unique(trace.request_id_T)))
    composed = compose(trace, replace(like, num_steps=skip + num_steps, seed=seed), skip=skip)
    return fixed(composed.steps(first_step=skip), composed)
