"""The header of a trace file and the checksum of its rows: what the footer says beside the columns."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import numpy as np

from .check import TraceError
from .schema import Phase, Provenance
from .trace import STEP_COLUMNS, TOKEN_COLUMNS, UNKNOWN, ExpertLoad, RoutingTrace, id_dtype, step_column

SCHEMA_VERSION = 1
KEY = b"expertslice"

BYTES = ("phase_T", "phase_S", "segment_S", "labels")
NARROW = {"position_T": "<i4", "domain_T": "<i2", "gates_TLK": "<f2", **dict.fromkeys(BYTES, "u1")}
"""Types of columns in files and checksums; others are "<i8", and ids as narrow as the experts allow."""


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


def header_of(block: RoutingTrace | ExpertLoad) -> Header:
    """Return the header for a file that ends with this block; sizes are those of the block alone, no checksum."""
    own: dict[str, Any] = {name: getattr(block, name) for name in ("num_layers", "num_experts", "top_k", "num_steps")}
    if isinstance(block, ExpertLoad):
        return Header(kind="load", provenance=block.provenance, phase=block.phase, **own)
    own |= {"num_tokens": block.num_tokens, "has_gates": block.gates_TLK is not None}
    segments = block.step_table.segments
    return Header(kind="tokens", provenance=block.provenance, domains=block.domains, segments=segments, **own)


@dataclass(slots=True)
class Checksum:
    """A hash per column, fed block by block: it depends on the rows, not on row groups or compression."""

    columns: dict[str, Any] = field(default_factory=dict[str, Any])
    num_steps: int = 0
    num_tokens: int = 0

    def add(self, block: RoutingTrace | ExpertLoad) -> None:
        self.num_steps += block.num_steps
        if isinstance(block, ExpertLoad):
            labels = np.frombuffer("\0".join((*block.labels, "")).encode(), dtype=np.uint8)
            rows: dict[str, Any] = {"counts_SLE": block.counts_SLE, "labels": labels}
        else:
            self.num_tokens += block.num_tokens
            rows = {name: getattr(block, name) for name in TOKEN_COLUMNS}
            rows["tokens_of_step"] = np.bincount(block.step_T, minlength=block.num_steps)
            rows |= {name: step_column(block.step_table, name, block.num_layers) for name in STEP_COLUMNS}
        for name, values in rows.items():
            if values is not None:
                ids = np.dtype(id_dtype(block.num_experts)).newbyteorder("<")
                dtype = ids if name == "expert_ids_TLK" else np.dtype(NARROW.get(name, "<i8"))
                digest = self.columns.setdefault(name, hashlib.sha256())
                digest.update(np.ascontiguousarray(values, dtype=dtype).data)

    def of(self, header: Header) -> str:
        """Return the checksum of what was fed, bound to the header's shape and names."""
        shape = [header.kind, header.num_layers, header.num_experts, header.top_k, header.domains, header.segments]
        parts = [json.dumps([*shape, self.num_steps, UNKNOWN])]
        parts += [f"{name} {digest.hexdigest()}" for name, digest in sorted(self.columns.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
