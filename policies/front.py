"""What runs before and after a layer's slices: other work, routing, scheduling, the fork, and combining.

Shape letters: none; everything here is per layer.
"""

from collections.abc import Sequence

from ..traces.schema import DTYPE_BYTES, MoeSpec, OtherWork
from .shares import Shares

NODES = 3
"""Routing, scheduling and the first product's launch; later products add theirs in their slice's chain."""


def front_ns(hbm_bytes: float, flops: float, shares: Shares) -> float:
    """Return the time of work that has the device, or MIG instance 0, to itself."""
    read_per_ns = max(shares.device.read_curve_bytes_per_s) / 1e9 * shares.front_memory_part
    return max(hbm_bytes / read_per_ns, flops / (shares.flops_per_ns * shares.front_part))


def head_ns(rows: int, other: Sequence[OtherWork], spec: MoeSpec, shares: Shares, clock: float) -> int:
    """Return the time from the start of a layer to the start of its slices; `rows` are routed rows."""
    device = shares.device
    ns = 0.0
    for work in other:
        if work.slice_id is None:
            ns += device.graph_node_ns + front_ns(work.hbm_bytes, work.flops / clock, shares)
    logit_and_id_bytes = rows // spec.top_k * spec.num_experts * 4 + rows * 8
    fork_ns = device.fork_join_ns * (len(shares.slices) - 1)
    return round(ns + front_ns(logit_and_id_bytes, 0, shares) + NODES * device.graph_node_ns + fork_ns)


def combined_bytes(rows: int, spec: MoeSpec) -> int:
    """Return the bytes of reading every routed row and writing every token."""
    return (rows + rows // spec.top_k) * spec.d_model * DTYPE_BYTES[spec.dtype]


def tail_ns(rows: int, spec: MoeSpec, shares: Shares) -> int:
    """Return the time to combine the experts' rows after the slices have joined."""
    return round(front_ns(combined_bytes(rows, spec), 0, shares) + shares.device.graph_node_ns)


def hop_ns(rows: int, spec: MoeSpec, shares: Shares) -> float:
    """Return the time for rows to reach another MIG instance through the host, and for their results to return."""
    there_and_back = 2 * rows * spec.d_model * DTYPE_BYTES[spec.dtype]
    return shares.device.host_hop_ns + there_and_back / shares.device.host_hop_bytes_per_s * 1e9
