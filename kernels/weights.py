"""The experts' weights as the products read them: per expert [n_dim, k_dim], input columns contiguous.

Stacked tensors of equal experts are used in place; experts of different widths are laid one after another in one flat
tensor, with each expert's offset and sizes beside it. SwiGLU's first product holds the gate rows, then the up rows.

Shape letters: E experts, F rows of a weight (output columns), D columns of a weight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..traces.schema import MoeSpec
from .spec import TORCH_DTYPE

EPILOGUES = {"relu3": ("relu", "relu", "none"), "swiglu": ("swiglu", "none"), "gelu2": ("gelu", "none")}
MAX_EXPERT_ELEMENTS = 2**31 - 2**20
"""Of one expert's product: what a tile adds to an expert's start is an int32."""
ALIGN = 16
"""Elements that every expert of a flat tensor starts at a multiple of, for 16-byte loads."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProductWeights:
    """One product's weights for all experts: [E, n_dim, k_dim], or flat when the experts differ."""

    weight: Tensor
    bias: Tensor | None
    """[E, n_dim], or flat like the weight."""
    k_dim: int
    """Of the widest expert, as n_dim."""
    n_dim: int
    offset_E: Tensor | None = None
    """Where each expert starts in the flat tensor, int64; None when all experts are alike, as for the next three."""
    bias_offset_E: Tensor | None = None
    k_dim_E: Tensor | None = None
    n_dim_E: Tensor | None = None
    aligned: bool = True
    """Whether every expert's k_dim is a multiple of 16, so that its rows load in 16-byte pieces."""

    @property
    def uneven(self) -> bool:
        return self.offset_E is not None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertWeights:
    """The weights of one layer's experts, product by product."""

    spec: MoeSpec
    products: tuple[ProductWeights, ...]
    clamped: bool = False
    """SwiGLU as gpt-oss has it, see `reference.activate`."""

    @property
    def epilogues(self) -> tuple[str, ...]:
        return ("swiglu_clamped", "none") if self.clamped else EPILOGUES[self.spec.kind]

    @property
    def device(self) -> torch.device:
        return self.products[0].weight.device

    @classmethod
    def stacked(
        cls,
        spec: MoeSpec,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None] | None = None,
        *,
        clamped: bool = False,
    ) -> "ExpertWeights":
        """Use one [E, n_dim, k_dim] tensor per product, and one [E, n_dim] per bias, in place."""
        shapes = [(spec.num_experts, p.n_dim, p.k_dim) for p in spec.products(spec.d_ff_of(0))]
        if len(set(spec.d_ff)) > 1:
            raise ValueError(f"model {spec.name!r}: experts of different widths cannot be stacked; use `packed`")
        biases = biases or [None] * len(shapes)
        _check(spec, weights, shapes, "weight")
        _check(spec, biases, [shape[:2] for shape in shapes], "bias")
        products = tuple(
            ProductWeights(weight=w, bias=b, k_dim=k, n_dim=n)
            for w, b, (_, n, k) in zip(weights, biases, shapes, strict=True)
        )
        if clamped and spec.kind != "swiglu":
            raise ValueError(f"model {spec.name!r}: experts of kind {spec.kind} have no gate to clamp; leave it out")
        return cls(spec=spec, products=products, clamped=clamped)

    @classmethod
    def packed(
        cls, spec: MoeSpec, experts: Sequence[Sequence[Tensor]], biases: Sequence[Sequence[Tensor]] | None = None
    ) -> "ExpertWeights":
        """Copy each expert's [n_dim, k_dim] tensors into one flat tensor per product: for experts that differ."""
        for e in range(spec.num_experts):
            shapes = [(p.n_dim, p.k_dim) for p in spec.products(spec.d_ff_of(e))]
            _check(spec, experts[e], shapes, f"expert {e} weight")
            if biases:
                _check(spec, biases[e], [shape[:1] for shape in shapes], f"expert {e} bias")
        num_products = len(experts[0])
        return cls(
            spec=spec,
            products=tuple(
                _flat([e[i] for e in experts], [b[i] for b in biases] if biases else None) for i in range(num_products)
            ),
        )

    def of_expert(self, expert_id: int) -> list[tuple[Tensor, Tensor | None]]:
        """Return views of one expert's weights and biases, product by product."""
        views: list[tuple[Tensor, Tensor | None]] = []
        sizes = self.spec.products(self.spec.d_ff_of(expert_id))
        for held, size in zip(self.products, sizes, strict=True):
            if held.offset_E is None or held.bias_offset_E is None:
                views.append((held.weight[expert_id], None if held.bias is None else held.bias[expert_id]))
                continue
            start, bias_at = int(held.offset_E[expert_id]), int(held.bias_offset_E[expert_id])
            weight = held.weight[start : start + size.n_dim * size.k_dim].view(size.n_dim, size.k_dim)
            views.append((weight, None if held.bias is None else held.bias[bias_at : bias_at + size.n_dim]))
        return views


