"""From names on the command line to objects: traces, segments, models, policies. Reads files, simulates nothing."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..policies.contract import Policy
from ..traces.schema import MoeSpec, StepSource, nearest
from ..traces.trace import RoutingTrace, concat
from .ranking import REFERENCE
from .runs import sha256_of

BUNDLED = "bundled"
DEFAULT_TRACE = "ours-moe-32e4k"
REBATCH_TOKENS = 100_000
"""Tokens of a trace held in memory to batch its requests anew; a longer trace gives its first ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A trace as given: its steps, and what to say about it."""

    source: StepSource
    name: str
    path: Path
    sha256: str
    segment: str | None = None
    notes: tuple[str, ...] = ()
    bundled: bool = False

    def plain(self) -> dict[str, Any]:
        shape = {name: getattr(self.source, name) for name in ("num_steps", "num_layers", "num_experts", "top_k")}
        # The bundled trace is named by its checksum; where it is installed says nothing to others.
        path = str(self.path) if not self.bundled else None
        facts = {"name": self.name, "path": path, "sha256": self.sha256, "segment": self.segment, **shape}
        origin = {name: getattr(self.source.provenance, name) for name in ("source", "model", "device")}
        return {**facts, **origin, "notes": list(self.notes)}


def library_paths() -> dict[str, Path]:
    """Return the traces that ship with the package by name."""
    folder = Path(str(files("expertslice.traces") / "bundled"))
    return {path.stem: path for path in sorted(folder.glob("*.parquet"))}


def library() -> list[dict[str, Any]]:
    """Return what the traces that ship with the package are."""
    found: list[dict[str, Any]] = []
    for name, path in library_paths().items():
        source = open_source(name).source
        row = {"trace": name, "model": source.provenance.model, "shape": _shape_of(source), "steps": source.num_steps}
        row |= {"tokens": getattr(source, "num_tokens", None), "device": source.provenance.device}
        found.append({**row, "MB": round(path.stat().st_size / 1e6, 1), "notes": source.provenance.notes})
    return found


def bundled_path() -> Path:
    """Return the trace that is meant when none is given.

    Raises:
        ValueError: this installation has none.
    """
    found = library_paths()
    if not found:
        raise ValueError("this installation holds no bundled trace; give a trace file instead")
    return found.get(DEFAULT_TRACE) or next(iter(found.values()))


def open_source(given: str) -> Opened:
    """Open a trace: our own files stream, other formats are imported into memory.

    Raises:
        ValueError: nothing is there, or it cannot be read.
    """
    from ..traces.importers import import_trace
    from ..traces.store import open_trace

    named = library_paths() if "/" not in given else {}
    bundled = given == BUNDLED or given in named
    path = bundled_path() if given == BUNDLED else named.get(given, Path(given))
    if not path.exists() and not path.with_name(path.name + ".parts").exists():
        raise ValueError(f"trace {given} does not exist; give a trace file, or '{BUNDLED}' for the one that ships")
    imported = None if _is_ours(path) else import_trace(path)
    source = imported.trace if imported else open_trace(path)
    partial = [note for note in source.provenance.notes.split("; ") if note.startswith("partial")]
    return Opened(
        source=source,
        name=f"{path.stem} (bundled)" if bundled else path.name,
        path=path,
        sha256=_checksum(path),
        notes=(f"imported from {imported.format}", *imported.notes) if imported else tuple(partial),
        bundled=bundled,
    )


def _is_ours(path: Path) -> bool:
    """Return whether our store reads it: a Parquet file, or the parts of a recording that was not closed."""
    if not path.is_file():
        return path.suffix == ".parts" or not path.exists()
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _checksum(path: Path) -> str:
    if path.is_file():
        return sha256_of(path)
    folder = path if path.is_dir() else path.with_name(path.name + ".parts")
    parts = sorted(p for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256("".join(map(sha256_of, parts)).encode()).hexdigest()


def in_memory(source: StepSource, most_tokens: int = REBATCH_TOKENS) -> RoutingTrace | None:
    """Return a token trace, or its first tokens, in memory; None for counts alone."""
    if isinstance(source, RoutingTrace):
        return source
    if not hasattr(source, "blocks") or not hasattr(source, "num_tokens"):
        return None
    kept: list[RoutingTrace] = []
    for block in source.blocks():
        kept.append(block)
        if sum(b.num_tokens for b in kept) >= most_tokens:
            break
    return concat(kept) if kept else None


def choose_segment(opened: Opened, segment: str | None) -> Opened:
    """Narrow a trace to one segment: the one asked for, else the last of several.

    Raises:
        ValueError: there is no such segment.
    """
    known: Sequence[str] = getattr(opened.source, "segments", ())
    if (segment == "all" and "all" not in known) or (segment is None and len(known) < 2):
        return opened
    if not known:
        raise ValueError(f"{opened.name} has no segments; leave --segment out")
    chosen = segment or known[-1]
    if chosen not in known:
        raise ValueError(nearest("segment", chosen, known))
    note = () if segment else (f"segment {chosen!r} of {', '.join(known)}; --segment all takes all of them",)
    return replace(opened, source=opened.source.select(segment=chosen), segment=chosen, notes=(*opened.notes, *note))


def choose_model(opened: Opened, given: str | None) -> tuple[MoeSpec, tuple[str, ...]]:
    """Return the model whose layers are simulated, cut to the trace's layers, and what to say about it.

    That is the one given, else that of the config that a recorder left beside the trace, else the one the trace names.

    Raises:
        ValueError: the model is unknown, does not fit the trace, or the trace does not name one that is known.
    """
    from ..traces.models import CONFIG_SUFFIX, load_model, model_names

    source, beside = opened.source, opened.path.with_suffix(CONFIG_SUFFIX)
    if given is None and beside.is_file():
        model, said = _cut(source, replace(load_model(str(beside)), name=source.provenance.model or beside.stem))
        return model, (f"the model is that of {beside.name}", *said)
    named = given or source.provenance.model
    if given or named in model_names():
        return _cut(source, load_model(named))
    shape = (source.num_layers, source.num_experts, source.top_k)
    alike = [m for m in map(load_model, model_names()) if (m.num_layers, m.num_experts, m.top_k) == shape]
    if len(alike) == 1:
        return alike[0], (f"the trace names no known model; {alike[0].name} has its shape and is assumed",)
    raise ValueError(
        f"the trace ({_shape_of(source)}) names {'the unknown model ' + repr(named) if named else 'no model'}; "
        "add --model with a name from `expertslice models` or a Hugging Face config.json"
    )


def _shape_of(shape: StepSource | MoeSpec) -> str:
    return f"{shape.num_layers} layers, {shape.num_experts} experts, top-{shape.top_k}"


def _cut(source: StepSource, model: MoeSpec) -> tuple[MoeSpec, tuple[str, ...]]:
    """Return the model cut to the layers that the source has, and what to say about it."""
    if (model.num_experts, model.top_k) != (source.num_experts, source.top_k) or model.num_layers < source.num_layers:
        raise ValueError(
            f"model {model.name} has {_shape_of(model)}, and the trace {_shape_of(source)}; leave the trace out and "
            "add --fit-routing with it to synthesise routing for that model"
        )
    cut = replace(model, num_layers=source.num_layers)
    if cut == model:
        return cut, ()
    return cut, (
        f"the trace has {cut.num_layers} of the {model.num_layers} layers of {model.name}; these are simulated",
    )


def choose_policies(names: Sequence[str], settings: Sequence[str]) -> dict[str, Policy[Any]]:
    """Return the policies to compare by name, unsliced always first; settings are like "hot_cold.min_gain=0.02".

    Raises:
        ValueError: a name is unknown, a setting has another form or a wrong parameter, or its policy is not compared.
    """
    from ..policies.registry import POLICIES, make_policy

    wanted = list(dict.fromkeys([REFERENCE, *(names or POLICIES)]))
    params: dict[str, dict[str, str]] = {name: {} for name in wanted}
    for text in settings:
        left, equals, value = text.partition("=")
        policy, dot, parameter = left.rpartition(".")
        if not (equals and dot and policy and parameter):
            raise ValueError(f"--set {text!r} is not policy.name=value; write for example hot_cold.min_gain=0.02")
        if policy not in params:
            raise ValueError(f"{nearest('policy', policy, wanted)}; --set needs a policy that is compared")
        params[policy][parameter] = value
    return {name: make_policy(name, params[name]) for name in wanted}
