"""The words every package shares: the model's shape, one step of routing, work beside the experts.

Nothing here reads a file or knows a device.

Shape letters: L MoE layers, E routed experts, K top-k, T tokens of a step.
"""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]
F16 = NDArray[np.float16]
Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
I16 = NDArray[np.int16]
U8 = NDArray[np.uint8]
Bools = NDArray[np.bool_]
"""Arrays by what they hold; the letters that end their names are the shape."""

ExpertKind = Literal["relu3", "swiglu", "gelu2"]
Dtype = Literal["bf16", "fp16", "fp32"]
Phase = Literal["prefill", "decode", "mixed"]

DTYPE_BYTES: dict[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
PHASES: tuple[Phase, ...] = ("prefill", "decode", "mixed")


def next_power_of_two(number: int) -> int:
    """Return the least power of two that holds a number, 1 for none: the default token bucket, and sides of blocks."""
    return 1 << max(0, number - 1).bit_length()


def nearest(kind: str, given: str, known: Iterable[str]) -> str:
    """Return the sentence that refuses an unknown name and suggests the nearest one."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
    return f"{kind} {given!r} is unknown; {hint}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One matrix product of an expert: rows [n, k_dim] times weights [k_dim, n_dim]."""

    name: str
    k_dim: int
    n_dim: int
    out_dim: int
    """Columns stored after the epilogue: n_dim, or n_dim / 2 where SwiGLU folds gate and up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """The shape of a model's MoE layers.

    `d_ff` holds one entry when every expert is alike, else one per expert. `other_params_per_layer` counts the
    weights that every token passes beside the routed experts (attention, norms, shared experts); key-value reads
    are not in it.
    """

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    d_model: int
    d_ff: tuple[int, ...]
    kind: ExpertKind = "swiglu"
    dtype: Dtype = "bf16"
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    other_params_per_layer: int = 0
    beside: "OtherWork | None" = None
    """Work of something else beside each layer's experts, such as another micro-batch's products."""
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_experts", "top_k", "d_model"):
            if getattr(self, name) < 1:
                raise ValueError(f"model {self.name!r}: {name} is {getattr(self, name)}; it must be at least 1")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"model {self.name!r}: top_k {self.top_k} exceeds its {self.num_experts} experts; lower top_k"
            )
        if len(self.d_ff) not in (1, self.num_experts) or min(self.d_ff, default=0) < 1:
            raise ValueError(
                f"model {self.name!r}: d_ff has {len(self.d_ff)} entries; give one width above 0 for all experts "
                f"or one for each of the {self.num_experts}"
            )
        if self.kind not in ("relu3", "swiglu", "gelu2"):
            raise ValueError(f"model {self.name!r}: expert kind {self.kind!r}; allowed are relu3, swiglu, gelu2")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"model {self.name!r}: dtype {self.dtype!r}; allowed are {', '.join(DTYPE_BYTES)}")

    def products(self, d_ff: int) -> tuple[Product, ...]:
        """Return the chained products of one expert of width `d_ff`, in order."""
        d = self.d_model
        down = Product(name="down", k_dim=d_ff, n_dim=d, out_dim=d)
        if self.kind == "swiglu":
            return (Product(name="up", k_dim=d, n_dim=2 * d_ff, out_dim=d_ff), down)
        up = Product(name="up", k_dim=d, n_dim=d_ff, out_dim=d_ff)
        if self.kind == "gelu2":
            return (up, down)
        return (up, Product(name="middle", k_dim=d_ff, n_dim=d_ff, out_dim=d_ff), down)

    def d_ff_of(self, expert_id: int) -> int:
        """Return the width of one expert."""
        return self.d_ff[expert_id if len(self.d_ff) > 1 else 0]

    def expert_bytes(self, expert_id: int = 0) -> int:
        """Return the bytes of one expert's weights."""
        return DTYPE_BYTES[self.dtype] * sum(p.k_dim * p.n_dim for p in self.products(self.d_ff_of(expert_id)))

    def other_work(self, num_tokens: int) -> "tuple[OtherWork, ...]":
        """Return the work beside one layer's experts for a step of `num_tokens`; empty when nothing is known."""
        beside = (self.beside,) if self.beside else ()
        if not self.other_params_per_layer or not num_tokens:
            return beside
        flops = 2 * self.other_params_per_layer * num_tokens
        before = OtherWork(flops=flops, hbm_bytes=self.other_params_per_layer * DTYPE_BYTES[self.dtype])
        return (before, *beside)


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherWork:
    """Opaque work of a layer that is not its experts: attention, dense layers, another micro-batch's products."""

    flops: int
    hbm_bytes: int
    slice_id: int | None = None
    """None: alone, before the layer; else beside the experts, on that slice or the last one that a layout has."""

    def __post_init__(self) -> None:
        if self.flops < 0 or self.hbm_bytes < 0:
            raise ValueError(f"other work of {self.flops} FLOP and {self.hbm_bytes} bytes; neither may be negative")

    def on_slice(self, num_slices: int) -> int | None:
        """Return the slice of a layout that it runs on."""
        return None if self.slice_id is None else min(self.slice_id, num_slices - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedStep:
    """One forward pass as the router left it, fixed before any policy runs; arrays are read-only."""

    step: int
    phase: Phase
    counts_LE: I32
    """Tokens routed to each expert of each layer: all that the simulator reads."""
    arrival_ns: int | None = None
    """When the step's work is there, ns since step 0; None: as soon as the step before it has been submitted."""
    num_tokens: int = 0
    expert_ids_TLK: Ints | None = None
    """Ids by falling router weight; None for count-only traces."""
    other_L: tuple[tuple[OtherWork, ...], ...] = ()
    """Per layer; empty: none."""

    def __post_init__(self) -> None:
        self.counts_LE.flags.writeable = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a trace comes from; a field is None where nobody wrote it down."""

    source: str
    """What made it: a recorder, an importer with the file's name, a generator with its seed."""
    model: str | None = None
    device: str | None = None
    driver: str | None = None
    versions: dict[str, str] = field(default_factory=dict[str, str])
    seed: int | None = None
    notes: str = ""


class StepSource(Protocol):
    """Anything that yields routed steps: a token trace on disk or in memory, an expert load, a generator."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def provenance(self) -> Provenance: ...

    def steps(self) -> Iterator[RoutedStep]:
        """Yield the steps in order, holding no more than a row group in memory."""
        ...
