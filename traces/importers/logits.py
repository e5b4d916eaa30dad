"""Router logits, as `output_router_logits=True` gives them: the choice of experts is made here.

Shape letters: B sequences, T = B x sequence length tokens, L sparse layers, E experts, K top-k, G groups.
"""

from collections.abc import Sequence

import numpy as np

from ..check import TraceError
from ..schema import F64, I64, Floats
from .content import Content, as_dict, as_floats, as_ints, as_list
from .result import PREFILL, Imported, ImportOptions, Rows, finish_tokens, stack_rows


def router_logits(contents: Sequence[Content], options: ImportOptions) -> Imported:
    """Import logits [T, E] per layer, before softmax; each file is one forward pass over whole sequences.

    `attention_mask` [B, T / B] in the file tells padding; `e_score_correction_bias` [L, E] is used when the option
    `bias_LE` is not given.
    """
    pieces: list[Rows] = []
    notes: list[str] = []
    first = 0
    for step, content in enumerate(contents):
        named = as_dict(content.value) if isinstance(content.value, dict) else {"router_logits": content.value}
        logits_LTE = _layers(named["router_logits"])
        tokens = logits_LTE.shape[1]
        if named.get("attention_mask") is None:
            notes = ["no attention_mask: the rows of a file are taken as one sequence without padding"]
            named["attention_mask"] = np.ones((1, tokens), np.int64)
        real_BT = as_ints(named["attention_mask"], "attention_mask", 2) != 0
        bias = options.get("bias_LE", named.get("e_score_correction_bias"))
        ids_TLK = choose_experts(logits_LTE, options, None if bias is None else as_floats(bias, "bias_LE"))
        if real_BT.size != tokens:
            raise TraceError(f"attention_mask {real_BT.shape} does not cover the {tokens} rows of logits")
        piece = Rows(
            request_id_T=first + np.repeat(np.arange(len(real_BT)), real_BT.shape[1]),
            position_T=np.maximum(np.cumsum(real_BT, axis=1) - 1, 0).ravel(),
            phase_T=np.full(tokens, PREFILL, np.uint8),
            step_T=np.full(tokens, step),
            expert_ids_TLK=np.where(real_BT.ravel()[:, None, None], ids_TLK, -1),
        )
        pieces.append(piece)
        first += len(real_BT)
        options = {**options, "num_experts": logits_LTE.shape[2]}
    return finish_tokens(stack_rows(pieces), options, notes=notes)


def choose_experts(logits_LTE: Floats, options: ImportOptions, bias_LE: Floats | None = None) -> I64:
    """Return the top-k ids [T, L, K] by falling score plus bias; equal scores go to the lower id.

    With groups, experts outside the best `top_groups` groups (by the sum of their two best scores) are out, as in
    DeepSeek-V3.
    """
    top_k, experts = options.get("top_k"), logits_LTE.shape[2]
    if top_k is None or not 1 <= top_k <= experts:
        raise TraceError(f"top_k is {top_k}; logits of {experts} experts need one of 1 to {experts}")
    groups, score = options.get("num_groups", 1), options.get("score", "softmax")
    if score not in ("softmax", "sigmoid"):
        raise TraceError(f"score is {score!r}; router logits are scored by softmax or sigmoid")
    score_LTE = logits_LTE
    if bias_LE is not None or groups > 1:
        # Without them scoring keeps the order, and far logits would only underflow into ties.
        score_LTE = (1 + np.tanh(logits_LTE / 2)) / 2 if score == "sigmoid" else _softmax(logits_LTE)
    if bias_LE is not None:
        if bias_LE.shape != (len(logits_LTE), experts):
            raise TraceError(f"bias_LE has shape {bias_LE.shape}; the logits need {(len(logits_LTE), experts)}")
        score_LTE = score_LTE + bias_LE[:, None]
    if groups > 1:
        score_LTE = _best_groups(score_LTE, groups, options.get("top_groups", groups))
    return np.argsort(-score_LTE, axis=2, kind="stable")[:, :, :top_k].transpose(1, 0, 2)


def _softmax(logits_LTE: Floats) -> Floats:
    power_LTE = np.exp(logits_LTE - logits_LTE.max(axis=2, keepdims=True))
    return power_LTE / power_LTE.sum(axis=2, keepdims=True)


def _best_groups(score_LTE: Floats, groups: int, top_groups: int) -> Floats:
    layers, tokens, experts = score_LTE.shape
    if experts % groups or not 1 <= top_groups <= groups:
        raise TraceError(
            f"{experts} experts in {groups} groups, best {top_groups}: groups must part the experts evenly"
        )
    score_LTGE = score_LTE.reshape(layers, tokens, groups, -1)
    group_LTG = np.sort(score_LTGE, axis=3)[..., -2:].sum(axis=3)
    rank_LTG = np.argsort(np.argsort(-group_LTG, axis=2, kind="stable"), axis=2)
    return np.where(rank_LTG[..., None] < top_groups, score_LTGE, -np.inf).reshape(score_LTE.shape)


def _layers(value: object) -> F64:
    layers = list(value) if isinstance(value, np.ndarray) else as_list(value)
    # Switch gives (logits, chosen ids) pairs, and nothing for dense layers.
    arrays = [layer[0] if isinstance(layer, tuple) else layer for layer in layers if layer is not None]
    shapes = {np.shape(array) for array in arrays}
    if len(shapes) != 1 or len(shape := next(iter(shapes))) not in (2, 3):
        raise TraceError(f"router logits have shapes {sorted(shapes)}; every layer needs the same [tokens, experts]")
    parts = [as_floats(array, f"the router logits of layer {layer}") for layer, array in enumerate(arrays)]
    return np.stack(parts).reshape(len(parts), -1, shape[-1])
