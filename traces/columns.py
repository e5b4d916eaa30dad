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
from .trace import UNKNOWN, ExpertLoad, RoutingTrace, StepTable, id_dtype, step_column

DICTIONARY = ["domain", "phase", "step_phase", "segment", "label", "layer"]
NUMBERS = ("step", "request_id", "position", "arrival_ns", "start_ns", "moe_ns.list.element", "other_ns.list.element")
ENCODING = dict.fromkeys(NUMBERS, "DELTA_BINARY_PACKED")
STEP_NAMES = ["step", "request_id", "step_phase", "segment", "arrival_ns", "start_ns", "moe_ns", "other_ns"]

# pyarrow ships no types; these names at least tell a table from a column.
ArrowTable = Any
ArrowColumn = Any


def token_table(trace: RoutingTrace, header: Header, first_step: int) -> ArrowTable:
    """Return the rows of a trace whose steps are numbered from `first_step` in the file."""
    tokens_S = np.bincount(trace.step_T, minlength=trace.num_steps)
    rows_S = np.maximum(tokens_S, 1)
    is_token_R = np.repeat(tokens_S > 0, rows_S)
    first_R = np.zeros(len(is_token_R), dtype=bool)
    first_R[np.cumsum(rows_S) - rows_S] = True
    columns = {"step": pa.array(np.repeat(np.arange(first_step, first_step + trace.num_steps), rows_S))}
    columns |= _token_columns(trace, header, is_token_R)
    columns |= _step_columns(trace, first_R)
    return pa.table(columns)


def _token_columns(trace: RoutingTrace, header: Header, is_token_R: NDArray[np.bool_]) -> dict[str, ArrowColumn]:
    def rows(values: NDArray[np.generic], dtype: str) -> NDArray[Any]:
        spread_R = np.zeros((len(is_token_R), *values.shape[1:]), dtype=dtype)
        spread_R[is_token_R] = values
        return spread_R

    domain_R = rows(trace.domain_T, "<i2")
    columns: dict[str, ArrowColumn] = {
        "request_id": pa.array(rows(trace.request_id_T, "<i8"), mask=~is_token_R),
        "position": pa.array(rows(trace.position_T, "<i4")),
        "phase": pa.array(rows(trace.phase_T, "u1")),
        "domain": pa.DictionaryArray.from_arrays(
            pa.array(domain_R, mask=~is_token_R | (domain_R == UNKNOWN)), pa.array(header.domains, pa.string())
        ),
    }
    ids_RLK = rows(trace.expert_ids_TLK, _id_code(trace.num_experts))
    columns |= {f"experts_{layer}": _binary(ids_RLK[:, layer]) for layer in range(trace.num_layers)}
    if trace.gates_TLK is not None:
        gates_RLK = rows(trace.gates_TLK, "<f2")
        columns |= {f"gates_{layer}": _binary(gates_RLK[:, layer]) for layer in range(trace.num_layers)}
    return columns


def _step_columns(trace: RoutingTrace, first_R: NDArray[np.bool_]) -> dict[str, ArrowColumn]:
    table = trace.step_table
    columns: dict[str, ArrowColumn] = {}
    for name, field in (("step_phase", "phase_S"), ("segment", "segment_S")):
        columns[name] = _on_first(getattr(table, field), first_R, "u1")
    for name in ("arrival_ns", "start_ns"):
        columns[name] = _on_first(step_column(table, f"{name}_S", trace.num_layers), first_R, "<i8")
    offsets_R = np.concatenate([[0], np.cumsum(first_R)]).astype(np.int32) * np.int32(trace.num_layers)
    for name in ("moe_ns", "other_ns"):
        flat = step_column(table, f"{name}_SL", trace.num_layers).ravel()
        # A column that nobody recorded is empty everywhere: no null to store for each layer of each step.
        recorded = getattr(table, f"{name}_SL") is not None
        values = pa.array(flat[: len(flat) * recorded], pa.int64(), mask=flat[: len(flat) * recorded] == UNKNOWN)
        columns[name] = pa.ListArray.from_arrays(pa.array(offsets_R * np.int32(recorded)), values)
    return columns


def _on_first(values_S: NDArray[np.integer], first_R: NDArray[np.bool_], dtype: str) -> ArrowColumn:
    values_R = np.zeros(len(first_R), dtype=dtype)
    known_R = first_R.copy()
    values_R[first_R] = values_S
    known_R[first_R] = values_S != UNKNOWN
    return pa.array(values_R, mask=~known_R)


def _binary(values_RK: NDArray[np.generic]) -> ArrowColumn:
    width = values_RK.shape[1] * values_RK.itemsize
    buffer = pa.py_buffer(np.ascontiguousarray(values_RK).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(values_RK), [None, buffer])


