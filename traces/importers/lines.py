"""Line-by-line routing logs, one record for each token and layer: moe-cache-lab's format and vLLM loggers.

Shape letters: N records, M those of a layer, T tokens, P passes, L layers, K top-k.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from ..check import TraceError
from .content import Content, as_floats, as_ints, only
from .result import DECODE, PREFILL, Imported, ImportOptions, Rows, finish_tokens

CACHE_LAB = "moe-cache-lab.routing-jsonl"


def cache_lab(contents: Sequence[Content], options: ImportOptions) -> Imported:
    """Import moe-cache-lab's routing JSON lines, version 1; positions that start again begin a request."""
    meta, *records = only(contents, "each log numbers its tokens on its own").records
    if meta.get("format_version") != 1:
        raise TraceError(f"its format_version is {meta.get('format_version')}; allowed is 1 (decoder-only models)")
    rows = _joined(records, "token_position", "selected_experts", "selected_probabilities")
    # A prompt is one step; every generated token is a step.
    opens_T = np.diff(rows.request_id_T, prepend=-1) != 0
    rows = replace(rows, step_T=np.cumsum(opens_T | (rows.phase_T == DECODE)))
    known = {"num_experts": meta.get("num_experts"), "top_k": meta.get("experts_per_token"), "model": meta["model_id"]}
    return finish_tokens(rows, _filled(options, known))


def vllm_log(contents: Sequence[Content], options: ImportOptions) -> Imported:
    """Import vLLM routing loggers' JSON lines: `token_idx` starts again with each forward pass, which is a step.

    Requests are guessed from the passes: several tokens open one, a single token continues the last.
    """
    records = only(contents, "each log numbers its tokens on its own").records
    meta, routes = records[0], [record for record in records if record.get("type") == "route"]
    rows = _joined(routes, "token_idx", "topk_ids", "topk_weights")
    _, pass_T, tokens_P = np.unique(rows.step_T, return_inverse=True, return_counts=True)
    single_P, place_P = tokens_P == 1, np.arange(len(tokens_P))
    opening_P = np.maximum.accumulate(np.where(single_P, 0, place_P))
    base_P = np.where(single_P, tokens_P[opening_P] + place_P - opening_P - 1, 0)
    rows = replace(
        rows,
        request_id_T=opening_P[pass_T],
        position_T=rows.position_T + base_P[pass_T],
        phase_T=np.where(single_P, DECODE, PREFILL).astype(np.uint8)[pass_T],
    )
    known = {"num_experts": meta.get("num_experts"), "top_k": meta.get("top_k"), "model": meta.get("model_id")}
    notes = ["requests are not named: a pass of several tokens is taken as a prompt, of one token as its continuation"]
    return finish_tokens(rows, _filled(options, known), notes=notes)


def _filled(options: ImportOptions, known: dict[str, Any]) -> ImportOptions:
    """Return the options, with what the file says where the caller said nothing."""
    said = {name: value for name, value in known.items() if value is not None}
    return cast("ImportOptions", {**said, **options})


def _joined(records: Sequence[dict[str, Any]], token: str, ids: str, weights: str) -> Rows:
    """Join the layers of each token; a stretch (a request, a pass: its step here) ends where tokens start again."""
    layer_N = as_ints([record["layer"] for record in records], "layer", 1)
    token_N = as_ints([record[token] for record in records], token, 1)
    stretch_N = np.empty_like(token_N)
    for layer in np.unique(layer_N):
        token_M = token_N[layer_N == layer]
        # A pass starts at 0; a request may start behind a cached prefix.
        opens_M = token_M == 0 if token == "token_idx" else np.diff(token_M, prepend=token_M[:1]) <= 0
        stretch_N[layer_N == layer] = np.cumsum(opens_M) - 1
    order_N = np.lexsort((layer_N, token_N, stretch_N))
    key_N3 = np.stack([stretch_N, token_N, layer_N], axis=1)[order_N]
    twice_N = (np.diff(key_N3, axis=0) == 0).all(axis=1)
    if twice_N.any():
        _, number, layer = key_N3[int(np.argmax(twice_N))]
        raise TraceError(f"token {number} appears twice in layer {layer} of a pass; the log is damaged")
    place_T2, layers_T = np.unique(key_N3[:, :2], axis=0, return_counts=True)
    layers = np.unique(layer_N).tolist()
    lacking = int((layers_T < len(layers)).sum())
    if lacking or not len(place_T2):
        raise TraceError(
            f"{lacking} of {len(place_T2)} tokens lack some of layers {layers}; cut the log's unfinished end"
        )
    ordered = [records[place] for place in order_N.tolist()]
    ids_NK = as_ints([record[ids] for record in ordered], "expert ids", 2)
    gates = [record.get(weights) or [] for record in ordered]
    shape = (len(place_T2), len(layers), -1)
    prompt_T = np.array([record.get("phase") == "prompt" for record in ordered[:: len(layers)]])
    return Rows(
        request_id_T=place_T2[:, 0],
        position_T=place_T2[:, 1],
        phase_T=np.where(prompt_T, PREFILL, DECODE).astype(np.uint8),
        step_T=place_T2[:, 0],
        expert_ids_TLK=ids_NK.reshape(shape),
        gates_TLK=as_floats(gates, "the routing weights").reshape(shape) if all(gates) else None,
    )
