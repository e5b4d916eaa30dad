"""SGLang's per-token recorder: expert ids of every token of every forward pass, one file per rank.

Shape letters: L layers, T tokens, W the recorder's width, P physical experts.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..check import TraceError
from .content import Content, as_dict, as_ints, as_list
from .counts import physical_map
from .result import DECODE, PREFILL, ImportOptions, ImportResult, Rows, finish_tokens, stack_rows

MIXED_MODE = 3
"""ForwardMode of a pass with prompts and decoding requests; the latter are its pieces of one token."""


def sglang_per_token(contents: Sequence[Content], options: ImportOptions) -> ImportResult:
    """Import mode per_token: ids become logical, forward passes steps, requests follow from positions.

    Ranks that recorded the same tokens (tensor parallel) count once; others (data parallel) share the step.
    """
    passes: defaultdict[int, dict[int, tuple[dict[str, Any], NDArray[np.int64]]]] = defaultdict(dict)
    for content in contents:
        pack = as_dict(content.value)
        map_LP = physical_map(pack, options)
        for record in map(as_dict, as_list(pack["records"])):
            number, rank = int(record["forward_pass_id"]), int(record["rank"])
            if rank in passes[number]:
                raise TraceError(f"forward pass {number} of rank {rank} is here twice; keep one recording's files")
            passes[number][rank] = record, map_LP
    requests, pieces, repeated = _Requests(), [], 0
    for number, records in sorted(passes.items()):
        distinct = _distinct([(rank, *record) for rank, record in sorted(records.items())])
        repeated += len(records) - len(distinct)
        pieces += [_rows(record, map_LP, number, rank, requests) for rank, record, map_LP in distinct]
    if not pieces:
        raise TraceError("it has no records; record while requests are served")
    notes = ["requests are joined by position: the recorder does not name them"]
    notes += [f"{repeated} records that repeat another rank's tokens dropped"] if repeated else []
    if "num_experts" not in options:
        options = {
            **options,
            "num_experts": max(int(map_LP.max()) + 1 for r in passes.values() for _, map_LP in r.values()),
        }
    return finish_tokens(stack_rows(pieces), options, format="sglang-per-token", notes=notes)


def _distinct(
    records: list[tuple[int, dict[str, Any], NDArray[np.int64]]],
) -> list[tuple[int, dict[str, Any], NDArray[np.int64]]]:
    kept: list[tuple[int, dict[str, Any], NDArray[np.int64]]] = []
    for rank, record, map_LP in records:
        ids = record["topk_ids_of_layer"]
        if not any(
            np.array_equal(ids, other["topk_ids_of_layer"]) and record["positions"] == other["positions"]
            for _, other, _ in kept
        ):
            kept.append((rank, record, map_LP))
    return kept


def _rows(record: dict[str, Any], map_LP: NDArray[np.int64], number: int, rank: int, requests: "_Requests") -> Rows:
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
    return Rows(
        request_id_T=request_T,
        position_T=position_T,
        phase_T=phase_T,
        step_T=np.full(len(position_T), number),
        expert_ids_TLK=ids_TLW,
    )


def _logical(ids_LTW: NDArray[np.int64], map_LP: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return logical ids for physical ones; -1 stays."""
    layers, physical = map_LP.shape
    if len(ids_LTW) != layers:
        raise TraceError(f"ids of {len(ids_LTW)} layers do not fit an expert map of {layers}; pass the right one")
    if ids_LTW.size and not -1 <= ids_LTW.min() <= ids_LTW.max() < physical:
        raise TraceError(
            f"physical ids span {ids_LTW.min()} to {ids_LTW.max()}; the expert map has 0 to {physical - 1}"
        )
    padded_LP = np.concatenate([map_LP, np.full((layers, 1), -1)], axis=1)
    return padded_LP[np.arange(layers)[:, None, None], ids_LTW]


class _Requests:
    """Names requests by where they left off: a piece that starts where another ended continues it."""

    def __init__(self) -> None:
        self._count = 0
        self._waiting: defaultdict[int, dict[int, deque[int]]] = defaultdict(dict)

    def of(self, rank: int, start_N: NDArray[np.int64], size_N: NDArray[np.int64], *, ends_others: bool) -> list[int]:
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
