"""A trace on disk: streamed by row group, checked on the way, narrowed to a part without reading ids."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Generic, TypeVar, cast

import numpy as np
import pyarrow.parquet as pq

from .check import TraceError, check_block, reading
from .columns import STEP_NAMES, read_block, read_steps
from .header import Checksum, Header, parse_header
from .schema import I64, PHASES, Bools, Phase, RoutedStep
from .trace import UNKNOWN, ExpertLoad, RoutingTrace, StepTable, concat, take_steps

CLOCKS = ("arrival_ns_S", "start_ns_S")
B = TypeVar("B", RoutingTrace, ExpertLoad)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored(Generic[B]):
    """Files of one trace, in order, each with its own header, and one header for all; satisfies `StepSource`."""

    files: tuple[tuple[Path, Header], ...]
    header: Header

    num_layers = property(attrgetter("header.num_layers"))
    num_experts = property(attrgetter("header.num_experts"))
    top_k = property(attrgetter("header.top_k"))
    num_steps = property(attrgetter("header.num_steps"))
    provenance = property(attrgetter("header.provenance"))

    def steps(self) -> Iterator[RoutedStep]:
        """Yield the steps in order, holding one row group at a time.

        Raises:
            TraceError: Rows are not sound; that the checksum does not match is known after the last step only.
        """
        first = 0
        for block in self.blocks():
            yield from block.steps(first_step=first)
            first += block.num_steps

    def blocks(self) -> Iterator[B]:
        """Yield consecutive pieces, each a trace or load of its own; check rows, and at a file's end its checksum."""
        one = self.header
        for path, own in self.files:
            checksum = Checksum()
            names = replace(own, domains=one.domains, segments=one.segments, provenance=one.provenance)
            with reading(path), closing(pq.ParquetFile(path)) as file:
                for group in range(file.num_row_groups):
                    first_step, block = read_block(file.read_row_group(group), names)
                    if first_step != checksum.num_steps:
                        raise TraceError(f"step {first_step} follows step {checksum.num_steps - 1}; record it again")
                    check_block(block)
                    checksum.add(block)
                    yield from self._kept(cast("B", block))
                if checksum.of(own) != own.checksum:
                    raise TraceError("its rows do not match its checksum: it was altered; record or import it again")

    def _kept(self, block: B) -> Iterator[B]:
        yield block


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTrace(Stored[RoutingTrace]):
    """A token trace on disk."""

    segment: str | None = None
    phase: Phase | None = None
    base_ns: int = 0
    """Subtracted from times, so that a selection has its own clock."""

    num_tokens = property(attrgetter("header.num_tokens"))
    domains = property(attrgetter("header.domains"))
    segments = property(attrgetter("header.segments"))

    def read(self) -> RoutingTrace:
        """Return the whole trace, or selection, in memory."""
        return concat(list(self.blocks()))

    def _kept(self, block: RoutingTrace) -> Iterator[RoutingTrace]:
        table, keep_S = block.step_table, self._keep(block.step_table)
        if keep_S.any():
            clocks = {name: times_S for name in CLOCKS if (times_S := getattr(table, name)) is not None}
            moved = {name: np.where(ns == UNKNOWN, UNKNOWN, ns - self.base_ns) for name, ns in clocks.items()}
            yield take_steps(replace(block, step_table=replace(table, **moved)), keep_S)

    def select(self, *, segment: str | None = None, phase: Phase | None = None) -> "StoredTrace":
        """Return the steps of one segment, of one phase, or both, renumbered and with a clock of their own."""
        if segment is not None and segment not in self.segments:
            raise TraceError(f"the trace has no segment {segment!r}; it has {', '.join(self.segments)}")
        if phase is not None and phase not in PHASES:
            raise TraceError(f"phase {phase!r} is unknown; allowed are {', '.join(PHASES)}")
        narrowed = replace(self, segment=segment or self.segment, phase=phase or self.phase)
        num_steps, num_tokens, known = 0, 0, list[int]()
        for tokens_S, table in self._step_tables():
            keep_S = narrowed._keep(table)
            num_steps += int(keep_S.sum())
            num_tokens += int(tokens_S[keep_S].sum())
            times = [ns[keep_S] for name in CLOCKS if (ns := getattr(table, name)) is not None]
            known += [int(ns[ns != UNKNOWN].min()) for ns in times if (ns != UNKNOWN).any()]
        if not num_steps:
            raise TraceError(f"no step has segment {narrowed.segment!r} and phase {narrowed.phase!r}; select less")
        header = replace(self.header, num_steps=num_steps, num_tokens=num_tokens)
        return replace(narrowed, header=header, base_ns=min(known, default=0))

    def _step_tables(self) -> Iterator[tuple[I64, StepTable]]:
        """Yield the tokens of each step and what is known of it, a row group at a time, without reading ids."""
        for path, own in self.files:
            with reading(path), closing(pq.ParquetFile(path)) as file:
                for group in range(file.num_row_groups):
                    yield read_steps(file.read_row_group(group, columns=STEP_NAMES), own)[1:]

    def _keep(self, table: StepTable) -> Bools:
        keep_S = np.ones(table.num_steps, dtype=bool)
        if self.segment is not None:
            keep_S &= table.segment_S == self.segments.index(self.segment)
        if self.phase is not None:
            keep_S &= table.phase_S == PHASES.index(self.phase)
        return keep_S


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLoad(Stored[ExpertLoad]):
    """Counts on disk."""

    def read(self) -> ExpertLoad:
        blocks = list(self.blocks())
        counts_SLE = np.concatenate([block.counts_SLE for block in blocks])
        return replace(blocks[0], counts_SLE=counts_SLE, labels=sum((block.labels for block in blocks), ()))


def read_header(path: Path) -> Header:
    """Return the header of a trace file."""
    if path.is_dir():
        raise TraceError(f"{path} is a folder; give the trace's file")
    with reading(path), closing(pq.ParquetFile(path)) as file:
        return parse_header(file.metadata.metadata)
