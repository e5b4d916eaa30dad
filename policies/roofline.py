"""A policy's belief about cost: rooflines alone.

Each expert takes the longer of its bytes and its padded arithmetic at its slice's share of the device; a layer takes as
long as its longest slice, and no less than all bytes, or all arithmetic on shared SMs, take together. No waves, no
tails, no L2, no shared memory.

Shape letters: L MoE layers, E routed experts, S slices.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..traces.schema import DTYPE_BYTES, MoeSpec, OtherWork
from .front import head_ns, hop_ns, tail_ns
from .shares import Shares
from .tiles import read_bytes_per_ns


class Roofs(NamedTuple):
    """Times of the slices of each layer, ns."""

    layer_ns_L: NDArray[np.float64]
    slice_ns_LS: NDArray[np.float64]


def _expert_loads(
    counts_LE: NDArray[np.integer], owner_LE: NDArray[np.integer], spec: MoeSpec, shares: Shares
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (bytes, padded FLOP) of every expert, product by product [P, L, E]."""
    size = DTYPE_BYTES[spec.dtype]
    products = [spec.products(spec.d_ff_of(e)) for e in range(spec.num_experts)]
    by_product = list(zip(*products, strict=True))
    block_PS = np.array(
        [[s.tiles[p == len(by_product) - 1].block_m for s in shares.slices] for p in range(len(by_product))]
    )
    rows_PLE = block_PS[:, owner_LE]
    padded_PLE = -(-counts_LE // rows_PLE) * rows_PLE
    weight_PE = np.array([[d.k_dim * d.n_dim for d in ds] for ds in by_product], dtype=np.float64)
    row_PE = np.array([[d.k_dim + d.out_dim for d in ds] for ds in by_product], dtype=np.float64)
    moved = size * (np.where(counts_LE > 0, weight_PE[:, None], 0.0) + counts_LE * row_PE[:, None])
    return moved, 2.0 * padded_PLE * weight_PE[:, None]


def roofs(
    counts_LE: NDArray[np.integer],
    owner_LE: NDArray[np.integer],
    other_L: Sequence[Sequence[OtherWork]],
    spec: MoeSpec,
    shares: Shares,
) -> Roofs:
    """Return what every layer of a step takes."""
    device, slices = shares.device, shares.slices
    moved_PLE, flops_PLE = _expert_loads(counts_LE, owner_LE, spec, shares)
    read_S = np.array([shares.read_per_ns_SC[s, share.ctas] for s, share in enumerate(slices)])
    rate_S = np.array([shares.flops_per_ns * share.sms / device.sm_count for share in slices])
    slice_LS = np.zeros((len(counts_LE), len(slices)))
    for s in range(len(slices)):
        ns_PLE = np.maximum(moved_PLE / read_S[s], flops_PLE / rate_S[s])
        slice_LS[:, s] = (ns_PLE * (owner_LE == s)).sum(axis=(0, 2))
        if slices[s].remote:
            rows_L = (counts_LE * (owner_LE == s)).sum(axis=1)
            slice_LS[:, s] += [hop_ns(int(rows), spec, shares) if rows else 0.0 for rows in rows_L]
    bytes_L, flops_L = moved_PLE.sum(axis=(0, 2)), flops_PLE.sum(axis=(0, 2))
    for layer, works in enumerate(other_L):
        for work in works:
            if work.slice_id is not None:
                s = work.slice_id
                slice_LS[layer, s] += max(work.hbm_bytes / read_S[s], work.flops / rate_S[s])
                bytes_L[layer] += work.hbm_bytes
                flops_L[layer] += work.flops
    together = read_bytes_per_ns(device, sum(share.reach for share in slices))
    layer_L = np.maximum(slice_LS.max(axis=1), 0.0 if shares.own_memory else bytes_L / together)
    if shares.pooled:
        layer_L = np.maximum(layer_L, flops_L / shares.flops_per_ns)
    return Roofs(layer_L + _fixed_ns(counts_LE, other_L, spec, shares), slice_LS)


def _fixed_ns(
    counts_LE: NDArray[np.integer], other_L: Sequence[Sequence[OtherWork]], spec: MoeSpec, shares: Shares
) -> NDArray[np.float64]:
    nodes = len(spec.products(spec.d_ff[0])) - 1
    fixed = [
        head_ns(rows, other_L[layer] if other_L else (), spec, shares, 1.0) + tail_ns(rows, spec, shares)
        for layer, rows in enumerate(counts_LE.sum(axis=1).tolist())
    ]
    return np.array(fixed, dtype=np.float64) + nodes * shares.device.graph_node_ns
