"""StepRecords on disk: one Parquet row per step, the same for both backends; not the summaries made of them.

The arrays of a record are stored flat, layer by layer; `num_slices` gives their width back.

Shape letters: L MoE layers, S slices.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..policies.contract import StepRecord

ROWS_PER_GROUP = 512
SCALARS = (
    ("step", pa.int64()),
    ("plan_id", pa.string()),
    ("bucket", pa.int32()),
    ("submit_ns", pa.int64()),
    ("start_ns", pa.int64()),
    ("end_ns", pa.int64()),
    ("reconfigure_ns", pa.int64()),
    ("capture_ns", pa.int64()),
    ("control_stall_ns", pa.int64()),
    ("hbm_bytes", pa.int64()),
    ("flops", pa.int64()),
    ("fallback", pa.string()),
)
ARRAYS = ("start_ns_LS", "busy_ns_LS")
SCHEMA = pa.schema(
    [*SCALARS, ("num_slices", pa.int16()), *((name, pa.list_(pa.int64())) for name in ARRAYS)],
    metadata={"expertslice.schema": "step-records/1"},
)


class RecordWriter:
    """Writes records as they come, a row group at a time; the file gets its name only when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._part = path.with_name(path.name + ".part")
        self._rows: list[dict[str, Any]] = []
        self._file = pq.ParquetWriter(self._part, SCHEMA, compression="zstd")

    def append(self, record: StepRecord) -> None:
        """Add one record."""
        row: dict[str, Any] = {name: getattr(record, name) for name, _ in SCALARS}
        row["num_slices"] = record.busy_ns_LS.shape[1]
        row |= {name: getattr(record, name).ravel().tolist() for name in ARRAYS}
        self._rows.append(row)
        if len(self._rows) >= ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
            self._rows = []

    def close(self) -> None:
        """Complete the file."""
        self._flush()
        self._file.close()
        self._part.rename(self.path)

    def abandon(self) -> None:
        """Drop what was written."""
        self._rows = []
        # The disk may be full, which is why the file is dropped.
        with contextlib.suppress(OSError):
            self._file.close()
        self._part.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path | None) -> Iterator[Callable[[StepRecord], None]]:
    """Yield what takes records: a file that is complete or absent afterwards, or nothing without a path."""
    if path is None:
        yield lambda record: None
        return
    writer = RecordWriter(path)
    try:
        yield writer.append
        writer.close()
    except BaseException:
        writer.abandon()
        raise


def read_records(path: Path, first: int = 0, last: int | None = None) -> Iterator[StepRecord]:
    """Yield the records of steps first..last (None: to the end) of a file."""
    for batch in pq.ParquetFile(path).iter_batches(batch_size=ROWS_PER_GROUP):
        for row in batch.to_pylist():
            if row["step"] >= first and (last is None or row["step"] <= last):
                yield _record(row)


def _record(row: dict[str, Any]) -> StepRecord:
    width = row.pop("num_slices")
    arrays = {name: np.array(row.pop(name), dtype=np.int64).reshape(-1, width) for name in ARRAYS}
    return StepRecord(**row, **arrays)
