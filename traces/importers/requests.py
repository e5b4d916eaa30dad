"""Expert ids of whole requests: SGLang's and vLLM's responses, saved arrays, request archives.

Shape letters: T tokens, L layers, K top-k.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..check import TraceError
from ..trace import UNKNOWN
from .content import Content, as_dict, as_ints, as_list, decode_ids
from .result import ImportOptions, ImportResult, Rows, finish_tokens, request_rows, stack_rows

UNPARTED = "the prompt is not parted from the output: every row is taken as decode; pass prompt_len"


def responses(contents: Sequence[Content], options: ImportOptions) -> ImportResult:
    """Import `routed_experts` of saved responses: base64 of int32 (SGLang), base64 of an .npy or lists (vLLM)."""
    pieces: list[Rows] = []
    notes: list[str] = []
    for content in contents:
        for record in content.records:
            for value, meta in _outputs(record):
                pieces.append(_response_rows(value, meta, len(pieces), _next_step(pieces), options))
                if "prompt_tokens" not in meta and "prompt_len" not in options:
                    notes = [UNPARTED]
    if not pieces:
        raise TraceError("no response in it has routed_experts; ask the server to return them")
    return finish_tokens(stack_rows(pieces), options, format="responses", notes=notes)


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


def _response_rows(
    value: object, meta: dict[str, Any], request_id: int, first_step: int, options: ImportOptions
) -> Rows:
    start = int(meta.get("routed_experts_start_len", meta.get("routed_experts_prompt_start", 0)))
    dtype = str(meta.get("routed_experts_dtype", "int32"))
    ids = decode_ids(value, dtype)
    if ids.ndim == 1:
        ids = ids.reshape(-1, *_layers_and_width(ids.size, meta, start, options))
    prompt_len = options.get("prompt_len", int(meta.get("prompt_tokens", 0)))
    if meta.get("prompt_routed_experts") is not None:
        prompt = decode_ids(meta["prompt_routed_experts"], dtype)
        ids, prompt_len = np.concatenate([prompt, ids]), len(prompt) + start
    return request_rows(ids, request_id=request_id, prompt_len=prompt_len, first_step=first_step, first_position=start)


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


def arrays(contents: Sequence[Content], options: ImportOptions) -> ImportResult:
    """Import `routed_experts` [T, L, K] saved as .npy, or as .npz with the ids of prompt and output tokens."""
    pieces: list[Rows] = []
    notes: list[str] = []
    for content in contents:
        named = as_dict(content.value) if content.kind == "npz" else as_dict({"routed_experts": content.value})
        ids_TLK = as_ints(named["routed_experts"], "routed_experts", 3)
        prompt_len = options.get("prompt_len", np.size(named.get("prompt_token_ids", ())))
        tokens = prompt_len + np.size(named.get("output_token_ids", ()))
        if "output_token_ids" in named and len(ids_TLK) not in (tokens, tokens - 1):
            raise TraceError(
                f"{content.path} has ids of {len(ids_TLK)} tokens and a request of {tokens}; save both whole"
            )
        if not prompt_len:
            notes = [UNPARTED]
        step = _next_step(pieces)
        pieces.append(request_rows(ids_TLK, request_id=len(pieces), prompt_len=prompt_len, first_step=step))
    return finish_tokens(stack_rows(pieces), options, format="arrays", notes=notes)


def request_archive(contents: Sequence[Content], options: ImportOptions) -> ImportResult:
    """Import `experts` [T, L, K] of decode tokens with `request_offsets`, `prompt_len` and a JSON `meta`."""
    if len(contents) > 1:
        raise TraceError("several archives would mix request numbers; import one file at a time")
    named = as_dict(contents[0].value)
    ids_TLK = as_ints(named["experts"], "experts", 3)
    offsets, first = (
        as_ints(named["request_offsets"], "request_offsets", 1),
        as_ints(named["prompt_len"], "prompt_len", 1),
    )
    sizes = np.diff(offsets)
    if len(first) != len(sizes) or offsets[0] or offsets[-1] != len(ids_TLK) or sizes.min(initial=0) < 0:
        raise TraceError(
            f"request_offsets do not part {len(ids_TLK)} tokens into {len(first)} requests; check the file"
        )
    request_T = np.repeat(np.arange(len(sizes)), sizes)
    domain_T, domains = _domains(named, request_T)
    tokens = len(ids_TLK)
    rows = Rows(
        request_id_T=request_T,
        position_T=np.arange(tokens) - offsets[request_T] + first[request_T],
        phase_T=np.ones(tokens, np.uint8),
        step_T=np.arange(tokens),
        expert_ids_TLK=ids_TLK,
        domain_T=domain_T,
    )
    notes = ["decode tokens alone, one request at a time: compose batches before simulating"]
    return finish_tokens(rows, options, format="request-archive", notes=notes, domains=domains)


def _domains(named: dict[str, Any], request_T: NDArray[np.int64]) -> tuple[NDArray[np.int16], tuple[str, ...]]:
    if "meta" not in named:
        return np.full(len(request_T), UNKNOWN, np.int16), ()
    meta = [as_dict(item) for item in as_list(json.loads(np.asarray(named["meta"], np.uint8).tobytes()))]
    labels = [str(item["category"]) for item in meta]
    domains = tuple(sorted(set(labels)))
    return np.array([domains.index(label) for label in labels], np.int16)[request_T], domains


def _next_step(pieces: Sequence[Rows]) -> int:
    return int(pieces[-1].step_T[-1]) + 1 if pieces and len(pieces[-1].step_T) else len(pieces)
