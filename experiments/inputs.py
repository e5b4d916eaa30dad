"""From names on the command line to objects: traces, segments, models, policies. Reads files, simulates nothing."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..policies.contract import Policy
from ..policies.data import nearest
from ..traces.schema import MoeSpec, StepSource
from ..traces.trace import RoutingTrace
from .runs import sha256_of
from .workload import match_model, shape_of

BUNDLED = "bundled"
REBATCH_TOKENS = 100_000
"""Tokens of a trace held in memory to batch its requests anew; a longer trace gives its first ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A trace as given: its steps, and what to say about it."""

    source: StepSource
    name: str
    path: Path | None
    sha256: str
    segment: str | None = None
    notes: tuple[str, ...] = field(default=())
    bundled: bool = False

    def plain(self) -> dict[str, Any]:
        """Return it for a manifest."""
        origin = self.source.provenance
        return {
            "name": self.name,
            # The bundled trace is named by its checksum; where it is installed says nothing to others.
            "path": str(self.path) if self.path and not self.bundled else None,
            "sha256": self.sha256,
            "segment": self.segment,
            "num_steps": self.source.num_steps,
            "num_layers": self.source.num_layers,
            "num_experts": self.source.num_experts,
            "top_k": self.source.top_k,
            "source": origin.source,
            "model": origin.model,
            "device": origin.device,
            "notes": list(self.notes),
        }


def bundled_path() -> Path:
    """Return the trace that ships with the package.

    Raises:
        ValueError: this installation has none.
    """
    found = sorted(Path(str(files("expertslice.traces") / "bundled")).glob("*.parquet"))
    if not found:
        raise ValueError("this installation holds no bundled trace; give a trace file instead")
    return found[0]


def open_source(given: str) -> Opened:
    """Open a trace: our own files stream, other formats are imported into memory.

    Raises:
        ValueError: nothing is there, or it cannot be read.
    """
    from ..traces.store import open_trace

    path = bundled_path() if given == BUNDLED else Path(given)
    name = f"{path.stem} (bundled)" if given == BUNDLED else path.name
    if not path.exists() and not path.with_name(path.name + ".parts").exists():
        raise ValueError(f"trace {given} does not exist; give a trace file, or '{BUNDLED}' for the one that ships")
    if path.exists() and not _is_ours(path):
        from ..traces.importers import import_trace

        result = import_trace(path)
        notes = (f"imported from {result.format}", *result.notes)
        return Opened(source=result.trace, name=name, path=path, sha256=_checksum(path), notes=notes)
    source = open_trace(path)
    return Opened(source=source, name=name, path=path, sha256=_checksum(path), bundled=given == BUNDLED)


def _is_ours(path: Path) -> bool:
    """Return whether our store reads it: a Parquet file, or the parts of a recording that was not closed."""
    if path.is_dir():
        return path.suffix == ".parts"
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _checksum(path: Path) -> str:
    if path.is_file():
        return sha256_of(path)
    folder = path if path.is_dir() else path.with_name(path.name + ".parts")
    parts = sorted(p for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256("".join(sha256_of(p) for p in parts).encode()).hexdigest()


def in_memory(source: StepSource, most_tokens: int = REBATCH_TOKENS) -> RoutingTrace | None:
    """Return a token trace, or its first tokens, in memory; None for counts alone."""
    if isinstance(source, RoutingTrace):
        return source
    blocks = getattr(source, "blocks", None)
    if blocks is None or not hasattr(source, "num_tokens"):
        return None
    from ..traces.trace import concat

    kept: list[RoutingTrace] = []
    for block in blocks():
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
    if segment == "all" and "all" not in known:
        return opened
    if segment is None and len(known) < 2:
        return opened
    select = getattr(opened.source, "select", None)
    if select is None or (segment is not None and segment not in known):
        raise ValueError(
            nearest("segment", segment or "", known) if known else f"{opened.name} has no segments; leave --segment out"
        )
    chosen = segment or known[-1]
    note = () if segment else (f"segment {chosen!r} of {', '.join(known)}; --segment all takes all of them",)
    return replace(opened, source=select(segment=chosen), segment=chosen, notes=(*opened.notes, *note))


def choose_model(source: StepSource, given: str | None) -> tuple[MoeSpec, tuple[str, ...]]:
    """Return the model whose layers are simulated, cut to the trace's layers, and what to say about it.

    Raises:
        ValueError: the model is unknown, does not fit the trace, or the trace does not name one that is known.
    """
    from ..traces.models import load_model, model_names

    if given is not None:
        return _cut(source, load_model(given))
    named = source.provenance.model
    if named in model_names():
        return _cut(source, load_model(named))
    shape = (source.num_layers, source.num_experts, source.top_k)
    alike = [m for m in map(load_model, model_names()) if (m.num_layers, m.num_experts, m.top_k) == shape]
    if len(alike) == 1:
        return alike[0], (f"the trace names no known model; {alike[0].name} has its shape and is assumed",)
    raise ValueError(
        f"the trace ({shape_of(source)}) names {'the unknown model ' + repr(named) if named else 'no model'}; "
        "add --model with a name from `expertslice models` or a Hugging Face config.json"
    )


def _cut(source: StepSource, model: MoeSpec) -> tuple[MoeSpec, tuple[str, ...]]:
    cut = match_model(source, model)
    if cut.num_layers == model.num_layers:
        return cut, ()
    return cut, (
        f"the trace has {cut.num_layers} of the {model.num_layers} layers of {model.name}; these are simulated",
    )


def parse_settings(settings: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the parameters of each policy from texts like "hot_cold.min_gain=0.02".

    Raises:
        ValueError: a text has another form.
    """
    found: dict[str, dict[str, str]] = {}
    for text in settings:
        left, equals, value = text.partition("=")
        policy, dot, name = left.rpartition(".")
        if not (equals and dot and policy and name):
            raise ValueError(f"--set {text!r} is not policy.name=value; write for example hot_cold.min_gain=0.02")
        found.setdefault(policy, {})[name] = value
    return found


def choose_policies(names: Sequence[str], settings: Sequence[str]) -> dict[str, Policy[Any]]:
    """Return the policies to compare by name, unsliced always first.

    Raises:
        ValueError: a name is unknown, a parameter is wrong, or set on a policy that is not compared.
    """
    from ..policies.registry import POLICIES, make_policy
    from .ranking import REFERENCE

    wanted = list(dict.fromkeys([REFERENCE, *(names or POLICIES)]))
    params = parse_settings(settings)
    for name in params:
        if name not in wanted:
            raise ValueError(f"{nearest('policy', name, wanted)}; --set needs a policy that is compared")
    return {name: make_policy(name, params.get(name, {})) for name in wanted}