def random_weights(spec: MoeSpec, device: torch.device | str, seed: int = 0, *, bias: bool = False) -> ExpertWeights:
    """Return normal weights scaled by one over the square root of k_dim, the same for the same seed and device."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = TORCH_DTYPE[spec.dtype]

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(0, scale, generator=generator)

    if len(set(spec.d_ff)) == 1:
        sizes = spec.products(spec.d_ff_of(0))
        weights = [normal(spec.num_experts, p.n_dim, p.k_dim, scale=p.k_dim**-0.5) for p in sizes]
        biases = [normal(spec.num_experts, p.n_dim, scale=0.1) for p in sizes] if bias else None
        return ExpertWeights.stacked(spec, weights, biases)
    all_sizes = [spec.products(spec.d_ff_of(e)) for e in range(spec.num_experts)]
    experts = [[normal(p.n_dim, p.k_dim, scale=p.k_dim**-0.5) for p in sizes] for sizes in all_sizes]
    expert_biases = [[normal(p.n_dim, scale=0.1) for p in sizes] for sizes in all_sizes] if bias else None
    return ExpertWeights.packed(spec, experts, expert_biases)


def _flat(weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> ProductWeights:
    device = weights[0].device
    offset_E = _starts([w.numel() for w in weights])
    bias_offset_E = _starts([w.shape[0] for w in weights])
    flat = torch.zeros(offset_E.pop(), dtype=weights[0].dtype, device=device)
    bias = torch.zeros(bias_offset_E.pop(), dtype=flat.dtype, device=device) if biases else None
    for e, weight in enumerate(weights):
        flat[offset_E[e] : offset_E[e] + weight.numel()] = weight.flatten()
        if biases and bias is not None:
            bias[bias_offset_E[e] : bias_offset_E[e] + weight.shape[0]] = biases[e]
    return ProductWeights(
        weight=flat,
        bias=bias,
        n_dim=max(w.shape[0] for w in weights),
        k_dim=max(w.shape[1] for w in weights),
        offset_E=torch.tensor(offset_E, dtype=torch.int64, device=device),
        bias_offset_E=torch.tensor(bias_offset_E, dtype=torch.int64, device=device),
        k_dim_E=torch.tensor([w.shape[1] for w in weights], dtype=torch.int32, device=device),
        n_dim_E=torch.tensor([w.shape[0] for w in weights], dtype=torch.int32, device=device),
        aligned=all(w.shape[1] % ALIGN == 0 for w in weights),
    )


def _starts(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGN) * ALIGN)
    return starts


def _check(spec: MoeSpec, tensors: Sequence[Tensor | None], shapes: Sequence[tuple[int, ...]], what: str) -> None:
    if len(tensors) != len(shapes):
        raise ValueError(f"model {spec.name!r}: {len(tensors)} {what} tensors; kind {spec.kind} has {len(shapes)}")
    dtype = TORCH_DTYPE[spec.dtype]
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if tensor is None:
            continue
        if math.prod(shape[-2:]) > MAX_EXPERT_ELEMENTS:
            raise ValueError(f"model {spec.name!r}: {what} {i} has {list(shape[-2:])}; 2**31 elements are the most")
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or not tensor.is_contiguous():
            layout = "contiguous" if tensor.is_contiguous() else "strided"
            raise ValueError(
                f"model {spec.name!r}: {what} {i} is {layout} {tensor.dtype} {list(tensor.shape)}; it must be "
                f"contiguous {dtype} {list(shape)}"
            )
