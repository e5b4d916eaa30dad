"""The table of formats: how each is recognised by what a file holds, and which importer reads it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import numpy as np

from ..check import TraceError, reading
from . import counts, lines, logits, refused, requests, sglang
from .content import Content, open_content
from .result import ImportOptions, ImportResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format: what it is, how to tell it, how to import it. Importers take all the files of a recording."""

    about: str
    matches: Callable[[Content], bool]
    build: Callable[[Sequence[Content], ImportOptions], ImportResult]


def _first_record(content: Content) -> dict[str, object]:
    records = content.value if content.kind == "torch" and isinstance(content.value, dict) else None
    pack = records.get("records") if isinstance(records, dict) else None
    return pack[0] if isinstance(pack, list) and pack and isinstance(pack[0], dict) else {}


def _is_recording(content: Content) -> bool:
    return content.kind == "torch" and {"records", "last_physical_to_logical_map"} <= content.keys


def _is_array(content: Content, kinds: str) -> bool:
    value = content.value
    return content.kind == "npy" and isinstance(value, np.ndarray) and value.ndim == 3 and value.dtype.kind in kinds


def _is_logits(content: Content) -> bool:
    value = content.value
    if content.kind in ("torch", "npz") and "router_logits" in content.keys:
        return True
    layers = [layer for layer in value if layer is not None] if isinstance(value, list | tuple) else []
    first = layers[0] if layers else None
    first = first[0] if isinstance(first, tuple) and first else first
    return content.kind == "torch" and isinstance(first, np.ndarray) and first.dtype.kind == "f"


def _is_placement(content: Content) -> bool:
    named = bool({"physical_to_logical_map", "phy2log", "log2phy", "logcnt"} & content.keys)
    maps = content.value if content.kind == "torch" and isinstance(content.value, tuple) else ()
    return named or [m.ndim for m in maps if isinstance(m, np.ndarray)] == [2, 3, 2]


def _has_record(content: Content, field: str, value: object) -> bool:
    records = content.records
    return bool(records) and records[0].get(field) == value


def _is_response(content: Content) -> bool:
    marks = {"meta_info", "choices", "outputs", "routed_experts", "sgl_ext"}
    return any(marks & record.keys() for record in content.records)


