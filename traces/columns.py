"""The Parquet columns of a trace, both ways. Not the file: see `store`.

A row is a token, sorted by step, or stands for a step without tokens: then `request_id` is null. What is known of a
step stands on its first row and is null (empty for lists) on the others, so that steps stream with their tokens and
no table of steps must fit in memory. The ids of a layer are one fixed-size binary of top-k little-endian numbers:
general-purpose compression then finds repeats of whole choices and falls below the entropy of single ids, where one
integer column per id, or a list column, stays well above it and reads ten times slower.

Shape letters: T tokens, R rows, S steps, L MoE layers, E experts, K top-k.
"""

from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .check import TraceError
from .header import NARROW, Header
from .schema import I16, I64, Bools, Ints
from .trace import UNKNOWN, ExpertLoad, RoutingTrace, StepTable, id_dtype, step_column

DICTIONARY = ["domain", "phase", "step_phase", "segment", "label", "layer"]
NUMBERS = ("step", "request_id", "position", "arrival_ns", "start_ns", "moe_ns.list.element", "other_ns.list.element")
ENCODING = dict.fromkeys(NUMBERS, "DELTA_BINARY_PACKED")
STEP_FIELDS = {"step_phase": "phase_S", "segment": "segment_S", "arrival_ns": "arrival_ns_S", "start_ns": "start_ns_S"}
STEP_NAMES = ["step", "request_id", *STEP_FIELDS]
"""What to read for `read_steps`, where times by layer are not wanted."""

# pyarrow ships no types; these names at least tell a table from a column.
ArrowTable = Any
ArrowColumn = Any


def to_table(block: RoutingTrace | ExpertLoad, first_step: int) -> ArrowTable:
    """Return the rows of a block whose steps are numbered from `first_step` in the file."""
    return _load_table(block, first_step) if isinstance(block, ExpertLoad) else _token_table(block, first_step)


def _token_table(trace: RoutingTrace, first_step: int) -> ArrowTable:
    tokens_S = np.bincount(trace.step_T, minlength=trace.num_steps)
    rows_S = np.maximum(tokens_S, 1)
    token_R = np.repeat(tokens_S > 0, rows_S)
    columns: dict[str, ArrowColumn] = {
        "step": pa.array(np.repeat(np.arange(first_step, first_step + trace.num_steps), rows_S)),
        "request_id": pa.array(_spread(trace.request_id_T, token_R, "<i8"), mask=~token_R),
        "position": pa.array(_spread(trace.position_T, token_R, "<i4")),
        "phase": pa.array(_spread(trace.phase_T, token_R, "u1")),
        "domain": pa.DictionaryArray.from_arrays(
            _nullable(trace.domain_T, token_R, "<i2"), pa.array(trace.domains, pa.string())
        ),
    }
    layered = {"experts": (trace.expert_ids_TLK, _id_code(trace.num_experts)), "gates": (trace.gates_TLK, "<f2")}
    for name, (values_TLK, dtype) in layered.items():
        if values_TLK is not None:
            values_RLK = _spread(values_TLK, token_R, dtype)
            columns |= {f"{name}_{layer}": _binary(values_RLK[:, layer]) for layer in range(trace.num_layers)}
    first_R = np.zeros(len(token_R), dtype=bool)
    first_R[np.cumsum(rows_S) - rows_S] = True
    return pa.table(columns | _step_columns(trace.step_table, trace.num_layers, first_R))


def _step_columns(table: StepTable, num_layers: int, first_R: Bools) -> dict[str, ArrowColumn]:
    columns: dict[str, ArrowColumn] = {
        name: _nullable(step_column(table, field, num_layers), first_R, NARROW.get(field, "<i8"))
        for name, field in STEP_FIELDS.items()
    }
    offsets_R = np.concatenate([[0], np.cumsum(first_R)]).astype(np.int32) * np.int32(num_layers)
    for name in ("moe_ns", "other_ns"):
        # A column that nobody recorded is empty everywhere: no null to store for each layer of each step.
        recorded: I64 | None = getattr(table, f"{name}_SL")
        flat = np.empty(0, np.int64) if recorded is None else recorded.ravel()
        values = pa.array(flat, pa.int64(), mask=flat == UNKNOWN)
        columns[name] = pa.ListArray.from_arrays(pa.array(offsets_R * np.int32(recorded is not None)), values)
    return columns


def _spread(values: NDArray[np.generic], on_R: Bools, dtype: str) -> NDArray[Any]:
    """Return values on the rows where `on_R` is true, zeros elsewhere."""
    spread_R = np.zeros((len(on_R), *values.shape[1:]), dtype=dtype)
    spread_R[on_R] = values
    return spread_R


def _nullable(values: Ints, on_R: Bools, dtype: str) -> ArrowColumn:
    spread_R = _spread(values, on_R, dtype)
    return pa.array(spread_R, mask=~on_R | (spread_R == UNKNOWN))


def _binary(values_RK: NDArray[np.generic]) -> ArrowColumn:
    width = values_RK.shape[1] * values_RK.itemsize
    buffer = pa.py_buffer(np.ascontiguousarray(values_RK).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(values_RK), [None, buffer])


def _id_code(num_experts: int) -> str:
    return np.dtype(id_dtype(num_experts)).newbyteorder("<").str


