"""Routing in memory: one row per token beside a table of steps, or counts alone. Not the file format: see `store`.

Shape letters: T tokens, S steps, L MoE layers, E experts, K top-k.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .schema import F16, I16, I32, I64, PHASES, U8, Bools, Ints, Phase, Provenance, RoutedStep, StepSource

UNKNOWN = -1
"""Stands in integer columns for a value nobody recorded; null on disk."""


def id_dtype(num_experts: int) -> type[np.unsignedinteger]:
    """Return the narrowest unsigned type that holds ids 0..num_experts-1."""
    return np.uint8 if num_experts <= 256 else np.uint16 if num_experts <= 65536 else np.uint32


def counts_by(group: Ints, expert_ids: Ints, num_groups: int, num_experts: int) -> I64:
    """Count how often each group chose each expert, int64 [groups, E]; `group` broadcasts against the ids."""
    flat = (group.astype(np.int64) * num_experts + expert_ids).ravel()
    return np.bincount(flat, minlength=num_groups * num_experts).reshape(num_groups, num_experts)


def counts_of(expert_ids_TLK: Ints, num_experts: int) -> I32:
    """Count the tokens of each expert in each layer, int32 [L, E]; each row sums to T * K."""
    num_layers = expert_ids_TLK.shape[1]
    return counts_by(np.arange(num_layers)[:, None], expert_ids_TLK, num_layers, num_experts).astype(np.int32)


def total_counts(source: StepSource) -> tuple[I64, int]:
    """Return the tokens of each expert over all steps, int64 [L, E], and the number of tokens."""
    counts_LE, num_tokens = np.zeros((source.num_layers, source.num_experts), np.int64), 0
    for step in source.steps():
        counts_LE += step.counts_LE
        num_tokens += step.num_tokens
    return counts_LE, num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTable:
    """What is known of each step; step s is row s. A column is None when nobody recorded it."""

    phase_S: U8
    """Index into `PHASES`."""
    segment_S: U8
    """Index into `segments`: which part of the recording (a checkpoint, a run) the step belongs to."""
    segments: tuple[str, ...] = ("all",)
    arrival_ns_S: I64 | None = None
    start_ns_S: I64 | None = None
    moe_ns_SL: I64 | None = None
    other_ns_SL: I64 | None = None

    @property
    def num_steps(self) -> int:
        return len(self.phase_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTrace:
    """Routing of every token, sorted by step; satisfies `StepSource`.

    `phase_T` is 0 for prefill and 1 for decode; `domain_T` indexes `domains` (UNKNOWN: none). Ids stand by falling
    router weight where the source kept that order. `gates_TLK` are the combine weights, float16, or None.
    """

    num_experts: int
    provenance: Provenance
    request_id_T: I64
    position_T: I32
    phase_T: U8
    step_T: I64
    domain_T: I16
    expert_ids_TLK: Ints
    step_table: StepTable
    gates_TLK: F16 | None = None
    domains: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.step_T)

    @property
    def num_layers(self) -> int:
        return self.expert_ids_TLK.shape[1]

    @property
    def top_k(self) -> int:
        return self.expert_ids_TLK.shape[2]

    @property
    def num_steps(self) -> int:
        return self.step_table.num_steps

    def steps(self, *, first_step: int = 0) -> Iterator[RoutedStep]:
        """Yield the steps in order, numbered from `first_step`; a step without tokens has zero counts."""
        table = self.step_table
        bounds = np.searchsorted(self.step_T, np.arange(table.num_steps + 1))
        for step in range(table.num_steps):
            ids_TLK = self.expert_ids_TLK[bounds[step] : bounds[step + 1]]
            arrival = None if table.arrival_ns_S is None else int(table.arrival_ns_S[step])
            yield RoutedStep(
                step=first_step + step,
                phase=PHASES[table.phase_S[step]],
                counts_LE=counts_of(ids_TLK, self.num_experts),
                arrival_ns=None if arrival == UNKNOWN else arrival,
                num_tokens=len(ids_TLK),
                expert_ids_TLK=ids_TLK,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """Counts alone, for sources that kept no token order; satisfies `StepSource`.

    `counts_SLE` int64 [S, L, E]. `top_k` may not be in the source; importers ask for it.
    """

    top_k: int
    provenance: Provenance
    counts_SLE: I64
    phase: Phase = "mixed"
    labels: tuple[str, ...] = ()
    """One label per step (a domain, a sequence), or empty."""

    @property
    def num_steps(self) -> int:
        return self.counts_SLE.shape[0]

    @property
    def num_layers(self) -> int:
        return self.counts_SLE.shape[1]

    @property
    def num_experts(self) -> int:
        return self.counts_SLE.shape[2]

    def steps(self, *, first_step: int = 0) -> Iterator[RoutedStep]:
        """Yield the steps in order, numbered from `first_step`."""
        for step, counts_LE in enumerate(self.counts_SLE, first_step):
            yield RoutedStep(
                step=step,
                phase=self.phase,
                counts_LE=counts_LE.astype(np.int32),
                num_tokens=int(counts_LE.sum(axis=1).max(initial=0)) // self.top_k,
            )


TOKEN_COLUMNS = ("request_id_T", "position_T", "phase_T", "domain_T", "expert_ids_TLK", "gates_TLK")
STEP_COLUMNS = ("phase_S", "segment_S", "arrival_ns_S", "start_ns_S", "moe_ns_SL", "other_ns_SL")
Rows = slice | Bools | I64


def slice_steps(trace: RoutingTrace, first: int, last: int) -> RoutingTrace:
    """Return steps first..last-1 as a trace of its own, renumbered from 0; arrays are views."""
    begin, end = np.searchsorted(trace.step_T, (first, last))
    tokens = slice(int(begin), int(end))
    table = pick_rows(trace.step_table, slice(first, last))
    return take_tokens(trace, tokens, step_T=trace.step_T[tokens] - first, step_table=table)


def take_steps(trace: RoutingTrace, keep_S: Bools) -> RoutingTrace:
    """Return the steps where `keep_S` is true, renumbered from 0."""
    keep_T = keep_S[trace.step_T]
    step_T = (np.cumsum(keep_S) - 1)[trace.step_T[keep_T]]
    return take_tokens(trace, keep_T, step_T=step_T, step_table=pick_rows(trace.step_table, keep_S))


def take_tokens(trace: RoutingTrace, tokens: Rows, **changes: Any) -> RoutingTrace:
    """Return the trace of some tokens; `changes` give their steps, the step table, and whatever else is new."""
    columns = {name: column[tokens] for name in TOKEN_COLUMNS if (column := getattr(trace, name)) is not None}
    return replace(trace, **columns | changes)


def pick_rows(table: StepTable, steps: Rows) -> StepTable:
    """Return some rows of a step table."""
    rows = {name: column[steps] for name in STEP_COLUMNS if (column := getattr(table, name)) is not None}
    return replace(table, **rows)


def concat(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """Join traces of one model end to end: steps are renumbered, requests keep their ids.

    Names of domains and segments, and the provenance, are the last one's: each trace may only add to the names of
    the one before. Step columns that nobody recorded come back as None.
    """
    offsets = np.cumsum([0, *(trace.num_steps for trace in traces)])
    step_T = np.concatenate([trace.step_T + offset for trace, offset in zip(traces, offsets, strict=False)])
    columns = {name: [getattr(trace, name) for trace in traces] for name in TOKEN_COLUMNS}
    tokens = {
        name: None if any(part is None for part in parts) else np.concatenate(parts) for name, parts in columns.items()
    }
    steps: dict[str, Ints | None] = {}
    for name in STEP_COLUMNS:
        column = np.concatenate([step_column(trace.step_table, name, trace.num_layers) for trace in traces])
        unknown = column.dtype == np.int64 and (column == UNKNOWN).all()
        steps[name] = None if unknown else column
    return replace(traces[-1], step_T=step_T, step_table=replace(traces[-1].step_table, **steps), **tokens)


def step_column(table: StepTable, name: str, num_layers: int) -> Ints:
    """Return a column of the step table, UNKNOWN where it is missing."""
    column: Ints | None = getattr(table, name)
    if column is not None:
        return column
    shape = (table.num_steps, num_layers) if name.endswith("_SL") else (table.num_steps,)
    return np.full(shape, UNKNOWN, dtype=np.int64)
