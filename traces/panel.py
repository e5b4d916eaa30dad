"""Requests of a trace side by side, and what the likelihood of a layer needs of their tokens.

Shape letters: P positions, R requests, L MoE layers, E experts, K top-k, H memories, N sampled tokens.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .choice import F32, MEMORY_H, NUM_BINS, PAD, WARM_UP, Ids, Shape, multi_hot, remember
from .likelihood import Sample
from .requests import group_requests, prompt_lengths
from .trace import RoutingTrace

MAX_REQUESTS = 512
MAX_POSITIONS = 512
PANEL_ENTRIES = 24_000_000
"""Marks per layer of the tokens that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Requests of a trace side by side, longest first, cut after the same number of positions."""

    shape: Shape
    ids_PRLK: Ids
    domain_R: NDArray[np.int64]
    """Index of the request's domain; 0 where none is named."""

    def pick(self, columns_R: NDArray[np.int64]) -> "Panel":
        """Return some of the requests (ascending, repeats allowed)."""
        shape = Shape(tokens_R=self.shape.tokens_R[columns_R], prompt_R=self.shape.prompt_R[columns_R])
        ids_PRLK = self.ids_PRLK[: shape.tokens_R[0], columns_R]
        return Panel(shape=shape, ids_PRLK=ids_PRLK, domain_R=self.domain_R[columns_R])


def evenly(num: int, wanted: int) -> NDArray[np.int64]:
    """Return `wanted` of the numbers below `num`, evenly spread; repeated where there are too few."""
    return np.linspace(0, num - 1, wanted).round().astype(np.int64)


def panel_of(trace: RoutingTrace) -> Panel:
    """Lay the requests of a trace side by side: at most `MAX_REQUESTS` of them, drawn evenly over the trace."""
    groups = group_requests(trace)
    chosen_R = evenly(groups.num_requests, min(groups.num_requests, MAX_REQUESTS))
    longest = min(max(PANEL_ENTRIES // (trace.num_experts * len(chosen_R)), 64), MAX_POSITIONS)
    longest = max(longest, 4 * MAX_POSITIONS // len(chosen_R))
    chosen_R = chosen_R[np.argsort(-groups.lengths[chosen_R], kind="stable")]
    tokens_R = np.minimum(groups.lengths[chosen_R], longest)
    ids_PRLK = np.full((tokens_R[0], len(chosen_R), trace.num_layers, trace.top_k), PAD, np.int32)
    rows = [
        groups.order_T[groups.offsets_R[r] : groups.offsets_R[r] + n] for r, n in zip(chosen_R, tokens_R, strict=True)
    ]
    for column, rows_T in enumerate(rows):
        ids_PRLK[: len(rows_T), column] = trace.expert_ids_TLK[rows_T]
    return Panel(
        shape=Shape(tokens_R=tokens_R, prompt_R=np.minimum(prompt_lengths(trace, groups)[chosen_R], tokens_R)),
        ids_PRLK=ids_PRLK,
        domain_R=np.maximum([int(trace.domain_T[rows_T[0]]) for rows_T in rows], 0),
    )


def _memories(ids_PRK: Ids, num_experts: int) -> F32:
    """Return what each token's layer remembers before it chooses, float32 [H, P, R, E]."""
    num_positions, num_requests, _ = ids_PRK.shape
    memory_HPRE = np.zeros((len(MEMORY_H), num_positions, num_requests, num_experts), np.float32)
    for ids_RK in ids_PRK[:WARM_UP]:
        alive = int((ids_RK[:, 0] >= 0).sum())
        remember(memory_HPRE[:, 0, :alive], ids_RK[:alive])
    for p in range(1, num_positions):
        memory_HPRE[:, p] = memory_HPRE[:, p - 1]
        remember(memory_HPRE[:, p], ids_PRK[p - 1])
    return memory_HPRE


def layer_sample(panel: Panel, level: int, num_experts: int, num_tokens: int) -> Sample:
    """Take tokens of one layer for the likelihood, sorted by request."""
    alive_RP = panel.shape.alive.T
    column_N, position_N = np.nonzero(alive_RP)
    if len(column_N) > num_tokens:
        kept_N = np.sort(np.random.default_rng([level]).choice(len(column_N), num_tokens, replace=False))
        column_N, position_N = column_N[kept_N], position_N[kept_N]
    at = (position_N, column_N)
    marks = [multi_hot(panel.shape.bins[at][:, None], NUM_BINS)]
    if level:
        below_NK = panel.ids_PRLK[:, :, level - 1][at]
        marks += [multi_hot(below_NK[:, :1], num_experts), multi_hot(below_NK[:, 1:], num_experts)]
    return Sample(
        ids_NK=panel.ids_PRLK[:, :, level][at].astype(np.int64),
        request_N=column_N,
        num_requests=alive_RP.shape[0],
        design_NC=np.concatenate(marks, axis=1),
        memory_HNE=_memories(panel.ids_PRLK[:, :, level], num_experts)[:, position_N, column_N],
    )
