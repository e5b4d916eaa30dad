"""From a source's token rows to a trace: padding, dense layers and dummy steps go, and it is said how many.

Shape letters: T tokens, S steps, L MoE layers, E experts, K top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from ..check import TraceError, check_load, check_trace
from ..requests import phases_of
from ..schema import I16, I32, I64, U8, Floats, Ints, Provenance
from ..trace import UNKNOWN, ExpertLoad, RoutingTrace, StepTable, id_dtype

CONSTANT_TOKENS = 4
"""A step of so many tokens that all choose the same experts in all layers is a dummy: warm-up, graph capture."""

PREFILL, DECODE = range(2)
"""Phases of tokens, and indices into `PHASES`."""


class ImportOptions(TypedDict, total=False):
    """What a file may leave unsaid."""

    top_k: int
    num_experts: int
    num_layers: int
    prompt_len: int
    """Rows of the prompt, where the file does not part it from the output."""
    physical_to_logical: Ints
    """[L, physical experts]; overrides the file's own."""
    member: str
    """Which of several models in one file."""
    model: str
    score: Literal["softmax", "sigmoid"]
    """How router logits are scored; with `bias_LE` added before the choice."""
    bias_LE: Floats
    num_groups: int
    top_groups: int


Imported = tuple[RoutingTrace | ExpertLoad, list[str]]
"""A trace, and what was dropped or assumed, a sentence each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Tokens as a source gave them: ids may be -1 (padding); steps may have any numbers, in any order."""

    request_id_T: I64
    position_T: I64
    phase_T: U8
    step_T: I64
    expert_ids_TLK: Ints
    gates_TLK: Floats | None = None
    domain_T: I16 | None = None

    def keep(self, rows: NDArray[Any]) -> "Rows":
        """Return some rows, by mask or by index, or all of them in another order."""
        columns: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: column[rows] for name, column in columns.items() if column is not None})


def stack_rows(pieces: Sequence[Rows]) -> Rows:
    """Join rows, for instance of several requests; all must have the same layers and width."""
    shapes = {piece.expert_ids_TLK.shape[1:] for piece in pieces}
    if len(shapes) != 1:
        raise TraceError(f"records have different layers or widths, {sorted(shapes)}; import one model at a time")
    names = ("request_id_T", "position_T", "phase_T", "step_T", "expert_ids_TLK")
    return Rows(**{name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in names})


def finish_tokens(
    rows: Rows, options: ImportOptions, *, notes: Sequence[str] = (), domains: tuple[str, ...] = ()
) -> Imported:
    """Clean token rows and make the trace.

    Raises:
        TraceError: No token is left, some lack experts, or the trace is not sound.
    """
    said = list(notes)
    rows = _without_spare_columns(_without_blanks(rows, said), options)
    num_experts = options.get("num_experts")
    if num_experts is None:
        num_experts = int(rows.expert_ids_TLK.max()) + 1
        said.append(f"{num_experts} experts, from the largest id; pass num_experts if the model has more")
    rows = rows.keep(np.argsort(rows.step_T, kind="stable"))
    if rows.expert_ids_TLK.shape[2] < num_experts:
        rows = _without_dummies(rows, said)
    steps, step_T = np.unique(rows.step_T, return_inverse=True)
    phase_S = phases_of(rows.phase_T, step_T, len(steps))
    trace = RoutingTrace(
        num_experts=num_experts,
        provenance=_provenance(options, said),
        request_id_T=rows.request_id_T.astype(np.int64),
        position_T=cast("I32", rows.position_T),
        phase_T=rows.phase_T,
        step_T=step_T.astype(np.int64),
        domain_T=np.full(len(step_T), UNKNOWN, np.int16) if rows.domain_T is None else rows.domain_T,
        domains=domains,
        expert_ids_TLK=rows.expert_ids_TLK,
        gates_TLK=None if rows.gates_TLK is None else rows.gates_TLK.astype(np.float16),
        step_table=StepTable(phase_S=phase_S, segment_S=np.zeros_like(phase_S)),
    )
    # Narrowed after the check, so that what does not fit is refused rather than wrapped round.
    check_trace(trace)
    narrow = {"expert_ids_TLK": trace.expert_ids_TLK.astype(id_dtype(num_experts))}
    return replace(trace, position_T=trace.position_T.astype(np.int32), **narrow), said


def _provenance(options: ImportOptions, said: Sequence[str]) -> Provenance:
    return Provenance(source="imported", model=options.get("model"), notes="; ".join(said))


