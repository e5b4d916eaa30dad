"""A trace on disk: one Parquet file, written whole or not at all, read by row group. Columns are in `columns`."""

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from .check import TraceError, check_block, first_line
from .columns import DICTIONARY, ENCODING, to_table
from .header import KEY, Checksum, header_of
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
    check_block(trace)
    write_blocks(split(trace), path)


def write_blocks(blocks: Iterable[RoutingTrace | ExpertLoad], path: str | Path) -> None:
    """Write consecutive pieces of one checked trace, each as a row group, holding one at a time."""
    checksum, writer, header = Checksum(), None, None
    with atomic(Path(path)) as temporary, ExitStack() as stack:
        for block in blocks:
            table = to_table(block, checksum.num_steps)
            writer = writer or stack.enter_context(_open_writer(temporary, table.schema))
            writer.write_table(table, row_group_size=len(table))
            checksum.add(block)
            header = header_of(block)
        assert writer is not None
        assert header is not None
        header = replace(header, num_steps=checksum.num_steps, num_tokens=checksum.num_tokens)
        header = replace(header, checksum=checksum.of(header))
        writer.add_key_value_metadata({KEY: header.to_json()})


@contextmanager
def atomic(path: Path) -> Generator[Path]:
    """Yield a temporary path in the same folder; on success it is synced and renamed to `path`, else removed.

    Raises:
        TraceError: The system refused to write: a full disk, a missing or unwritable folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        why = error.strerror or first_line(error)
        raise TraceError(f"cannot write {path}: {why}; free space there or choose another folder") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the device."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_writer(path: Path, schema: Any) -> pq.ParquetWriter:
    options: dict[str, Any] = {
        "use_dictionary": [name for name in schema.names if name in DICTIONARY],
        "column_encoding": {name: code for name, code in ENCODING.items() if name.split(".")[0] in schema.names},
        "write_statistics": ["step"],
    }
    return pq.ParquetWriter(path, schema, compression="zstd", compression_level=9, **options)


def split(trace: RoutingTrace | ExpertLoad) -> Iterator[RoutingTrace | ExpertLoad]:
    """Yield a trace in pieces of whole steps, each about a row group."""
    first = done = 0
    if isinstance(trace, ExpertLoad):
        for first in range(0, trace.num_steps, steps := max(1, GROUP_BYTES // trace.counts_SLE[0].nbytes)):
            part = slice(first, first + steps)
            yield replace(trace, counts_SLE=trace.counts_SLE[part], labels=trace.labels[part])
        return
    rows = group_rows(trace)
    ends_S = np.cumsum(np.maximum(np.bincount(trace.step_T, minlength=trace.num_steps), 1))
    while first < trace.num_steps:
        last = max(first + 1, int(np.searchsorted(ends_S, done + rows, side="right")))
        yield slice_steps(trace, first, last)
        first, done = last, int(ends_S[last - 1])


def group_rows(trace: RoutingTrace) -> int:
    """Return how many token rows make a row group."""
    token_bytes = trace.num_layers * trace.top_k * np.dtype(id_dtype(trace.num_experts)).itemsize
    return min(65536, max(1024, GROUP_BYTES // token_bytes))


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
    kind = StoredLoad if header.kind == "load" else StoredTrace
    return kind(files=((path, header),), header=header)


def _open_parts(folder: Path) -> StoredTrace:
    files = tuple((path, read_header(path)) for path in sorted(folder.glob("*.parquet")))
    if not files:
        raise TraceError(f"{folder} holds no flushed part of a recording; record again")
    headers = [header for _, header in files]
    if len({(own.num_layers, own.num_experts, own.top_k, own.has_gates) for own in headers}) > 1 or any(
        own.kind != "tokens" for own in headers
    ):
        raise TraceError(f"the parts in {folder} are of different models; remove those of another recording")
    last = headers[-1].provenance
    notes = "; ".join(note for note in (last.notes, "partial: the recording was not closed") if note)
    header = replace(
        headers[-1],
        num_steps=sum(own.num_steps for own in headers),
        num_tokens=sum(own.num_tokens for own in headers),
        provenance=replace(last, notes=notes),
    )
    return StoredTrace(files=files, header=header)
