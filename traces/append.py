"""Recording a trace so that a crash costs what was not flushed, and nothing else.

Steps gather in memory; a flush writes them as a complete Parquet part beside the trace's path; closing streams the
parts into the trace and removes them. POSIX alone: the lock is the kernel's, so that it dies with its process.
"""

import fcntl
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from .check import TraceError, check_trace
from .store import PARTS, StoredTrace, group_rows, open_trace, write_blocks
from .trace import RoutingTrace, concat

LOOSE_PIECES = 256
"""Steps kept as they came before they are joined: many small arrays cost more than their contents."""


class TraceAppender:
    """Records steps to `path`; use as a context manager, which closes the trace even when the run breaks off."""

    def __init__(self, path: str | Path) -> None:
        """Take the path for this recorder.

        Raises:
            TraceError: Something stands at the path, an unfinished recording is there, or another recorder is at work.
        """
        # Its first array makes pyarrow look for pandas for half a second: not while a model runs.
        pa.array(np.zeros(1))
        self.path = Path(path)
        self.num_steps = 0
        self._folder = self.path.with_name(self.path.name + PARTS)
        self._pending: list[RoutingTrace] = []
        self._last: RoutingTrace | None = None
        self._parts = 0
        if self.path.exists():
            raise TraceError(f"{self.path} exists already; record to another path or remove it")
        self._lock = _locked(self._folder)
        if any(self._folder.glob("*.parquet")):
            self._lock.close()
            raise TraceError(f"{self._folder} holds an unfinished recording; recover it, or remove the folder")

    def append(self, steps: RoutingTrace) -> None:
        """Add one or more steps, as a small trace; they are renumbered after those before.

        Raises:
            TraceError: The steps are not sound, or not of the model recorded so far.
        """
        check_trace(steps)
        self._check_same_model(steps)
        self._pending.append(steps)
        self._last = steps
        self.num_steps += steps.num_steps
        if len(self._pending) > LOOSE_PIECES:
            self._pending = [concat(self._pending)]
        if _rows(self._pending) >= group_rows(steps):
            self.flush()

    def _check_same_model(self, steps: RoutingTrace) -> None:
        last = self._last
        if last is None:
            return
        for name in ("num_layers", "num_experts", "top_k"):
            now, before = getattr(steps, name), getattr(last, name)
            if now != before:
                raise TraceError(f"steps with {name} {now} follow {before}; use one model")
        if (steps.gates_TLK is None) != (last.gates_TLK is None):
            raise TraceError("some steps have gates and some have none; give gates with every step or never")
        names = ((last.domains, steps.domains), (last.step_table.segments, steps.step_table.segments))
        if any(after[: len(before)] != before for before, after in names):
            raise TraceError("domains or segments lost a name since the last step; only add names, at the end")

    def flush(self) -> None:
        """Make everything appended so far readable after a crash."""
        if self._pending:
            write_blocks([concat(self._pending)], self._folder / f"{self._parts:06d}.parquet")
            self._parts += 1
            self._pending = []

    def close(self, *, notes: str | None = None) -> None:
        """Write the trace, with what there is to say about it, and remove the parts; without steps nothing is left."""
        if self._lock.closed:
            return
        self.flush()
        if self._parts:
            _merge(self._folder, self.path, notes=notes)
        shutil.rmtree(self._folder)
        self._lock.close()

    def __enter__(self) -> "TraceAppender":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(notes=f"partial: the run broke off ({kind.__name__})" if kind else None)


def recover(path: str | Path) -> None:
    """Make a trace of what a broken recording to `path` had flushed, and remove its parts.

    Raises:
        TraceError: Nothing was flushed, or a recorder is still at work.
    """
    path = Path(path)
    folder = path.with_name(path.name + PARTS)
    if not folder.is_dir():
        raise TraceError(f"{folder} does not exist; there is nothing to recover")
    with _locked(folder):
        _merge(folder, path, notes="recovered: the recording broke off")
        shutil.rmtree(folder)


def _locked(folder: Path) -> IO[bytes]:
    """Return the open lock file of a recording's folder, which is made where it is missing."""
    try:
        folder.mkdir(exist_ok=True)
        lock = (folder / "lock").open("wb")
    except OSError as error:
        raise TraceError(f"cannot record in {folder.parent}: {error.strerror}; choose another folder") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise TraceError(f"another recorder is at work in {folder}; record to another path") from error
    return lock


def _merge(folder: Path, path: Path, *, notes: str | None) -> None:
    """Stream the parts into one trace, small pieces joined until each makes a row group."""
    parts = open_trace(folder)
    assert isinstance(parts, StoredTrace)
    kept = parts.files[-1][1].provenance
    provenance = replace(kept, notes="; ".join(note for note in (kept.notes, notes) if note))

    def groups() -> Iterator[RoutingTrace]:
        pending: list[RoutingTrace] = []
        for block in parts.blocks():
            pending.append(replace(block, provenance=provenance))
            if _rows(pending) >= group_rows(block):
                yield concat(pending)
                pending = []
        if pending:
            yield concat(pending)

    write_blocks(groups(), path)


def _rows(traces: Iterable[RoutingTrace]) -> int:
    return sum(max(trace.num_tokens, trace.num_steps) for trace in traces)