FORMATS: dict[str, Format] = {
    "sglang-per-token": Format(
        about="SGLang's expert recorder, mode per_token: a file or a folder of one for each rank",
        matches=lambda c: _is_recording(c) and "topk_ids_of_layer" in _first_record(c),
        build=sglang.sglang_per_token,
    ),
    "sglang-per-pass": Format(
        about="SGLang's expert recorder, mode per_pass: a file or a folder of one for each rank",
        matches=lambda c: _is_recording(c) and "topk_ids_of_layer" not in _first_record(c),
        build=counts.sglang_per_pass,
    ),
    "sglang-stat": Format(
        about="SGLang's expert recorder, modes stat and stat_approx, or the logical_count of an expert location",
        matches=lambda c: c.kind in ("torch", "json") and "logical_count" in c.keys,
        build=counts.sglang_stat,
    ),
    "sglang-csv": Format(
        about="SGLang's CSV of before May 2025",
        matches=lambda c: c.kind == "text" and str(c.value).startswith(counts.CSV_HEADER),
        build=counts.sglang_csv,
    ),
    "responses": Format(
        about="JSON responses of SGLang or vLLM with routed_experts",
        matches=_is_response,
        build=requests.responses,
    ),
    "arrays": Format(
        about="routed_experts of a request as .npy, or as .npz with its token ids",
        matches=lambda c: _is_array(c, "iu") or (c.kind == "npz" and "routed_experts" in c.keys),
        build=requests.arrays,
    ),
    "request-archive": Format(
        about="an .npz of decode tokens with request_offsets and prompt_len",
        matches=lambda c: c.kind == "npz" and {"experts", "request_offsets", "prompt_len"} <= c.keys,
        build=requests.request_archive,
    ),
    "router-logits": Format(
        about="router_logits of Hugging Face transformers, saved by torch or numpy",
        matches=_is_logits,
        build=logits.router_logits,
    ),
    "moe-cache-lab": Format(
        about="moe-cache-lab's routing JSON lines, version 1",
        matches=lambda c: _has_record(c, "format", lines.CACHE_LAB),
        build=lines.cache_lab,
    ),
    "vllm-log": Format(
        about="JSON lines of vLLM routing loggers",
        matches=lambda c: _has_record(c, "type", "meta") or _has_record(c, "type", "route"),
        build=lines.vllm_log,
    ),
    "megatron-tokens": Format(
        about="Megatron's tokens_per_expert of a rank",
        matches=lambda c: bool(c.records) and {"iter", "block", "layer", "tpe"} <= c.records[0].keys(),
        build=counts.megatron,
    ),
    "moe-infinity": Format(
        about="MoE-Infinity's array of counts per sequence",
        matches=lambda c: _is_array(c, "f"),
        build=counts.moe_infinity,
    ),
    "count-archive": Format(
        about="an .npz of MODEL__expert_counts__DOMAIN arrays",
        matches=lambda c: c.kind == "npz" and any(map(counts.ARCHIVE_KEY.fullmatch, c.keys)),
        build=counts.count_archive,
    ),
    "expert-placement": Format(
        about="an expert placement of SGLang or DeepSeek's EPLB (no trace)",
        matches=_is_placement,
        build=refused.refuse(refused.PLACEMENT),
    ),
    "eplb-log": Format(
        about="a log of vLLM's EPLB (no trace)",
        matches=lambda c: c.kind == "text" and "EPLB step: avg_tokens=" in str(c.value),
        build=refused.refuse(refused.BALANCE),
    ),
    "imatrix": Format(
        about="llama.cpp's importance matrix (no trace)",
        matches=lambda c: c.kind == "gguf",
        build=refused.refuse(refused.IMATRIX),
    ),
    "parquet": Format(
        about="a trace of our own (nothing to import)",
        matches=lambda c: c.kind == "parquet",
        build=refused.refuse(refused.TRACE),
    ),
}


def import_trace(path: str | Path, *, format: str | None = None, **options: Unpack[ImportOptions]) -> ImportResult:
    """Import routing records of another tool.

    Args:
        path: A file, or a folder with the files of one recording (ranks, requests).
        format: A name in `FORMATS`; None: told from the content.
        options: What the file leaves unsaid, see `ImportOptions`.

    Raises:
        TraceError: The file is damaged, of no known format, or lacks something that an option must give.
    """
    if format is not None and format not in FORMATS:
        raise TraceError(f"format {format!r} is unknown; allowed are {', '.join(FORMATS)}")
    contents = _contents(Path(path))
    with reading(Path(path)):
        known = FORMATS[format or _detected(contents)]
        for content in contents:
            if not known.matches(content):
                raise TraceError(f"{content.path} is not {known.about}; leave the format out to have it told")
        result = known.build(contents, options)
    provenance = replace(result.trace.provenance, source=f"imported from {Path(path).name} ({result.format})")
    return replace(result, trace=replace(result.trace, provenance=provenance))


def detect(path: str | Path) -> str:
    """Return the name of a file's format, told from its content."""
    contents = _contents(Path(path))
    with reading(Path(path)):
        return _detected(contents)


def _contents(path: Path) -> list[Content]:
    files = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith(".")) if path.is_dir() else [path]
    if not files:
        raise TraceError(f"{path} is an empty folder; give the recording's files")
    return [open_content(file) for file in files]


def _detected(contents: list[Content]) -> str:
    names = {next((name for name, known in FORMATS.items() if known.matches(content)), None) for content in contents}
    if None in names:
        raise TraceError(f"{contents[0].path} holds no routing records that are known here; see the table of formats")
    if len(names) > 1:
        raise TraceError(f"{contents[0].path.parent} mixes {', '.join(sorted(map(str, names)))}; import one at a time")
    return str(names.pop())
