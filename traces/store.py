"""A trace on disk: one Parquet file, written whole or not at all, read by row group. Columns are in `columns`.

Shape letters: S steps, L MoE layers, E experts, K top-k.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from .check import TraceError, check_load, check_trace
from .columns import DICTIONARY, ENCODING, ArrowTable, load_table, token_table
from .files import atomic
from .header import KEY, Checksum, Header, load_header, tokens_header
from .stored import StoredLoad, StoredTrace, read_header
from .trace import ExpertLoad, RoutingTrace, id_dtype, slice_steps

__all__ = ["PARTS", "StoredLoad", "StoredTrace", "group_rows", "open_trace", "split", "write_blocks", "write_trace"]

GROUP_BYTES = 8 << 20
"""Bytes of ids, or of counts, in a row group: what a reader holds at a time."""

PARTS = ".parts"
"""Suffix of the folder that holds a recording until it is closed."""


def write_trace(trace: RoutingTrace | ExpertLoad, path: str | Path) -> None:
    """Write a trace to one file; a file that stood there is replaced when the new one is complete.

    Raises:
        TraceError: The trace is not whole, or the system refused to write.
    """
    if isinstance(trace, RoutingTrace):
        check_trace(trace)
        write_blocks(split(trace), path)
        return
    check_load(trace)
    steps = max(1, GROUP_BYTES // trace.counts_SLE[0].nbytes)
    blocks = (_load_slice(trace, first, first + steps) for first in range(0, trace.num_steps, steps))
    _write(blocks, Path(path), load_header(trace), load_table, Checksum.add_load)


def write_blocks(blocks: Iterable[RoutingTrace], path: str | Path) -> Header:
    """Write consecutive pieces of one checked token trace, each as a row group, holding one at a time."""
    pieces = iter(blocks)
    first = next(pieces)

    def all_pieces() -> Iterator[RoutingTrace]:
        yield first
        yield from pieces

    header = tokens_header(first)
    return _write(all_pieces(), Path(path), header, lambda t, s: token_table(t, header, s), Checksum.add_trace)


def _write(
    blocks: Iterator[Any],
    path: Path,
    header: Header,
    table_of: Callable[[Any, int], ArrowTable],
    feed: Callable[[Checksum, Any], None],
) -> Header:
    checksum = Checksum()
    with atomic(path) as temporary:
        writer: pq.ParquetWriter | None = None
        try:
            for block in blocks:
                table = table_of(block, checksum.num_steps)
                writer = writer or _open_writer(temporary, table.schema)
                writer.write_table(table, row_group_size=len(table))
                feed(checksum, block)
                header = _extended(header, block)
            header = replace(header, num_steps=checksum.num_steps, num_tokens=checksum.num_tokens)
            header = replace(header, checksum=checksum.of(header))
            assert writer is not None
            writer.add_key_value_metadata({KEY: header.to_json()})
        finally:
            if writer is not None:
                writer.close()
    return header


def _open_writer(path: Path, schema: Any) -> pq.ParquetWriter:
    names = set(schema.names)
    options: dict[str, Any] = {
        "use_dictionary": [name for name in schema.names if name in DICTIONARY],
        "column_encoding": {name: code for name, code in ENCODING.items() if name.split(".")[0] in names - {"layer"}},
        "write_statistics": ["step"],
    }
    return pq.ParquetWriter(path, schema, compression="zstd", compression_level=9, **options)


def _extended(header: Header, block: RoutingTrace | ExpertLoad) -> Header:
    if isinstance(block, ExpertLoad):
        return header
    return replace(header, domains=block.domains, segments=block.step_table.segments, provenance=block.provenance)


def split(trace: RoutingTrace) -> Iterator[RoutingTrace]:
    """Yield a trace in pieces of whole steps, each about a row group."""
    rows = group_rows(trace)
    ends_S = np.cumsum(np.maximum(np.bincount(trace.step_T, minlength=trace.num_steps), 1))
    first = done = 0
    while first < trace.num_steps:
        last = max(first + 1, int(np.searchsorted(ends_S, done + rows, side="right")))
        yield slice_steps(trace, first, last)
        first, done = last, int(ends_S[last - 1])


def group_rows(trace: RoutingTrace) -> int:
    """Return how many token rows make a row group."""
    token_bytes = trace.num_layers * trace.top_k * np.dtype(id_dtype(trace.num_experts)).itemsize
    return min(65536, max(1024, GROUP_BYTES // token_bytes))


def _load_slice(load: ExpertLoad, first: int, last: int) -> ExpertLoad:
    return replace(load, counts_SLE=load.counts_SLE[first:last], labels=load.labels[first:last])


def open_trace(path: str | Path) -> StoredTrace | StoredLoad:
    """Open a trace without reading its rows; of an unfinished recording, open what was flushed.

    Args:
        path: A trace's file, or the `.parts` folder of a recording that was not closed.

    Raises:
        TraceError: There is no such file, or it is no trace of ours, is truncated, or of a newer schema.
    """
    path = Path(path)
    parts = path if path.suffix == PARTS else path.with_name(path.name + PARTS)
    if path.suffix == PARTS or (parts.is_dir() and not path.exists()):
        return _open_parts(parts)
    header = read_header(path)
    if header.kind == "load":
        return StoredLoad(files=((path, header),), header=header)
    return StoredTrace(files=((path, header),), header=header)


def _open_parts(folder: Path) -> StoredTrace:
    files = [(path, read_header(path)) for path in sorted(folder.glob("*.parquet"))]
    if not files:
        raise TraceError(f"{folder} holds no flushed part of a recording; record again")
    header = files[-1][1]
    shapes = {(own.kind, own.num_layers, own.num_experts, own.top_k, own.has_gates) for _, own in files}
    if shapes != {("tokens", *next(iter(shapes))[1:])}:
        raise TraceError(f"the parts in {folder} are of different models; remove those of another recording")
    notes = "; ".join(note for note in (header.provenance.notes, "partial: the recording was not closed") if note)
    header = replace(
        header,
        num_steps=sum(own.num_steps for _, own in files),
        num_tokens=sum(own.num_tokens for _, own in files),
        provenance=replace(header.provenance, notes=notes),
    )
    return StoredTrace(files=tuple(files), header=header)