def read_steps(table: ArrowTable, header: Header) -> tuple[int, I64, StepTable]:
    """Return the number of the table's first step, the tokens of each step, and what the columns given say of each."""
    step_R = cast("I64", _numpy(table, "step"))
    token_R = table.column("request_id").is_valid().to_numpy()
    first_R = np.diff(step_R, prepend=step_R[:1] - 1) != 0
    step_S = step_R[first_R]
    if not np.array_equal(step_S, step_S[0] + np.arange(len(step_S))):
        raise TraceError("its rows skip a step or are not sorted by step; record or import it again")
    tokens_S = np.add.reduceat(token_R.astype(np.int64), np.flatnonzero(first_R))
    firsts = table.select([name for name in (*STEP_FIELDS, "moe_ns", "other_ns") if name in table.column_names]).filter(
        pa.array(first_R)
    )
    columns: dict[str, Any] = {
        field: _numpy(firsts, name).astype(NARROW.get(field, "<i8"), copy=False) for name, field in STEP_FIELDS.items()
    }
    shape = (len(step_S), header.num_layers)
    columns |= {f"{name}_SL": _lists(firsts, name, shape) for name in ("moe_ns", "other_ns")}
    return int(step_S[0]), tokens_S, StepTable(segments=header.segments, **columns)


def read_block(table: ArrowTable, header: Header) -> tuple[int, RoutingTrace | ExpertLoad]:
    """Return the number of the table's first step, and its rows as a block whose steps start at 0."""
    return _read_load(table, header) if header.kind == "load" else _read_tokens(table, header)


def _read_tokens(table: ArrowTable, header: Header) -> tuple[int, RoutingTrace]:
    first_step, tokens_S, steps = read_steps(table, header)
    columns: dict[str, NDArray[Any]] = {
        "request_id_T": _numpy(table, "request_id"),
        "position_T": _numpy(table, "position").astype(NARROW["position_T"], copy=False),
        "phase_T": _numpy(table, "phase").astype(NARROW["phase_T"], copy=False),
        "domain_T": _domains(table, header),
        "expert_ids_TLK": _layers(table, "experts", _id_code(header.num_experts), header),
    }
    if header.has_gates:
        columns["gates_TLK"] = _layers(table, "gates", "<f2", header)
    if not tokens_S.all():
        token_R = table.column("request_id").is_valid().to_numpy()
        columns = {name: values[token_R] for name, values in columns.items()}
    trace = RoutingTrace(
        num_experts=header.num_experts,
        provenance=header.provenance,
        domains=header.domains,
        step_T=np.repeat(np.arange(len(tokens_S)), tokens_S),
        step_table=steps,
        **columns,
    )
    return first_step, trace


def _numpy(table: ArrowTable, name: str) -> NDArray[Any]:
    """Return an integer column, UNKNOWN where it is null."""
    column = table.column(name)
    if not pa.types.is_integer(column.type) or (column.null_count and column.type == pa.uint8()):
        raise TraceError(f"column {name} has gaps or is no integer; record or import the trace again")
    return column.fill_null(UNKNOWN).to_numpy() if column.null_count else column.to_numpy()


def _lists(table: ArrowTable, name: str, shape: tuple[int, int]) -> I64 | None:
    if name not in table.column_names:
        return None
    values = table.column(name).combine_chunks().flatten()
    return values.fill_null(UNKNOWN).to_numpy().reshape(shape) if len(values) else None


def _layers(table: ArrowTable, name: str, dtype: str, header: Header) -> NDArray[Any]:
    """Return the [R, L, K] values of one fixed-size binary column per layer."""
    width = header.top_k * np.dtype(dtype).itemsize
    values_RLK = np.empty((len(table), header.num_layers, header.top_k), dtype=dtype)
    for layer in range(header.num_layers):
        column = table.column(f"{name}_{layer}").combine_chunks()
        if column.type != pa.binary(width):
            raise TraceError(f"layer {layer} is stored as {column.type}, not top-{header.top_k}; record it again")
        raw = np.frombuffer(column.buffers()[1], dtype, len(column) * header.top_k, column.offset * width)
        values_RLK[:, layer] = raw.reshape(len(column), header.top_k)
    return values_RLK


def _domains(table: ArrowTable, header: Header) -> I16:
    column = table.column("domain").combine_chunks()
    names = cast("list[str]", column.dictionary.to_pylist())
    place = np.array([*(header.domains.index(name) for name in names), UNKNOWN], dtype=np.int16)
    return place[column.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)]


def _load_table(load: ExpertLoad, first_step: int) -> ArrowTable:
    """Return one row for each step and layer."""
    steps, layers, experts = load.counts_SLE.shape
    offsets = np.arange(steps * layers + 1, dtype=np.int32) * np.int32(experts)
    labels = np.repeat(np.array(load.labels, dtype=object), layers) if load.labels else [None] * (steps * layers)
    columns = {
        "step": np.repeat(np.arange(first_step, first_step + steps), layers),
        "layer": np.tile(np.arange(layers, dtype=np.int32), steps),
        "label": pa.array(labels, pa.string()),
        "counts": pa.ListArray.from_arrays(pa.array(offsets), pa.array(load.counts_SLE.ravel(), pa.int64())),
    }
    return pa.table(columns)


def _read_load(table: ArrowTable, header: Header) -> tuple[int, ExpertLoad]:
    labels = cast("list[str | None]", table.column("label").to_pylist())[:: header.num_layers]
    counts = table.column("counts").combine_chunks().flatten().to_numpy()
    load = ExpertLoad(
        top_k=header.top_k,
        provenance=header.provenance,
        phase=header.phase,
        labels=tuple(label for label in labels if label is not None),
        counts_SLE=counts.reshape(-1, header.num_layers, header.num_experts),
    )
    return int(table.column("step")[0].as_py()), load
