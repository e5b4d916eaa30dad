"""The header of a trace file and the checksum of its rows: what the footer says beside the columns."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from .check import TraceError
from .schema import Phase, Provenance
from .trace import STEP_COLUMNS, UNKNOWN, ExpertLoad, RoutingTrace, id_dtype, step_column

SCHEMA_VERSION = 1
KEY = b"expertslice"

NARROW: dict[str, str] = {
    "request_id_T": "<i8",
    "position_T": "<i4",
    "phase_T": "u1",
    "domain_T": "<i2",
    "gates_TLK": "<f2",
    "phase_S": "u1",
    "segment_S": "u1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a reader must know before the first row; JSON under `KEY` in the Parquet footer."""

    kind: Literal["tokens", "load"]
    num_layers: int
    num_experts: int
    top_k: int
    num_steps: int
    provenance: Provenance
    num_tokens: int = 0
    has_gates: bool = False
    domains: tuple[str, ...] = ()
    segments: tuple[str, ...] = ("all",)
    phase: Phase = "mixed"
    checksum: str = ""
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> bytes:
        """Return the footer's value."""
        return json.dumps(asdict(self), sort_keys=True).encode()


def parse_header(metadata: Mapping[bytes, bytes] | None) -> Header:
    """Return the header in a Parquet footer's metadata."""
    if not metadata or KEY not in metadata:
        raise TraceError("this Parquet file was not written by expertslice; import its records first")
    fields = cast("dict[str, Any]", json.loads(metadata[KEY]))
    version = int(fields["schema_version"])
    if version > SCHEMA_VERSION:
        raise TraceError(f"it has trace schema {version} and this expertslice reads up to {SCHEMA_VERSION}; upgrade")
    provenance = Provenance(**fields.pop("provenance"))
    names = {name: tuple(cast("list[str]", fields.pop(name))) for name in ("domains", "segments")}
    return Header(provenance=provenance, **names, **fields)


def tokens_header(trace: RoutingTrace) -> Header:
    """Return the header for a trace that starts like this one; sizes and checksum are those of this one alone."""
    return Header(
        kind="tokens",
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        num_steps=trace.num_steps,
        num_tokens=trace.num_tokens,
        has_gates=trace.gates_TLK is not None,
        domains=trace.domains,
        segments=trace.step_table.segments,
        provenance=trace.provenance,
    )


def load_header(load: ExpertLoad) -> Header:
    """Return the header for counts."""
    return Header(
        kind="load",
        num_layers=load.num_layers,
        num_experts=load.num_experts,
        top_k=load.top_k,
        num_steps=load.num_steps,
        phase=load.phase,
        provenance=load.provenance,
    )


@dataclass(slots=True)
class Checksum:
    """A hash per column, fed block by block: it depends on the rows, not on row groups or compression."""

    columns: dict[str, Any] = field(default_factory=dict[str, Any])
    num_steps: int = 0
    num_tokens: int = 0

    def add_trace(self, trace: RoutingTrace) -> None:
        """Feed the next steps of a token trace."""
        self.num_steps += trace.num_steps
        self.num_tokens += trace.num_tokens
        self._add("tokens_of_step", np.bincount(trace.step_T, minlength=trace.num_steps), "<i8")
        for name in ("request_id_T", "position_T", "phase_T", "domain_T", "gates_TLK"):
            values: NDArray[np.generic] | None = getattr(trace, name)
            if values is not None:
                self._add(name, values, NARROW[name])
        self._add("expert_ids_TLK", trace.expert_ids_TLK, np.dtype(id_dtype(trace.num_experts)).newbyteorder("<"))
        for name in STEP_COLUMNS:
            self._add(name, step_column(trace.step_table, name, trace.num_layers), NARROW.get(name, "<i8"))

    def add_load(self, load: ExpertLoad) -> None:
        """Feed the next steps of counts."""
        self.num_steps += load.num_steps
        self._add("counts_SLE", load.counts_SLE, "<i8")
        self._add("labels", np.frombuffer("\0".join((*load.labels, "")).encode(), dtype=np.uint8), "u1")

    def _add(self, name: str, values: NDArray[np.generic], dtype: "str | np.dtype[Any]") -> None:
        digest = self.columns.setdefault(name, hashlib.sha256())
        digest.update(np.ascontiguousarray(values, dtype=dtype).data)

    def of(self, header: Header) -> str:
        """Return the checksum of what was fed, bound to the header's shape and names."""
        shape = [header.kind, header.num_layers, header.num_experts, header.top_k, header.domains, header.segments]
        parts = [json.dumps([*shape, self.num_steps, UNKNOWN])]
        parts += [f"{name} {digest.hexdigest()}" for name, digest in sorted(self.columns.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
