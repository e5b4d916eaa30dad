"""What a trace must satisfy, and the one exception for files and traces that do not. Opens no file.

Shape letters: T tokens, S steps, L MoE layers, E experts, K top-k.
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .schema import F16, PHASES, Ints
from .trace import STEP_COLUMNS, UNKNOWN, ExpertLoad, RoutingTrace

MAX_COUNT = np.iinfo(np.int32).max


class TraceError(ValueError):
    """A trace or a file of routing records cannot be used; the message is one sentence for its owner."""


@contextmanager
def reading(path: Path) -> Generator[None]:
    """Turn whatever a malformed file provokes into a `TraceError` that names the file."""
    try:
        yield
    except TraceError as error:
        if str(path) in str(error):
            raise
        raise TraceError(f"{path} cannot be used: {error}") from error
    except FileNotFoundError as error:
        raise TraceError(f"{path} does not exist; check the path") from error
    except KeyError as error:
        raise TraceError(f"{path} lacks {first_line(error)}; check that it is whole, or save it again") from error
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror or first_line(error)}") from error
    except Exception as error:
        raise TraceError(f"{path} is damaged or of another kind: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_block(block: RoutingTrace | ExpertLoad) -> None:
    """Raise `TraceError` unless the trace or load is sound."""
    if isinstance(block, ExpertLoad):
        check_load(block)
    else:
        check_trace(block)


def check_trace(trace: RoutingTrace) -> None:
    """Raise `TraceError` unless the trace is whole: shapes agree, steps are sorted, ids and gates are sound."""
    ids_TLK = trace.expert_ids_TLK
    if ids_TLK.ndim != 3 or 0 in ids_TLK.shape[1:]:
        raise TraceError(f"expert ids of shape {ids_TLK.shape} are no [tokens, layers, top-k]; give all three")
    if trace.top_k > trace.num_experts:
        raise TraceError(f"top-{trace.top_k} routing cannot come from {trace.num_experts} experts; check num_experts")
    table, tokens, steps = trace.step_table, len(ids_TLK), trace.num_steps
    if not steps:
        raise TraceError("the trace has no steps; record at least one")
    by_token = {"step_T": (0, steps), "request_id_T": (None, None), "phase_T": (0, 2), "position_T": (0, 1 << 31)}
    by_token["domain_T"] = (UNKNOWN, len(trace.domains))
    for name, limits in by_token.items():
        _check_column(name, getattr(trace, name), (tokens,), *limits)
    by_step = {"phase_S": (0, len(PHASES)), "segment_S": (0, len(table.segments))}
    for name in STEP_COLUMNS:
        shape = (steps, trace.num_layers) if name.endswith("_SL") else (steps,)
        _check_column(name, getattr(table, name), shape, *by_step.get(name, (UNKNOWN, None)))
    if len(set(trace.domains)) < len(trace.domains):
        raise TraceError(f"domains {trace.domains} name one twice; give each name once")
    if np.any(np.diff(trace.step_T) < 0):
        raise TraceError("token rows are not sorted by step; sort them")
    _check_column("expert ids", ids_TLK, ids_TLK.shape, 0, trace.num_experts)
    _check_distinct(ids_TLK)
    _check_gates(trace.gates_TLK, ids_TLK.shape)


def _check_gates(gates_TLK: F16 | None, shape: tuple[int, ...]) -> None:
    _check_column("gates", gates_TLK, shape, None, None)
    if gates_TLK is not None and not np.isfinite(gates_TLK).all():
        token, layer, _ = np.argwhere(~np.isfinite(gates_TLK))[0]
        raise TraceError(f"the gates of token {token} in layer {layer} are not finite; record them again or drop gates")


def check_load(load: ExpertLoad) -> None:
    """Raise `TraceError` unless counts are [S, L, E], at least one step, non-negative and within 31 bits."""
    counts_SLE = load.counts_SLE
    if counts_SLE.ndim != 3 or 0 in counts_SLE.shape:
        raise TraceError(f"counts of shape {counts_SLE.shape} are no [steps, layers, experts]; give all three")
    if not 1 <= load.top_k <= load.num_experts:
        raise TraceError(f"top_k is {load.top_k} with {load.num_experts} experts; allowed are 1 to {load.num_experts}")
    if counts_SLE.min() < 0 or counts_SLE.max() > MAX_COUNT:
        raise TraceError(f"counts span {counts_SLE.min()} to {counts_SLE.max()}; allowed are 0 to {MAX_COUNT}")
    if load.labels and len(load.labels) != load.num_steps:
        raise TraceError(f"{len(load.labels)} labels for {load.num_steps} steps; give one for each step or none")
    if load.phase not in PHASES:
        raise TraceError(f"phase {load.phase!r} is unknown; allowed are {', '.join(PHASES)}")


def _check_column(
    name: str, values: Ints | F16 | None, shape: tuple[int, ...], low: int | None, high: int | None
) -> None:
    """Refuse another shape, and values outside low..high-1 (None: no such end); a missing column is sound."""
    if values is None:
        return
    if values.shape != shape:
        raise TraceError(f"{name} has shape {values.shape}; the trace needs {shape}")
    if values.size and ((low is not None and values.min() < low) or (high is not None and values.max() >= high)):
        allowed = f"at least {low}" if high is None else f"{low} to {high - 1}"
        raise TraceError(f"{name} spans {values.min()} to {values.max()}; allowed is {allowed}")


def _check_distinct(expert_ids_TLK: Ints) -> None:
    sorted_TLK = np.sort(expert_ids_TLK, axis=2)
    twice_TL = (sorted_TLK[:, :, 1:] == sorted_TLK[:, :, :-1]).any(axis=2)
    if twice_TL.any():
        token, layer = np.argwhere(twice_TL)[0]
        ids = expert_ids_TLK[token, layer].tolist()
        raise TraceError(
            f"token {token} names an expert twice in layer {layer} ({ids}); a token's experts are distinct"
        )