def _id_code(num_experts: int) -> str:
    return np.dtype(id_dtype(num_experts)).newbyteorder("<").str


def read_steps(table: ArrowTable, header: Header) -> tuple[int, NDArray[np.int64], StepTable]:
    """Return the number of the table's first step, the tokens of each step, and what the columns given say of each."""
    step_R = cast("NDArray[np.int64]", _numpy(table, "step"))
    is_token_R = _numpy_valid(table, "request_id")
    first_R = np.diff(step_R, prepend=step_R[:1] - 1) != 0
    step_S = step_R[first_R]
    if not np.array_equal(step_S, step_S[0] + np.arange(len(step_S))):
        raise TraceError("its rows skip a step or are not sorted by step; record or import it again")
    tokens_S = np.add.reduceat(is_token_R.astype(np.int64), np.flatnonzero(first_R))
    firsts = table.select([name for name in STEP_NAMES if name in table.column_names]).filter(pa.array(first_R))
    shape = (len(step_S), header.num_layers)
    lists = {f"{name}_SL": _lists(firsts, name, shape) for name in ("moe_ns", "other_ns")}
    steps = StepTable(
        phase_S=_numpy(firsts, "step_phase").astype(np.uint8),
        segment_S=_numpy(firsts, "segment").astype(np.uint8),
        segments=header.segments,
        arrival_ns_S=_numpy(firsts, "arrival_ns"),
        start_ns_S=_numpy(firsts, "start_ns"),
        **lists,
    )
    return int(step_S[0]), tokens_S, steps


def read_tokens(table: ArrowTable, header: Header) -> tuple[int, RoutingTrace]:
    """Return the number of the table's first step, and its rows as a trace whose steps start at 0."""
    first_step, tokens_S, steps = read_steps(table, header)
    is_token_R = _numpy_valid(table, "request_id")

    def tokens(values: NDArray[Any]) -> NDArray[Any]:
        return values if len(tokens_S) == 0 or is_token_R.all() else values[is_token_R]

    gates = _layers(table, "gates", "<f2", header) if header.has_gates else None
    trace = RoutingTrace(
        num_experts=header.num_experts,
        provenance=header.provenance,
        step_T=np.repeat(np.arange(len(tokens_S)), tokens_S),
        request_id_T=tokens(_numpy(table, "request_id")),
        position_T=tokens(_numpy(table, "position").astype(NARROW["position_T"])),
        phase_T=tokens(_numpy(table, "phase").astype(np.uint8)),
        domain_T=tokens(_domains(table, header)),
        domains=header.domains,
        expert_ids_TLK=tokens(_layers(table, "experts", _id_code(header.num_experts), header)),
        gates_TLK=None if gates is None else tokens(gates),
        step_table=steps,
    )
    return first_step, trace


def _numpy(table: ArrowTable, name: str) -> NDArray[Any]:
    """Return an integer column, UNKNOWN where it is null."""
    column = table.column(name)
    if not pa.types.is_integer(column.type) or (column.null_count and column.type == pa.uint8()):
        raise TraceError(f"column {name} has gaps or is no integer; record or import the trace again")
    return column.fill_null(UNKNOWN).to_numpy() if column.null_count else column.to_numpy()


def _numpy_valid(table: ArrowTable, name: str) -> NDArray[np.bool_]:
    return table.column(name).is_valid().to_numpy()


def _lists(table: ArrowTable, name: str, shape: tuple[int, int]) -> NDArray[np.int64] | None:
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


def _domains(table: ArrowTable, header: Header) -> NDArray[np.int16]:
    column = table.column("domain").combine_chunks()
    names = cast("list[str]", column.dictionary.to_pylist())
    place = np.array([*(header.domains.index(name) for name in names), UNKNOWN], dtype=np.int16)
    return place[column.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)]


def load_table(load: ExpertLoad, first_step: int) -> ArrowTable:
    """Return the rows of counts, one for each step and layer."""
    steps, layers, experts = load.counts_SLE.shape
    offsets = np.arange(steps * layers + 1, dtype=np.int32) * np.int32(experts)
    labels = np.repeat(np.array(load.labels, dtype=object), layers) if load.labels else [None] * (steps * layers)
    return pa.table(
        {
            "step": pa.array(np.repeat(np.arange(first_step, first_step + steps), layers)),
            "layer": pa.array(np.tile(np.arange(layers, dtype=np.int32), steps)),
            "label": pa.array(labels, pa.string()),
            "counts": pa.ListArray.from_arrays(
                pa.array(offsets), pa.array(load.counts_SLE.astype(np.int64, copy=False).ravel())
            ),
        }
    )


def read_load(table: ArrowTable, header: Header) -> tuple[int, ExpertLoad]:
    """Return the number of the table's first step, and its rows as counts."""
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
