"""The table of formats: how each is recognised by what a file holds, and which importer reads it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import numpy as np

from ..check import TraceError, reading
from ..trace import ExpertLoad, RoutingTrace
from . import counts, lines, logits, requests, sglang
from .content import Content, open_content
from .result import Imported, ImportOptions


@dataclass(frozen=True, slots=True)
class Format:
    """A format: what it is, how to tell it, how to import it.

    `build` takes all the files of a recording; of what holds no trace it is the sentence that says so.
    """

    about: str
    matches: Callable[[Content], bool]
    build: Callable[[Sequence[Content], ImportOptions], Imported] | str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportResult:
    """A trace, which format it came in, and what was dropped or assumed, a sentence each."""

    trace: RoutingTrace | ExpertLoad
    format: str
    notes: tuple[str, ...]


def _first_record(content: Content) -> dict[str, object]:
    pack = content.value.get("records") if isinstance(content.value, dict) else None
    return pack[0] if isinstance(pack, list) and pack and isinstance(pack[0], dict) else {}


def _is_recording(content: Content, *, per_token: bool) -> bool:
    recorded = content.kind == "torch" and {"records", "last_physical_to_logical_map"} <= content.keys
    return recorded and ("topk_ids_of_layer" in _first_record(content)) == per_token


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


def _starts_with(content: Content, field: str, *values: str) -> bool:
    records = content.records
    return bool(records) and records[0].get(field) in values


def _is_response(content: Content) -> bool:
    marks = {"meta_info", "choices", "outputs", "routed_experts", "sgl_ext"}
    return any(marks & record.keys() for record in content.records)


FORMATS: dict[str, Format] = {
    "sglang-per-token": Format(
        "SGLang's expert recorder, mode per_token: a file or a folder of one for each rank",
        lambda c: _is_recording(c, per_token=True),
        sglang.sglang_per_token,
    ),
    "sglang-per-pass": Format(
        "SGLang's expert recorder, mode per_pass: a file or a folder of one for each rank",
        lambda c: _is_recording(c, per_token=False),
        sglang.sglang_per_pass,
    ),
    "sglang-stat": Format(
        "SGLang's expert recorder, modes stat and stat_approx, or the logical_count of an expert location",
        lambda c: c.kind in ("torch", "json") and "logical_count" in c.keys,
        counts.sglang_stat,
    ),
    "responses": Format("JSON responses of SGLang or vLLM with routed_experts", _is_response, requests.responses),
    "arrays": Format(
        "routed_experts of a request as .npy, or as .npz with its token ids",
        lambda c: _is_array(c, "iu") or (c.kind == "npz" and "routed_experts" in c.keys),
        requests.arrays,
    ),
    "request-archive": Format(
        "an .npz of decode tokens with request_offsets and prompt_len",
        lambda c: c.kind == "npz" and {"experts", "request_offsets", "prompt_len"} <= c.keys,
        requests.request_archive,
    ),
    "router-logits": Format(
        "router_logits of Hugging Face transformers, saved by torch or numpy", _is_logits, logits.router_logits
    ),
    "moe-cache-lab": Format(
        "moe-cache-lab's routing JSON lines, version 1",
        lambda c: _starts_with(c, "format", lines.CACHE_LAB),
        lines.cache_lab,
    ),
    "vllm-log": Format(
        "JSON lines of vLLM routing loggers", lambda c: _starts_with(c, "type", "meta", "route"), lines.vllm_log
    ),
    "moe-infinity": Format(
        "MoE-Infinity's array of counts per sequence", lambda c: _is_array(c, "f"), counts.moe_infinity
    ),
    "count-archive": Format(
        "an .npz of MODEL__expert_counts__DOMAIN arrays",
        lambda c: c.kind == "npz" and any(map(counts.ARCHIVE_KEY.fullmatch, c.keys)),
        counts.count_archive,
    ),
    "expert-placement": Format(
        "an expert placement of SGLang or DeepSeek's EPLB (no trace)",
        _is_placement,
        "an expert placement (which physical slot holds which expert): nobody's routing is in it; record with SGLang",
    ),
    "eplb-log": Format(
        "a log of vLLM's EPLB (no trace)",
        lambda c: c.kind == "text" and "EPLB step: avg_tokens=" in str(c.value),
        "a log of vLLM's EPLB, a series of balance figures without experts; return routed experts or log routes "
        "instead",
    ),
    "imatrix": Format(
        "llama.cpp's importance matrix (no trace)",
        lambda c: c.kind == "gguf",
        "a GGUF file: an importance matrix counts experts without order, a model has none; record routing instead",
    ),
    "parquet": Format(
        "a trace of our own (nothing to import)",
        lambda c: c.kind == "parquet",
        "a Parquet file already; open it with open_trace",
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
        format = format or _detected(contents)
        known = FORMATS[format]
        for content in contents:
            if not known.matches(content):
                raise TraceError(f"{content.path} is not {known.about}; leave the format out to have it told")
        if isinstance(known.build, str):
            raise TraceError(f"{contents[0].path} is {known.build}")
        trace, notes = known.build(contents, options)
    provenance = replace(trace.provenance, source=f"imported from {Path(path).name} ({format})")
    return ImportResult(trace=replace(trace, provenance=provenance), format=format, notes=tuple(notes))


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
