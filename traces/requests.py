"""Requests inside a trace: which rows are whose, in reading order; picking some of them.

Shape letters: T tokens, S steps, R requests, L MoE layers, K top-k.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .schema import I64, PHASES, U8
from .trace import RoutingTrace, pick_rows, take_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """Rows of a trace ordered by request, then position; request r owns `order_T[offsets_R[r] : offsets_R[r + 1]]`."""

    order_T: I64
    offsets_R: I64
    """One entry more than there are requests."""

    @property
    def num_requests(self) -> int:
        return len(self.offsets_R) - 1

    @property
    def lengths(self) -> I64:
        return np.diff(self.offsets_R)

    @property
    def request_of(self) -> I64:
        return np.repeat(np.arange(self.num_requests), self.lengths)

    def rows(self) -> Iterator[I64]:
        """Yield the trace rows of each request, in reading order."""
        for start, stop in zip(self.offsets_R[:-1], self.offsets_R[1:], strict=True):
            yield self.order_T[start:stop]


def group_requests(trace: RoutingTrace) -> Grouping:
    """Group a trace by request; one id in two segments (two checkpoints of one model) makes two requests."""
    if not trace.num_tokens:
        raise ValueError("the trace has no tokens; record or import at least one request first")
    segment_T = trace.step_table.segment_S[trace.step_T]
    order_T = np.lexsort((trace.position_T, trace.request_id_T, segment_T))
    ids_T, segments_T = trace.request_id_T[order_T], segment_T[order_T]
    new_T = np.flatnonzero((np.diff(ids_T) != 0) | (np.diff(segments_T) != 0)) + 1
    return Grouping(order_T=order_T, offsets_R=np.concatenate([[0], new_T, [len(order_T)]]).astype(np.int64))


def prompt_lengths(trace: RoutingTrace, groups: Grouping) -> I64:
    """Return how many leading tokens of each request are prefill, int64 [R]."""
    decode_T = trace.phase_T[groups.order_T] != 0
    index_T = np.arange(len(decode_T))
    first_decode_T = np.where(decode_T, index_T, len(decode_T))
    first_R = np.minimum.reduceat(first_decode_T, groups.offsets_R[:-1])
    return np.minimum(first_R, groups.offsets_R[1:]) - groups.offsets_R[:-1]


def select_rows(trace: RoutingTrace, rows_N: I64) -> RoutingTrace:
    """Return the trace of the given rows (ascending), its steps renumbered to those that still hold a token.

    Measured times are dropped: they belong to the whole step.
    """
    kept_S, step_N = np.unique(trace.step_T[rows_N], return_inverse=True)
    phase_S = phases_of(trace.phase_T[rows_N], step_N, len(kept_S))
    unknown = {"start_ns_S": None, "moe_ns_SL": None, "other_ns_SL": None}
    table = replace(pick_rows(trace.step_table, kept_S), phase_S=phase_S, **unknown)
    return take_tokens(trace, rows_N, step_T=step_N.astype(np.int64), step_table=table)


def phases_of(phase_T: U8, step_T: I64, num_steps: int) -> U8:
    """Return each step's index into `PHASES` from its tokens' phases; a step without tokens counts as decode."""
    tokens_S = np.bincount(step_T, minlength=num_steps)
    decode_S = np.bincount(step_T, weights=phase_T != 0, minlength=num_steps)
    pure_S = np.where(decode_S == 0, PHASES.index("prefill"), PHASES.index("mixed"))
    return np.where(decode_S == tokens_S, PHASES.index("decode"), pure_S).astype(np.uint8)
