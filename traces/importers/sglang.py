"""SGLang's expert recorder, modes per_token and per_pass: one file per rank, ids and counts of physical experts.

Shape letters: L layers, T tokens, N pieces of a pass, W the recorder's width, P physical experts, E logical experts.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..check import TraceError
from ..schema import I64
from .content import Content, as_dict, as_ints, as_list
from .result import DECODE, PREFILL, Imported, ImportOptions, Rows, finish_counts, finish_tokens, stack_rows

MIXED_MODE = 3
"""ForwardMode of a pass with prompts and decoding requests; the latter are its pieces of one token."""

Recorded = tuple[dict[str, Any], I64]
"""A record and the map of its file: the logical expert of each physical one, [L, P]."""


def _passes(contents: Sequence[Content], options: ImportOptions) -> tuple[dict[int, dict[int, Recorded]], int, int]:
    """Return what each rank recorded of each forward pass, in order; then the numbers of layers and experts."""
    passes: defaultdict[int, dict[int, Recorded]] = defaultdict(dict)
    layers = experts = 0
    for content in contents:
        pack = as_dict(content.value)
        given = options.get("physical_to_logical", pack.get("last_physical_to_logical_map"))
        map_LP = as_ints(given, "last_physical_to_logical_map", 2)
        if map_LP.min(initial=0) < 0:
            raise TraceError("last_physical_to_logical_map holds negative ids; pass physical_to_logical")
        layers, experts = len(map_LP), max(experts, int(map_LP.max()) + 1)
        for record in map(as_dict, as_list(pack["records"])):
            number, rank = int(record["forward_pass_id"]), int(record["rank"])
            if rank in passes[number]:
                raise TraceError(f"forward pass {number} of rank {rank} is here twice; keep one recording's files")
            passes[number][rank] = record, map_LP
    if not passes:
        raise TraceError("it has no records; record while requests are served")
    return {number: dict(sorted(passes[number].items())) for number in sorted(passes)}, layers, experts


def sglang_per_pass(contents: Sequence[Content], options: ImportOptions) -> Imported:
    """Import `global_physical_count` [L, P] of each forward pass, summed over ranks and over copies of an expert."""
    passes, layers, experts = _passes(contents, options)
    counts_SLE = np.zeros((len(passes), layers, experts), dtype=np.int64)
    for counts_LE, records in zip(counts_SLE, passes.values(), strict=True):
        for record, map_LP in records.values():
            counts_LP = as_ints(record["global_physical_count"], "global_physical_count", 2)
            if counts_LP.shape != map_LP.shape:
                raise TraceError(
                    f"counts of shape {counts_LP.shape} do not fit the expert map {map_LP.shape}; pass the right one"
                )
            np.add.at(counts_LE, (np.arange(layers)[:, None], map_LP), counts_LP)
    ranks = {rank for records in passes.values() for rank in records}
    notes = [f"{sum(map(len, passes.values()))} records of {len(ranks)} ranks summed by forward pass"]
    return finish_counts(counts_SLE, options, notes=notes)


def sglang_per_token(contents: Sequence[Content], options: ImportOptions) -> Imported:
    """Import mode per_token: ids become logical, forward passes steps, requests follow from positions.

    Ranks that recorded the same tokens (tensor parallel) count once; others (data parallel) share the step.
    """
    passes, _, experts = _passes(contents, options)
    requests, pieces, repeated = _Requests(), list[Rows](), 0
    for number, records in passes.items():
        seen: list[dict[str, Any]] = []
        for rank, (record, map_LP) in records.items():
            if any(_same_tokens(record, other) for other in seen):
                repeated += 1
                continue
            seen.append(record)
            pieces.append(_rows(record, map_LP, number, rank, requests))
    notes = ["requests are joined by position: the recorder does not name them"]
    notes += [f"{repeated} records that repeat another rank's tokens dropped"] if repeated else []
    said: ImportOptions = {"num_experts": experts, **options}
    return finish_tokens(stack_rows(pieces), said, notes=notes)


def _same_tokens(record: dict[str, Any], other: dict[str, Any]) -> bool:
    same_ids = np.array_equal(record["topk_ids_of_layer"], other["topk_ids_of_layer"])
    return same_ids and record["positions"] == other["positions"]


def _rows(record: dict[str, Any], map_LP: I64, number: int, rank: int, requests: "_Requests") -> Rows:
    position_T = as_ints(record["positions"], "positions", 1)
    ids_TLW = _logical(as_ints(record["topk_ids_of_layer"], "topk_ids_of_layer", 3), map_LP).transpose(1, 0, 2)
    if len(ids_TLW) != len(position_T):
        raise TraceError(f"forward pass {number} has {len(ids_TLW)} rows of ids for {len(position_T)} positions")
    request_T, phase_T = np.zeros_like(position_T), np.full(len(position_T), DECODE, np.uint8)
    if record["extend_seq_lens"] is None:
        real_T = (ids_TLW >= 0).any(axis=(1, 2))
        start_N = position_T[real_T]
        request_T[real_T] = requests.of(rank, start_N, np.ones_like(start_N), ends_others=True)
    else:
        size_N = as_ints(record["extend_seq_lens"], "extend_seq_lens", 1)
        size_N, tokens = size_N[size_N > 0], int(size_N.sum())
        if tokens > len(position_T):
            raise TraceError(f"forward pass {number} has sequences of {tokens} tokens in {len(position_T)} rows")
        start_N = position_T[np.cumsum(size_N) - size_N]
        mixed = record["forward_mode"] == MIXED_MODE
        request_T[:tokens] = np.repeat(requests.of(rank, start_N, size_N, ends_others=mixed), size_N)
        decodes_N = (size_N == 1) & (start_N > 0) & mixed
        phase_T[:tokens] = np.repeat(np.where(decodes_N, DECODE, PREFILL), size_N)
        # What follows the sequences is padding, whatever its ids.
        ids_TLW[tokens:] = -1
    step_T = np.full(len(position_T), number)
    return Rows(request_id_T=request_T, position_T=position_T, phase_T=phase_T, step_T=step_T, expert_ids_TLK=ids_TLW)


def _logical(ids_LTW: I64, map_LP: I64) -> I64:
    """Return logical ids for physical ones; -1 stays."""
    layers, physical = map_LP.shape
    if len(ids_LTW) != layers:
        raise TraceError(f"ids of {len(ids_LTW)} layers do not fit an expert map of {layers}; pass the right one")
    if ids_LTW.size and not -1 <= ids_LTW.min() <= ids_LTW.max() < physical:
        raise TraceError(
            f"physical ids span {ids_LTW.min()} to {ids_LTW.max()}; the expert map has 0 to {physical - 1}"
        )
    padded_LP = np.pad(map_LP, ((0, 0), (0, 1)), constant_values=-1)
    return padded_LP[np.arange(layers)[:, None, None], ids_LTW]


class _Requests:
    """Names requests by where they left off: a piece that starts where another ended continues it."""

    def __init__(self) -> None:
        self._count = 0
        self._waiting: defaultdict[int, dict[int, deque[int]]] = defaultdict(dict)

    def of(self, rank: int, start_N: I64, size_N: I64, *, ends_others: bool) -> list[int]:
        """Return the request of each piece of a pass, in batch order.

        Every running request takes part in a pass that decodes: who is not in it has ended.
        """
        waiting = self._waiting[rank]
        names = [self._name(waiting, start) for start in start_N.tolist()]
        if ends_others and names:
            self._waiting[rank] = waiting = {}
        for name, end in zip(names, (start_N + size_N).tolist(), strict=True):
            waiting.setdefault(end, deque()).append(name)
        return names

    def _name(self, waiting: dict[int, deque[int]], start: int) -> int:
        if start and waiting.get(start):
            return waiting[start].popleft()
        self._count += 1
        return self._count - 1
