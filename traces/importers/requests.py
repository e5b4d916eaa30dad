"""Expert ids of whole requests: SGLang's and vLLM's responses, saved arrays, request archives.

Shape letters: T tokens, L layers, K top-k.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..check import TraceError
from ..schema import Ints
from .content import Content, as_dict, as_ints, as_list, decode_ids, only
from .result import DECODE, PREFILL, Imported, ImportOptions, Rows, finish_tokens, stack_rows

UNPARTED = "the prompt is not parted from the output: every row is taken as decode; pass prompt_len"


def responses(contents: Sequence[Content], options: ImportOptions) -> Imported:
    """Import `routed_experts` of saved responses: base64 of int32 (SGLang), base64 of an .npy or lists (vLLM)."""
    outputs = [output for content in contents for record in content.records for output in _outputs(record)]
    if not outputs:
        raise TraceError("no response in it has routed_experts; ask the server to return them")
    parted = "prompt_len" in options or all("prompt_tokens" in meta for _, meta in outputs)
    rows = _one_by_one(_response(value, meta, options) for value, meta in outputs)
    return finish_tokens(rows, options, notes=[] if parted else [UNPARTED])


def _one_by_one(requests: Iterator[tuple[Ints, int, int]]) -> Rows:
    """Return the rows of requests served alone, each given by its ids, the length of its prompt and first position.

    A prompt is one step, each later token a step.
    """
    pieces: list[Rows] = []
    step = 0
    for number, (ids_TLK, prompt_len, first) in enumerate(requests):
        place_T = np.arange(len(ids_TLK))
        prompt = max(0, min(prompt_len - first, len(ids_TLK)))
        piece = Rows(
            request_id_T=np.full(len(ids_TLK), number),
            position_T=first + place_T,
            phase_T=np.where(place_T < prompt, PREFILL, DECODE).astype(np.uint8),
            step_T=step + np.maximum(0, place_T - max(prompt - 1, 0)),
            expert_ids_TLK=ids_TLK,
        )
        pieces.append(piece)
        step = int(piece.step_T.max(initial=step - 1)) + 1
    return stack_rows(pieces)


def _outputs(record: dict[str, Any]) -> Iterator[tuple[object, dict[str, Any]]]:
    """Yield each output's `routed_experts` with what the response says of its tokens."""
    usage = as_dict(record.get("usage") or {})
    choices = [as_dict(choice) for choice in as_list(record.get("choices") or record.get("outputs") or [])]
    for holder in (record, as_dict(record.get("meta_info") or {}), *choices):
        for meta in (holder, as_dict(holder.get("sgl_ext") or {})):
            if meta.get("routed_experts") is not None:
                # What several choices generated is one sum in `usage`: only a single choice's length is known.
                lone = usage if len(choices) < 2 else {key: usage[key] for key in usage if key == "prompt_tokens"}
                shared = {"prompt_routed_experts": record.get("prompt_routed_experts")}
                yield meta["routed_experts"], {**shared, **lone, **holder, **meta}


def _response(value: object, meta: dict[str, Any], options: ImportOptions) -> tuple[Ints, int, int]:
    start = int(meta.get("routed_experts_start_len", meta.get("routed_experts_prompt_start", 0)))
    dtype = str(meta.get("routed_experts_dtype", "int32"))
    ids = decode_ids(value, dtype)
    if ids.ndim == 1:
        ids = ids.reshape(-1, *_layers_and_width(ids.size, meta, start, options))
    if meta.get("prompt_routed_experts") is not None:
        prompt = decode_ids(meta["prompt_routed_experts"], dtype)
        return np.concatenate([prompt, ids]), len(prompt) + start, start
    return ids, options.get("prompt_len", int(meta.get("prompt_tokens", 0))), start


def _layers_and_width(size: int, meta: dict[str, Any], start: int, options: ImportOptions) -> tuple[int, int]:
    """Return layers and top-k of a flat record: one row per token but the last, from `start`."""
    top_k = options.get("top_k")
    if top_k is None:
        raise TraceError("base64 of raw ids says neither layers nor top-k; pass top_k, and num_layers if asked")
    if "num_layers" in options:
        return options["num_layers"], top_k
    if "prompt_tokens" not in meta or "completion_tokens" not in meta:
        raise TraceError("the response does not count its tokens; pass num_layers beside top_k")
    rows = int(meta["prompt_tokens"]) + int(meta["completion_tokens"]) - 1 - start
    if rows < 1 or size % (rows * top_k):
        raise TraceError(f"{size} ids are no whole number of layers for {rows} tokens of top-{top_k}; check top_k")
    return size // (rows * top_k), top_k


def arrays(contents: Sequence[Content], options: ImportOptions) -> Imported:
    """Import `routed_experts` [T, L, K] saved as .npy, or as .npz with the ids of prompt and output tokens."""
    requests: list[tuple[Ints, int, int]] = []
    for content in contents:
        named = as_dict(content.value) if content.kind == "npz" else as_dict({"routed_experts": content.value})
        ids_TLK = as_ints(named["routed_experts"], "routed_experts", 3)
        prompt_len = options.get("prompt_len", np.size(named.get("prompt_token_ids", ())))
        tokens = prompt_len + np.size(named.get("output_token_ids", ()))
        if "output_token_ids" in named and len(ids_TLK) not in (tokens, tokens - 1):
            raise TraceError(
                f"{content.path} has ids of {len(ids_TLK)} tokens and a request of {tokens}; save both whole"
            )
        requests.append((ids_TLK, prompt_len, 0))
    notes = [] if all(prompt_len for _, prompt_len, _ in requests) else [UNPARTED]
    return finish_tokens(_one_by_one(iter(requests)), options, notes=notes)


def request_archive(contents: Sequence[Content], options: ImportOptions) -> Imported:
    """Import `experts` [T, L, K] of decode tokens with `request_offsets`, `prompt_len` and a JSON `meta`."""
    named = as_dict(only(contents, "several archives would mix request numbers").value)
    ids_TLK = as_ints(named["experts"], "experts", 3)
    offsets = as_ints(named["request_offsets"], "request_offsets", 1)
    first_R, size_R = as_ints(named["prompt_len"], "prompt_len", 1), np.diff(offsets)
    if len(first_R) != len(size_R) or offsets[0] or offsets[-1] != len(ids_TLK) or size_R.min(initial=0) < 0:
        raise TraceError(
            f"request_offsets do not part {len(ids_TLK)} tokens into {len(first_R)} requests; check the file"
        )
    ids_of_request = np.split(ids_TLK, offsets[1:-1])
    rows = _one_by_one((ids, 0, first) for ids, first in zip(ids_of_request, first_R.tolist(), strict=True))
    domains: tuple[str, ...] = ()
    if "meta" in named:
        meta = as_list(json.loads(np.asarray(named["meta"], np.uint8).tobytes()))
        names, domain_R = np.unique([str(as_dict(item)["category"]) for item in meta], return_inverse=True)
        rows = replace(rows, domain_T=domain_R.astype(np.int16)[rows.request_id_T])
        domains = tuple(names.tolist())
    notes = ["decode tokens alone, one request at a time: compose batches before simulating"]
    return finish_tokens(rows, options, notes=notes, domains=domains)
