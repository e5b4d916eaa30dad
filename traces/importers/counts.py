"""Counts per step and expert: SGLang's recorder, Megatron's logs, MoE-Infinity's traces, count archives.

Shape letters: S steps, L layers, E logical experts, P physical experts.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..check import TraceError
from .content import Content, as_dict, as_floats, as_ints, as_list
from .result import ImportOptions, ImportResult, finish_counts

CSV_HEADER = "layer_id,expert_id,count"
ARCHIVE_KEY = re.compile(r"(?P<model>.+)__expert_counts__(?P<domain>.+)")


def sglang_stat(contents: Sequence[Content], options: ImportOptions) -> ImportResult:
    """Import `logical_count` [S, L, E] of SGLang's modes stat and stat_approx, or of an initial expert location."""
    if len(contents) > 1:
        raise TraceError(f"{len(contents)} recordings are here, each of a run of its own; import one file at a time")
    value = as_dict(contents[0].value)["logical_count"]
    counts = as_ints(value, "logical_count", np.ndim(value) if np.ndim(value) == 2 else 3)
    counts_SLE = counts if counts.ndim == 3 else counts[None]
    used = np.flatnonzero(counts_SLE.any(axis=(1, 2)))
    notes: list[str] = []
    if len(used) < len(counts_SLE):
        notes.append(f"{len(counts_SLE) - len(used)} buffer rows without a count (unused or idle) dropped")
    elif len(used) > 1:
        notes.append("the ring buffer is full: if it wrapped, its first step is unknown and the order is rotated")
    return finish_counts(counts_SLE[used], options, format="sglang-stat", notes=notes)


def sglang_per_pass(contents: Sequence[Content], options: ImportOptions) -> ImportResult:
    """Import `global_physical_count` [L, P] of each forward pass, summed over ranks and over copies of an expert."""
    counts_of_pass: dict[int, NDArray[np.int64]] = {}
    seen: set[tuple[int, int]] = set()
    for content in contents:
        pack = as_dict(content.value)
        for record in map(as_dict, as_list(pack["records"])):
            name = (int(record["forward_pass_id"]), int(record["rank"]))
            if name in seen:
                raise TraceError(f"forward pass {name[0]} of rank {name[1]} is here twice; keep one recording's files")
            seen.add(name)
            counts_LP = as_ints(record["global_physical_count"], "global_physical_count", 2)
            counts_LE = to_logical_counts(counts_LP, physical_map(pack, options))
            counts_of_pass[name[0]] = counts_of_pass.get(name[0], 0) + counts_LE
    if not counts_of_pass:
        raise TraceError("it has no records; record while requests are served")
    notes = [f"{len(seen)} records of {len({rank for _, rank in seen})} ranks summed by forward pass"]
    counts_SLE = np.stack([counts for _, counts in sorted(counts_of_pass.items())])
    return finish_counts(counts_SLE, options, format="sglang-per-pass", notes=notes)


def physical_map(pack: dict[str, Any], options: ImportOptions) -> NDArray[np.int64]:
    """Return the logical expert of each physical one, [L, P]: the caller's, else the file's own."""
    given = options.get("physical_to_logical", pack.get("last_physical_to_logical_map"))
    map_LP = as_ints(given, "last_physical_to_logical_map", 2)
    if map_LP.min(initial=0) < 0:
        raise TraceError("last_physical_to_logical_map holds negative ids; pass physical_to_logical")
    return map_LP


def to_logical_counts(counts_LP: NDArray[np.int64], map_LP: NDArray[np.int64]) -> NDArray[np.int64]:
    """Add up the counts of all physical copies of each logical expert."""
    if counts_LP.shape != map_LP.shape:
        raise TraceError(
            f"counts of shape {counts_LP.shape} do not fit the expert map {map_LP.shape}; pass the right one"
        )
    counts_LE = np.zeros((len(map_LP), int(map_LP.max()) + 1), dtype=np.int64)
    np.add.at(counts_LE, (np.arange(len(map_LP))[:, None], map_LP), counts_LP)
    return counts_LE


