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
from .runs import whole

ROWS_PER_GROUP = 512
SCALARS = {
    "step": pa.int64(),
    "plan_id": pa.string(),
    "bucket": pa.int32(),
    **dict.fromkeys(
        ("submit_ns", "start_ns", "end_ns", "reconfigure_ns", "capture_ns", "control_stall_ns"), pa.int64()
    ),
    **dict.fromkeys(("hbm_bytes", "flops"), pa.int64()),
    "fallback": pa.string(),
}
ARRAYS = ("start_ns_LS", "busy_ns_LS")
SCHEMA = pa.schema(
    SCALARS | {"num_slices": pa.int16()} | dict.fromkeys(ARRAYS, pa.list_(pa.int64())),
    metadata={"expertslice.schema": "step-records/1"},
)


@contextlib.contextmanager
def writing(path: Path | None) -> Iterator[Callable[[StepRecord], None]]:
    """Yield what takes records: a file that is complete or absent afterwards, or nothing without a path."""
    if path is None:
        yield lambda record: None
        return
    rows: list[dict[str, Any]] = []
    with whole(path) as part, pq.ParquetWriter(part, SCHEMA, compression="zstd") as file:

        def append(record: StepRecord) -> None:
            rows.append(_row(record))
            if len(rows) == ROWS_PER_GROUP:
                write_rows(file, rows)

        yield append
        write_rows(file, rows)


def write_rows(file: pq.ParquetWriter, rows: list[dict[str, Any]]) -> None:
    """Write rows as one group, and forget them."""
    if rows:
        file.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
        rows.clear()


def _row(record: StepRecord) -> dict[str, Any]:
    scalars = {name: getattr(record, name) for name in SCALARS}
    arrays = {name: getattr(record, name).ravel().tolist() for name in ARRAYS}
    return scalars | {"num_slices": record.busy_ns_LS.shape[1]} | arrays


def read_records(path: Path, first: int = 0, last: int | None = None) -> Iterator[StepRecord]:
    """Yield the records of steps first..last (None: to the end) of a file."""
    for batch in pq.ParquetFile(path).iter_batches(batch_size=ROWS_PER_GROUP):
        for row in batch.to_pylist():
            if row["step"] >= first and (last is None or row["step"] <= last):
                width = row.pop("num_slices")
                arrays = {name: np.array(row.pop(name), dtype=np.int64).reshape(-1, width) for name in ARRAYS}
                yield StepRecord(**row, **arrays)