def _without_blanks(rows: Rows, said: list[str]) -> Rows:
    """Drop layers and rows that nobody wrote: -1 throughout, or zeros, as no token chooses expert 0 twice."""
    ids_TLK = rows.expert_ids_TLK
    empty_TL, zero_TL = (np.asarray(marks_TLK.all(axis=2)) for marks_TLK in (ids_TLK < 0, ids_TLK == 0))
    if empty_TL.all():
        raise TraceError("it holds no token with experts; record while requests are served")
    dense_L = (empty_TL | zero_TL).all(axis=0)
    if dense_L.all():
        raise TraceError(
            "all expert ids are zero: vLLM's monolithic MoE kernels do not report them; record with another MoE backend"
        )
    if dense_L.any():
        said.append(f"layers {np.flatnonzero(dense_L).tolist()} hold no routing (dense layers) and are dropped")
    # One choice of expert 0 is a choice.
    blank_TL = empty_TL | zero_TL if ids_TLK.shape[2] > 1 else empty_TL
    blank_T = np.asarray(blank_TL[:, ~dense_L].all(axis=1))
    if blank_T.any():
        said.append(f"{blank_T.sum()} rows without experts (padding, or never written) dropped")
    gates_TLK = None if rows.gates_TLK is None else rows.gates_TLK[:, ~dense_L]
    return replace(rows, expert_ids_TLK=ids_TLK[:, ~dense_L], gates_TLK=gates_TLK).keep(~blank_T)


def _without_spare_columns(rows: Rows, options: ImportOptions) -> Rows:
    """Cut columns that are -1 for every token: the source's width exceeds the model's top-k."""
    used_K = (rows.expert_ids_TLK >= 0).any(axis=(0, 1))
    top_k, ids_TLK = int(used_K.sum()), rows.expert_ids_TLK[:, :, used_K]
    if options.get("top_k", top_k) != top_k:
        raise TraceError(f"each token has {top_k} experts, not the top_k {options.get('top_k')} given; check the model")
    if ids_TLK.min() < 0:
        token, layer, _ = np.argwhere(ids_TLK < 0)[0]
        raise TraceError(
            f"token {token} has fewer than {top_k} experts in layer {layer}; record again without dropping"
        )
    return replace(rows, expert_ids_TLK=ids_TLK)


def _without_dummies(rows: Rows, said: list[str]) -> Rows:
    """Drop constant steps from rows sorted by step."""
    _, starts, step_T, tokens_S = np.unique(rows.step_T, return_index=True, return_inverse=True, return_counts=True)
    equal_T = (rows.expert_ids_TLK == rows.expert_ids_TLK[starts][step_T]).all(axis=(1, 2))
    dummy_S = np.logical_and.reduceat(equal_T, starts) & (tokens_S >= CONSTANT_TOKENS)
    if not dummy_S.any():
        return rows
    said.append(f"{dummy_S.sum()} constant steps ({tokens_S[dummy_S].sum()} tokens: warm-up or graph capture) dropped")
    if dummy_S.all():
        raise TraceError("all its steps are constant, as dummy runs are; record while requests are served")
    return rows.keep(~dummy_S[step_T])


def finish_counts(
    counts_SLE: I64, options: ImportOptions, *, notes: Sequence[str] = (), labels: tuple[str, ...] = ()
) -> Imported:
    """Clean counts and make the load: dense layers and constant steps go.

    Raises:
        TraceError: Nothing is left, the top-k is not known, or the load is not sound.
    """
    said = list(notes)
    top_k = options.get("top_k")
    if top_k is None:
        raise TraceError("counts do not say how many experts a token has; pass top_k")
    num_experts = options.get("num_experts", counts_SLE.shape[2])
    if num_experts < counts_SLE.shape[2]:
        raise TraceError(f"it counts {counts_SLE.shape[2]} experts, more than the num_experts {num_experts} given")
    counts_SLE = np.pad(counts_SLE, ((0, 0), (0, 0), (0, num_experts - counts_SLE.shape[2])))
    dense_L = ~counts_SLE.any(axis=(0, 2))
    if dense_L.all():
        raise TraceError("all its counts are zero; record while requests are served")
    if dense_L.any():
        said.append(f"layers {np.flatnonzero(dense_L).tolist()} count nothing (dense layers) and are dropped")
        counts_SLE = counts_SLE[:, ~dense_L]
    # A dummy gives the same number of tokens, at least four, to just `top_k` experts of each layer.
    most_SL, chosen_SL = counts_SLE.max(axis=2), (counts_SLE > 0).sum(axis=2)
    even_SL = (counts_SLE.sum(axis=2) == top_k * most_SL) & (chosen_SL == top_k) & (most_SL >= CONSTANT_TOKENS)
    dummy_S = even_SL.all(axis=1) & (top_k < num_experts)
    if dummy_S.any():
        said.append(f"{dummy_S.sum()} constant steps (warm-up or graph capture) dropped")
    kept = np.flatnonzero(~dummy_S)
    load = ExpertLoad(
        top_k=top_k,
        provenance=_provenance(options, said),
        counts_SLE=counts_SLE[kept],
        labels=tuple(labels[step] for step in kept) if labels else (),
    )
    check_load(load)
    return load, said
