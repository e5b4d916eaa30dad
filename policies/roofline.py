"""A policy's belief about cost: rooflines alone.

Each expert takes the longest of its DRAM bytes, its L2 traffic and its tiles' pipe time at its slice's share of the
device; a layer takes as long as its longest slice, and no less than each of the three takes on what slices share. No
waves, no tails, no filling of pipelines, and no account of who runs beside whom.

Shape letters: L MoE layers, E routed experts, S slices, P products, D widths (1 where experts are alike).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..traces.schema import MoeSpec, OtherWork
from .shares import Shares
from .stepwork import head_ns, hop_ns, tail_ns
from .tiles import read_bytes_per_ns
from .work import Tables


class _Needs(NamedTuple):
    """What every expert asks for, [P, L, E]."""

    dram_bytes: NDArray[np.float64]
    l2_bytes: NDArray[np.float64]
    pipe_ns: NDArray[np.float64]
    """Over all its tiles, of one SM."""
    flops: NDArray[np.float64]
    """As executed, padding included."""


def _needs(counts_LE: NDArray[np.integer], owner_LE: NDArray[np.integer], tables: Tables) -> _Needs:
    width_E = np.arange(counts_LE.shape[1]) % tables.weight_bytes_PD.shape[1]
    row_tiles = -(-counts_LE // tables.rows_PS[:, owner_LE])
    column_tiles = tables.columns_PSD[:, owner_LE, width_E]
    weights = tables.weight_bytes_PD[:, None, width_E]
    tiles = row_tiles * column_tiles
    return _Needs(
        dram_bytes=(counts_LE > 0) * weights + counts_LE * tables.row_bytes_PD[:, None, width_E],
        l2_bytes=row_tiles * weights + column_tiles * counts_LE * tables.in_bytes_PD[:, None, width_E],
        pipe_ns=tiles * tables.tile_PSD[0][:, owner_LE, width_E],
        flops=tiles * tables.tile_PSD[2][:, owner_LE, width_E],
    )


def roofs_ns(
    counts_LE: NDArray[np.integer],
    owner_LE: NDArray[np.integer],
    other_L: Sequence[Sequence[OtherWork]],
    spec: MoeSpec,
    shares: Shares,
    tables: Tables,
) -> NDArray[np.float64]:
    """Return what every layer of a step takes."""
    needs = _needs(counts_LE, owner_LE, tables)
    slice_LS = np.zeros((len(counts_LE), len(shares.slices)))
    for s, share in enumerate(shares.slices):
        dram_ns = needs.dram_bytes / shares.read_per_ns_SC[s, share.ctas]
        # A slice's part of the device's matrix rate is no limit of its own: its SMs' pipes are.
        ns_PLE = np.maximum(
            np.maximum(dram_ns, needs.l2_bytes / shares.l2_per_ns_S[s]),
            np.maximum(needs.pipe_ns / share.sms, needs.flops / shares.flops_per_ns),
        )
        slice_LS[:, s] = (ns_PLE * (owner_LE == s)).sum(axis=(0, 2))
        if share.remote:
            rows_L = (counts_LE * (owner_LE == s)).sum(axis=1)
            slice_LS[:, s] += [hop_ns(int(rows), spec, shares) if rows else 0.0 for rows in rows_L]
    dram_L, l2_L, pipe_L, flops_L = (need.sum(axis=(0, 2)) for need in needs)
    for layer, works in enumerate(other_L):
        for work in works:
            if work.slice_id is not None:
                share = shares.slices[work.slice_id]
                read_ns = work.hbm_bytes / float(shares.read_per_ns_SC[work.slice_id, share.ctas])
                math_ns = work.flops / (shares.flops_per_ns * share.sms / shares.device.sm_count)
                slice_LS[layer, work.slice_id] += max(read_ns, math_ns)
                dram_L[layer] += work.hbm_bytes
                flops_L[layer] += work.flops
    layer_L = np.maximum(slice_LS.max(axis=1), flops_L / shares.flops_per_ns)
    if not shares.own_memory:
        together = read_bytes_per_ns(shares.device, sum(share.reach for share in shares.slices))
        layer_L = np.maximum(layer_L, np.maximum(dram_L / together, l2_L / shares.l2_bytes_per_ns))
    if shares.pooled:
        layer_L = np.maximum(layer_L, pipe_L / shares.device.sm_count)
    return layer_L + _fixed_ns(counts_LE, other_L, spec, shares)


def _fixed_ns(
    counts_LE: NDArray[np.integer], other_L: Sequence[Sequence[OtherWork]], spec: MoeSpec, shares: Shares
) -> NDArray[np.float64]:
    nodes = len(spec.products(spec.d_ff[0])) - 1
    fixed = [
        head_ns(rows, other_L[layer] if other_L else (), spec, shares, 1.0) + tail_ns(rows, spec, shares)
        for layer, rows in enumerate(counts_LE.sum(axis=1).tolist())
    ]
    return np.array(fixed, dtype=np.float64) + nodes * shares.device.graph_node_ns
