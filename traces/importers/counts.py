"""Counts per step and expert without ranks: SGLang's modes stat, MoE-Infinity's traces, count archives.

Shape letters: S steps, L layers, E logical experts.
"""

import re
from collections.abc import Sequence

import numpy as np

from ..check import TraceError
from .content import Content, as_dict, as_floats, as_ints, only
from .result import Imported, ImportOptions, finish_counts

ARCHIVE_KEY = re.compile(r"(?P<model>.+)__expert_counts__(?P<domain>.+)")


def sglang_stat(contents: Sequence[Content], options: ImportOptions) -> Imported:
    """Import `logical_count` [S, L, E] of SGLang's modes stat and stat_approx, or of an initial expert location."""
    value = as_dict(only(contents, "each recording is of a run of its own").value)["logical_count"]
    counts = as_ints(value, "logical_count", 2 if np.ndim(value) == 2 else 3)
    counts_SLE = counts if counts.ndim == 3 else counts[None]
    used = np.flatnonzero(counts_SLE.any(axis=(1, 2)))
    notes: list[str] = []
    if len(used) < len(counts_SLE):
        notes.append(f"{len(counts_SLE) - len(used)} buffer rows without a count (unused or idle) dropped")
    elif len(used) > 1:
        notes.append("the ring buffer is full: if it wrapped, its first step is unknown and the order is rotated")
    return finish_counts(counts_SLE[used], options, notes=notes)


def moe_infinity(contents: Sequence[Content], options: ImportOptions) -> Imported:
    """Import MoE-Infinity's counts [sequences, L, E], kept as floats; each sequence becomes a step."""
    counts_SLE = np.concatenate([as_floats(content.value, "the array") for content in contents])
    if (counts_SLE != np.rint(counts_SLE)).any() or np.abs(counts_SLE).max(initial=0) > 1 << 31:
        raise TraceError("its values are no whole counts; give the array that ExpertTracer saved")
    labels = tuple(f"sequence {number}" for number in range(len(counts_SLE)))
    return finish_counts(counts_SLE.astype(np.int64), options, labels=labels)


def count_archive(contents: Sequence[Content], options: ImportOptions) -> Imported:
    """Import an archive of arrays MODEL__expert_counts__DOMAIN [L, E]; each domain becomes a step."""
    arrays = {key: array for content in contents for key, array in as_dict(content.value).items()}
    matches = [match for match in map(ARCHIVE_KEY.fullmatch, arrays) if match]
    models = sorted({match["model"] for match in matches})
    member = options.get("member", models[0] if len(models) == 1 else None)
    if member is None or member not in models:
        raise TraceError(f"member is {member!r}; pass one of the models in the file: {', '.join(models)}")
    domains = {match["domain"]: match[0] for match in matches if match["model"] == member}
    counts_SLE = np.stack([as_ints(arrays[key], key, 2) for key in domains.values()])
    said: ImportOptions = {"model": member}
    first = arrays.get(f"{member}__expert_counts_top1__{next(iter(domains))}")
    if first is not None and first.sum():
        said["top_k"] = int(counts_SLE[0].sum() // first.sum())
    said |= options
    return finish_counts(counts_SLE, said, notes=["no order"], labels=tuple(domains))
