"""The likelihood of one layer's choices (Plackett-Luce), and its most likely parameters given each token's past.

Before it, what it learns from: requests of a trace side by side, and a sample of their tokens.

Shape letters: P positions, R requests, L MoE layers, E experts, K top-k, H memories, N sampled tokens, J later choices,
C columns of a design matrix.
"""

from dataclasses import dataclass

import numpy as np

from .choice import MEMORY_H, NUM_BINS, PAD, WARM_UP, Ids, Shape, log_weight, multi_hot, remember
from .requests import group_requests, prompt_lengths
from .schema import F32, F64, I64
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
    domain_R: I64
    """Index of the request's domain; 0 where none is named."""

    def pick(self, columns_R: I64) -> "Panel":
        """Return some of the requests (ascending, repeats allowed)."""
        shape = Shape(tokens_R=self.shape.tokens_R[columns_R], prompt_R=self.shape.prompt_R[columns_R])
        ids_PRLK = self.ids_PRLK[: shape.tokens_R[0], columns_R]
        return Panel(shape=shape, ids_PRLK=ids_PRLK, domain_R=self.domain_R[columns_R])


def evenly(num: int, wanted: int) -> I64:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Tokens of one layer to fit on, sorted by request."""

    ids_NK: I64
    request_N: I64
    num_requests: int
    design_NC: F32
    """Marks of the profile bin, then of the first choice below, then of the other choices below."""
    memory_HNE: F32


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


Blocks = tuple[F64, ...]
"""logit_E, tilt_RE, memory_HE, first_E, weight_CE."""
PRECISION = (0.03, 1.5, 0.5, 0.03, 0.3)
"""Of the Gaussian prior of each block: weak, but for the tilt, which has few tokens per request."""


def split_blocks(flat: F64, sample: Sample, num_experts: int) -> Blocks:
    """Cut the vector of all parameters into its blocks."""
    rows = (1, sample.num_requests, len(MEMORY_H), 1, sample.design_NC.shape[1])
    parts = np.split(flat.reshape(-1, num_experts), np.cumsum(rows)[:-1])
    return parts[0][0], parts[1], parts[2], parts[3][0], parts[4]


def _logits(blocks: Blocks, sample: Sample) -> F32:
    logit_E, tilt_RE, memory_HE, _, weight_CE = (block.astype(np.float32) for block in blocks)
    logit_NE = sample.design_NC @ weight_CE
    logit_NE += tilt_RE[sample.request_N]
    logit_NE += logit_E
    for gain_E, memory_NE in zip(memory_HE, sample.memory_HNE, strict=True):
        logit_NE += gain_E * memory_NE
    return logit_NE


def log_likelihood(logit_NE: F32, first_E: F32, ids_NK: I64) -> tuple[float, F32, F32]:
    """Return the log-likelihood of ordered choices and its slopes in the logits and in the first choice's extra.

    The first choice is a softmax over logit + first; each later one a softmax over the logits still left.
    """
    row_N = np.arange(len(ids_NK))
    weight_NE = np.exp(logit_NE - logit_NE.max(axis=1, keepdims=True))
    lead_NE = weight_NE * np.exp(first_E)
    lead_NE /= lead_NE.sum(axis=1, keepdims=True)
    chosen_NK = np.maximum(np.take_along_axis(weight_NE, ids_NK, axis=1), 1e-30)
    left_NJ = np.maximum(weight_NE.sum(axis=1, keepdims=True) - chosen_NK.cumsum(axis=1)[:, :-1], 1e-12)
    value = np.log(np.maximum(lead_NE[row_N, ids_NK[:, 0]], 1e-30)).sum() + np.log(chosen_NK[:, 1:] / left_NJ).sum()
    inverse_NJ = np.cumsum(1 / left_NJ, axis=1)
    slope_NE = -weight_NE * inverse_NJ[:, -1:] if inverse_NJ.shape[1] else np.zeros_like(weight_NE)
    slope_NE[row_N, ids_NK[:, 0]] = 0
    slope_NE[row_N[:, None], ids_NK[:, 1:]] = 1 - chosen_NK[:, 1:] * inverse_NJ
    lead_NE *= -1
    lead_NE[row_N, ids_NK[:, 0]] += 1
    return float(value), slope_NE + lead_NE, lead_NE


def _objective(flat: F64, sample: Sample, num_experts: int) -> tuple[float, F64]:
    """Return the negative log-posterior per token and its gradient."""
    blocks = split_blocks(flat, sample, num_experts)
    value, slope_NE, lead_NE = log_likelihood(_logits(blocks, sample), blocks[3].astype(np.float32), sample.ids_NK)
    start_R = np.searchsorted(sample.request_N, np.arange(sample.num_requests))
    tilt_RE = np.zeros((sample.num_requests, num_experts))
    present_R = np.flatnonzero(np.bincount(sample.request_N, minlength=sample.num_requests))
    tilt_RE[present_R] = np.add.reduceat(slope_NE, start_R[present_R], axis=0)
    memory_HE = np.stack([np.einsum("ne,ne->e", slope_NE, memory_NE) for memory_NE in sample.memory_HNE])
    slopes = (slope_NE.sum(axis=0), tilt_RE, memory_HE, lead_NE.sum(axis=0), sample.design_NC.T @ slope_NE)
    gradient = np.concatenate(
        [(slope - weight * block).ravel() for slope, weight, block in zip(slopes, PRECISION, blocks, strict=True)]
    )
    penalty = sum(0.5 * weight * float((block**2).sum()) for weight, block in zip(PRECISION, blocks, strict=True))
    return (penalty - value) / len(sample.ids_NK), -gradient / len(sample.ids_NK)


def most_likely(sample: Sample, num_experts: int, max_iterations: int) -> Blocks:
    """Return the parameters of highest posterior density: a concave problem, begun at the load alone."""
    from scipy.optimize import minimize

    start = np.zeros((2 + sample.num_requests + len(MEMORY_H) + sample.design_NC.shape[1], num_experts))
    start[0] = log_weight(np.bincount(sample.ids_NK.ravel(), minlength=num_experts) / len(sample.ids_NK))
    found = minimize(
        _objective,
        start.ravel(),
        args=(sample, num_experts),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iterations, "maxcor": 8},
    )
    return split_blocks(np.asarray(found.x), sample, num_experts)
