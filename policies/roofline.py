"""A policy's belief about cost: rooflines alone.

Each expert takes the longest of its DRAM bytes, its L2 traffic and its tiles' pipe time at its slice's share of the
device; a layer takes as long as its longest slice, and no less than each of the three takes on what slices share. No
waves, no tails, no filling of pipelines, and no account of who runs beside whom.

Shape letters: L MoE layers, E routed experts, S slices, P products, C demands.
"""

import numpy as np

from ..traces.schema import F64, Ints
from .shares import Shares
from .stepwork import OtherL, head_ns, hop_ns, tail_ns


def roofs_ns(counts_LE: Ints, owner_LE: Ints, other_L: OtherL, shares: Shares) -> F64:
    """Return what every layer of a step takes."""
    _, asked_CPLE = shares.demands(counts_LE, owner_LE, np.arange(counts_LE.shape[1])[None])
    pipe_ns, _, flops, l2_bytes, dram_bytes = asked_CPLE
    slice_LS = np.zeros((len(counts_LE), len(shares.slices)))
    for s, one in enumerate(shares.slices):
        dram_ns = dram_bytes / shares.read_per_ns(s)
        # A slice's part of the device's matrix rate is no limit of its own: its SMs' pipes are.
        ns_PLE = np.maximum(
            np.maximum(dram_ns, l2_bytes / shares.l2_per_ns_S[s]),
            np.maximum(pipe_ns / one.sm_count, flops / shares.flops_per_ns),
        )
        slice_LS[:, s] = (ns_PLE * (owner_LE == s)).sum(axis=(0, 2))
        if one.instance:
            rows_L = (counts_LE * (owner_LE == s)).sum(axis=1)
            slice_LS[:, s] += [hop_ns(int(rows), shares) if rows else 0.0 for rows in rows_L]
    pipe_L, _, flops_L, l2_L, dram_L = asked_CPLE.sum(axis=(1, 3))
    for layer, works in enumerate(other_L):
        for work in works:
            if (s := work.on_slice(len(shares.slices))) is not None:
                sms = shares.slices[s].sm_count
                read_ns = work.hbm_bytes / shares.read_per_ns(s)
                math_ns = work.flops / (shares.flops_per_ns * sms / shares.device.sm_count)
                slice_LS[layer, s] += max(read_ns, math_ns)
                dram_L[layer] += work.hbm_bytes
                flops_L[layer] += work.flops
    layer_L = np.maximum(slice_LS.max(axis=1), flops_L / shares.flops_per_ns)
    if not shares.own_memory:
        together = shares.read(sum(shares.reach_S))
        layer_L = np.maximum(layer_L, np.maximum(dram_L / together, l2_L / shares.l2_bytes_per_ns))
    if shares.pooled:
        layer_L = np.maximum(layer_L, pipe_L / shares.device.sm_count)
    return layer_L + _fixed_ns(counts_LE, other_L, shares)


def _fixed_ns(counts_LE: Ints, other_L: OtherL, shares: Shares) -> F64:
    nodes = len(shares.tables.rows_PS) - 1
    layers = list(zip(counts_LE.sum(axis=1).tolist(), other_L or ((),) * len(counts_LE), strict=True))
    # Most layers of a step are alike: every token passes all of them.
    ns_of = {(rows, other): head_ns(rows, other, shares, 1.0) + tail_ns(rows, shares) for rows, other in set(layers)}
    return np.array([ns_of[layer] for layer in layers], dtype=np.float64) + nodes * shares.device.graph_node_ns