def sglang_csv(contents: Sequence[Content], options: ImportOptions) -> ImportResult:
    """Import SGLang's CSV of before May 2025: total counts per layer and expert, one file per rank."""
    totals: defaultdict[tuple[int, int], int] = defaultdict(int)
    for content in contents:
        for row in csv.DictReader(str(content.value).splitlines()):
            totals[int(row["layer_id"]), int(row["expert_id"])] += int(row["count"])
    layers, experts = (max(place[axis] for place in totals) + 1 for axis in (0, 1))
    if min(map(min, totals)) < 0 or layers * experts > 1 << 24:
        raise TraceError(f"layer and expert ids reach {layers - 1} and {experts - 1}; the file is damaged")
    counts_1LE = np.zeros((1, layers, experts), dtype=np.int64)
    for (layer, expert), count in totals.items():
        counts_1LE[0, layer, expert] = count
    notes = ["counts over the whole recording: one step", f"{len(contents)} ranks summed"]
    return finish_counts(counts_1LE, options, format="sglang-csv", notes=notes)


def moe_infinity(contents: Sequence[Content], options: ImportOptions) -> ImportResult:
    """Import MoE-Infinity's counts [sequences, L, E], kept as floats; each sequence becomes a step."""
    counts_SLE = np.concatenate([as_floats(content.value, "the array") for content in contents])
    if (counts_SLE != np.rint(counts_SLE)).any() or np.abs(counts_SLE).max(initial=0) > 1 << 31:
        raise TraceError("its values are no whole counts; give the array that ExpertTracer saved")
    labels = tuple(f"sequence {number}" for number in range(len(counts_SLE)))
    return finish_counts(counts_SLE.astype(np.int64), options, format="moe-infinity", labels=labels)


def megatron(contents: Sequence[Content], options: ImportOptions) -> ImportResult:
    """Import Megatron's tokens per expert; each micro-batch of an iteration becomes a step."""
    if len(contents) > 1:
        raise TraceError("which experts a rank holds is not in these files; import one rank's file at a time")
    counts: dict[tuple[int, int, int], list[int]] = {}
    skipped = 0
    for record in contents[0].records:
        if record["block"] != "decoder":
            skipped += 1
            continue
        for batch, tokens_E in enumerate(as_list(record["tpe"])):
            counts[int(record["iter"]), batch, int(record["layer"])] = as_list(tokens_E)
    steps, layers = sorted({key[:2] for key in counts}), sorted({key[2] for key in counts})
    if len(steps) * len(layers) != len(counts) or not counts:
        raise TraceError("some iterations lack layers; remove the unfinished lines at the end of the file")
    rows = [counts[*step, layer] for step, layer in product(steps, layers)]
    counts_SLE = as_ints(rows, "tpe", 2).reshape(len(steps), len(layers), -1)
    notes = ["the local experts of one rank only"] + ([f"{skipped} records of other blocks dropped"] if skipped else [])
    labels = tuple(f"iteration {step} micro-batch {batch}" for step, batch in steps)
    return finish_counts(counts_SLE, options, format="megatron-tokens", notes=notes, labels=labels)


def count_archive(contents: Sequence[Content], options: ImportOptions) -> ImportResult:
    """Import an archive of arrays MODEL__expert_counts__DOMAIN [L, E]; each domain becomes a step."""
    arrays = {key: array for content in contents for key, array in as_dict(content.value).items()}
    matches = [match for match in map(ARCHIVE_KEY.fullmatch, arrays) if match]
    models = sorted({match["model"] for match in matches})
    member = options.get("member", models[0] if len(models) == 1 else None)
    if member not in models:
        raise TraceError(f"member is {member!r}; pass one of the models in the file: {', '.join(models)}")
    domains = {match["domain"]: match[0] for match in matches if match["model"] == member}
    counts_SLE = np.stack([as_ints(arrays[key], key, 2) for key in domains.values()])
    options = options.copy()
    first = arrays.get(f"{member}__expert_counts_top1__{next(iter(domains))}")
    if "top_k" not in options and first is not None and first.sum():
        options["top_k"] = int(counts_SLE[0].sum() // first.sum())
    if "model" not in options and member is not None:
        options["model"] = member
    return finish_counts(counts_SLE, options, format="count-archive", notes=["no order"], labels=tuple(domains))
