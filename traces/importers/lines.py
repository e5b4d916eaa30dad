"""Line-by-line routing logs, one record for each token and layer: moe-cache-lab's format and vLLM loggers.

Shape letters: T tokens, L layers, K top-k.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from ..check import TraceError
from .content import Content, as_floats, as_ints, as_list
from .result import DECODE, PREFILL, ImportOptions, ImportResult, Rows, finish_tokens

CACHE_LAB = "moe-cache-lab.routing-jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """One record: a token in a stretch (a forward pass, a request), in a layer, with its experts."""

    stretch: int
    token: int
    layer: int
    expert_ids_K: list[Any]
    weights_K: list[Any]
    prefill: bool = False


def cache_lab(contents: Sequence[Content], options: ImportOptions) -> ImportResult:
    """Import moe-cache-lab's routing JSON lines, version 1; positions that start again begin a request."""
    records = _only(contents).records
    meta = records[0]
    if meta.get("format_version") != 1:
        raise TraceError(f"its format_version is {meta.get('format_version')}; allowed is 1 (decoder-only models)")
    choices: list[_Choice] = []
    last: dict[int, int] = {}
    request_of_layer: defaultdict[int, int] = defaultdict(int)
    for record in records[1:]:
        layer, position = int(record["layer"]), int(record["token_position"])
        request_of_layer[layer] += position <= last.get(layer, -1)
        last[layer] = position
        choices.append(
            _Choice(
                stretch=request_of_layer[layer],
                token=position,
                layer=layer,
                expert_ids_K=as_list(record["selected_experts"]),
                weights_K=as_list(record.get("selected_probabilities") or []),
                prefill=record["phase"] == "prompt",
            )
        )
    known = {"num_experts": meta.get("num_experts"), "top_k": meta.get("experts_per_token"), "model": meta["model_id"]}
    rows = _joined(choices)
    # A prompt is one step; every generated token is a step.
    opens_T = np.diff(rows.request_id_T, prepend=-1) != 0
    rows = replace(rows, step_T=np.cumsum(opens_T | (rows.phase_T == DECODE)))
    return finish_tokens(rows, _filled(options, known), format="moe-cache-lab")


def vllm_log(contents: Sequence[Content], options: ImportOptions) -> ImportResult:
    """Import vLLM routing loggers' JSON lines: `token_idx` starts again with each forward pass, which is a step."""
    records = _only(contents).records
    meta = records[0]
    routes = [record for record in records if record.get("type") == "route"]
    choices: list[_Choice] = []
    passes: defaultdict[int, int] = defaultdict(lambda: -1)
    for record in routes:
        layer, token = int(record["layer"]), int(record["token_idx"])
        passes[layer] += token == 0
        choices.append(
            _Choice(
                stretch=passes[layer],
                token=token,
                layer=layer,
                expert_ids_K=as_list(record["topk_ids"]),
                weights_K=as_list(record.get("topk_weights") or []),
            )
        )
    rows = _joined(choices)
    known = {"num_experts": meta.get("num_experts"), "top_k": meta.get("top_k"), "model": meta.get("model_id")}
    notes = ["requests are not named: a pass of several tokens is taken as a prompt, of one token as its continuation"]
    return finish_tokens(_guessed_requests(rows), _filled(options, known), format="vllm-log", notes=notes)


def _only(contents: Sequence[Content]) -> Content:
    if len(contents) > 1:
        raise TraceError("each log numbers its tokens on its own; import one file at a time")
    return contents[0]


def _filled(options: ImportOptions, known: dict[str, Any]) -> ImportOptions:
    """Return the options, with what the file says where the caller said nothing."""
    said = {name: value for name, value in known.items() if value is not None}
    return cast("ImportOptions", {**said, **options})


def _joined(choices: Iterable[_Choice]) -> Rows:
    """Join the layers of each token; steps are the stretches."""
    tokens: defaultdict[tuple[int, int], dict[int, _Choice]] = defaultdict(dict)
    for choice in choices:
        if choice.layer in tokens[choice.stretch, choice.token]:
            raise TraceError(
                f"token {choice.token} appears twice in layer {choice.layer} of a pass; the log is damaged"
            )
        tokens[choice.stretch, choice.token][choice.layer] = choice
    layers = sorted({layer for of_layer in tokens.values() for layer in of_layer})
    whole = [(place, of_layer) for place, of_layer in sorted(tokens.items()) if len(of_layer) == len(layers)]
    if not whole or len(whole) < len(tokens):
        lacking = len(tokens) - len(whole)
        raise TraceError(
            f"{lacking} of {len(tokens)} tokens lack some of layers {layers}; cut the log's unfinished end"
        )
    grid = [[of_layer[layer] for layer in layers] for _, of_layer in whole]
    weights = [[choice.weights_K for choice in row] for row in grid]
    gates_TLK = as_floats(weights, "the routing weights") if all(map(all, weights)) else None
    return Rows(
        request_id_T=np.array([stretch for (stretch, _), _ in whole]),
        position_T=np.array([token for (_, token), _ in whole]),
        phase_T=np.array([PREFILL if row[0].prefill else DECODE for row in grid], np.uint8),
        step_T=np.array([stretch for (stretch, _), _ in whole]),
        expert_ids_TLK=as_ints([[choice.expert_ids_K for choice in row] for row in grid], "expert ids", 3),
        gates_TLK=gates_TLK,
    )


def _guessed_requests(rows: Rows) -> Rows:
    """Name requests by the passes: several tokens open one, a single token continues the last."""
    _, pass_T, tokens_P = np.unique(rows.step_T, return_inverse=True, return_counts=True)
    single_P = tokens_P == 1
    place_P = np.arange(len(tokens_P))
    opening_P = np.maximum.accumulate(np.where(single_P, 0, place_P))
    base_P = np.where(single_P, tokens_P[opening_P] + place_P - opening_P - 1, 0)
    return replace(
        rows,
        request_id_T=opening_P[pass_T],
        position_T=rows.position_T + base_P[pass_T],
        phase_T=np.where(single_P, DECODE, PREFILL).astype(np.uint8)[pass_T],
    )
