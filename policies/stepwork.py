"""One step under one plan, layer by layer: what runs before, beside and after the slices.

Shape letters: L MoE layers, E routed experts, S slices, P products.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..traces.schema import DTYPE_BYTES, Ints, MoeSpec, OtherWork
from .contract import Plan
from .fluid import Fluid, Theft
from .rates import Segment, gap
from .residual import Residual
from .shares import Shares
from .tiles import peak_flops_per_clk
from .work import merged, segment_sums, segments_of

OtherL = Sequence[tuple[OtherWork, ...]]
"""Of each layer; empty: none."""
Sums = list[list[list[list[list[float]]]]]
"""[L][S][P][2][7]."""
EMPTY_NS = 1.0
"""A kernel that finds its queue empty, where it may look into others'."""


class LayerTimes(NamedTuple):
    """What one layer takes, ns from its start."""

    ns: int
    start_ns_S: list[int]
    busy_ns_S: list[int]


NODES = 3
"""Routing, scheduling and the first product's launch; later products add theirs in their slice's chain."""


def front_ns(hbm_bytes: float, flops: float, shares: Shares) -> float:
    """Return the time of work that has the device, or MIG instance 0, to itself."""
    read_per_ns = max(shares.device.read_curve_bytes_per_s) / 1e9 * shares.front_memory_part
    return max(hbm_bytes / read_per_ns, flops / (shares.flops_per_ns * shares.front_part))


def head_ns(rows: int, other: tuple[OtherWork, ...], shares: Shares, clock: float) -> int:
    """Return the time from the start of a layer to the start of its slices; `rows` are routed rows."""
    device, model = shares.device, shares.model
    ns = 0.0
    for work in other:
        if work.slice_id is None:
            ns += device.graph_node_ns + front_ns(work.hbm_bytes, work.flops / clock, shares)
    logits = rows // model.top_k * model.num_experts
    ns += logits * shares.constants.logit_ns
    logit_and_id_bytes = logits * 4 + rows * 8
    fork_ns = device.fork_join_ns * (len(shares.slices) - 1)
    return round(ns + front_ns(logit_and_id_bytes, 0, shares) + NODES * device.graph_node_ns + fork_ns)


def combined_bytes(rows: int, model: MoeSpec) -> int:
    """Return the bytes of reading every routed row and writing every token."""
    return (rows + rows // model.top_k) * model.d_model * DTYPE_BYTES[model.dtype]


def tail_ns(rows: int, shares: Shares) -> int:
    """Return the time to combine the experts' rows after the slices have joined."""
    return round(front_ns(combined_bytes(rows, shares.model), 0, shares) + shares.device.graph_node_ns)


def hop_ns(rows: int, shares: Shares) -> float:
    """Return the time for rows to reach another MIG instance through the host, and for their results to return."""
    there_and_back = 2 * rows * shares.model.d_model * DTYPE_BYTES[shares.model.dtype]
    return shares.device.host_hop_ns + there_and_back / shares.device.host_hop_bytes_per_s * 1e9


class StepWork:
    """What a step consists of; times are those of the device, launch and control plane apart."""

    def __init__(
        self,
        shares: Shares,
        plan: Plan,
        counts_LE: Ints,
        other_L: OtherL,
        first_layer: int,
        residual: Residual | None = None,
    ) -> None:
        self.shares = shares
        self._plan, self._other_L = plan, other_L
        owner_LE = plan.placement.owner_LE(counts_LE, first_layer)
        sums = segment_sums(counts_LE, owner_LE, plan.tile_order, shares)
        factor_LS = residual.factors_LS(sums, shares) if residual else None
        self._moved_bytes_L: list[float] = sums[..., 6].sum(axis=(1, 2, 3)).tolist()
        if factor_LS is not None:
            # Demands grow with the time: beside others, a kernel is as far from its physics as it is alone.
            sums *= factor_LS[:, :, None, None, None]
        self._sums: Sums = sums.tolist()
        self._rows_L: list[int] = counts_LE.sum(axis=1).tolist()
        self._remote_rows_SL: list[list[int]] = [
            np.where(owner_LE == s, counts_LE, 0).sum(axis=1).tolist() if one.instance else []
            for s, one in enumerate(shares.slices)
        ]
        self._counts_LE, self._owner_LE, self._factor_LS = counts_LE, owner_LE, factor_LS
        self._stolen: dict[int, Sums] = {}

    def _stolen_sums(self, thief: int) -> Sums:
        """Return every queue at a slice's prices."""
        if thief not in self._stolen:
            sums = segment_sums(self._counts_LE, self._owner_LE, self._plan.tile_order, self.shares, cost_slice=thief)
            if self._factor_LS is not None:
                # A thief runs the victim's tiles as well, or as badly, as its own.
                sums *= self._factor_LS[:, thief, None, None, None, None]
            self._stolen[thief] = sums.tolist()
        return self._stolen[thief]

    def _other(self, layer: int) -> tuple[OtherWork, ...]:
        return self._other_L[layer] if self._other_L else ()

    def head_ns(self, layer: int, clock: float = 1.0) -> int:
        """Return the time before the slices start."""
        return head_ns(self._rows_L[layer], self._other(layer), self.shares, clock)

    def tail_ns(self, layer: int) -> int:
        """Return the time after the slices have joined."""
        return tail_ns(self._rows_L[layer], self.shares)

    def moved_bytes(self, layer: int) -> float:
        """Return the bytes that a layer's kernels move to and from DRAM."""
        other = sum(work.hbm_bytes for work in self._other(layer))
        return self._moved_bytes_L[layer] + combined_bytes(self._rows_L[layer], self.shares.model) + other

    def slices(self, layer: int, clock: float = 1.0) -> Fluid:
        """Run a layer's slices, as they do when nothing else runs."""
        order = self._plan.tile_order
        kernels_S = [segments_of(sums, order, self.shares, clock) for sums in self._sums[layer]]

        def theft(thief: int, victim: int, kernel: int) -> Theft | None:
            if not kernels_S[victim][kernel]:
                return None
            sums = [self._stolen_sums(thief)[layer][victim][kernel]]
            (stolen,) = segments_of(sums, order, self.shares, clock)
            victim_ns = sum(s.solo_ns for s in kernels_S[victim][kernel])
            return Theft(
                merged(stolen)._replace(kernel=kernel), victim_ns, self.shares.tile_ns_PS[kernel][victim] / clock
            )

        fluid = Fluid(self.shares, theft if self._plan.steal else None)
        fluid.run([self._chain(layer, s, kernels, clock) for s, kernels in enumerate(kernels_S)])
        return fluid

    def _chain(self, layer: int, s: int, kernels: list[list[Segment]], clock: float) -> list[Segment]:
        device, ramp_ns = self.shares.device, self.shares.constants.ramp_ns
        node = gap(device.graph_node_ns)
        chain: list[Segment] = []
        if self._remote_rows_SL[s] and (rows := self._remote_rows_SL[s][layer]):
            chain.append(gap(hop_ns(rows, self.shares)))
        for work in self._other(layer):
            if work.on_slice(len(self.shares.slices)) == s:
                chain += [self._beside(work, s, len(kernels), clock), node]
        for p, segments in enumerate(kernels):
            chain += segments
            if not segments and self._plan.steal:
                chain.append(Segment(EMPTY_NS, 0.0, 0.0, 0.0, 0.0, p))
            after_ns = (device.graph_node_ns if p + 1 < len(kernels) else 0.0) + (ramp_ns if segments else 0.0)
            if after_ns:
                chain.append(gap(after_ns))
        return chain

    def _beside(self, work: OtherWork, s: int, kernel: int, clock: float) -> Segment:
        device = self.shares.device
        peak = peak_flops_per_clk(device, self.shares.model.dtype) * device.clock_mhz / 1e3 * clock
        device_ns = work.flops / (self.shares.flops_per_ns * clock)
        dram_ns = work.hbm_bytes / self.shares.read_per_ns(s)
        solo = max(work.flops / peak / self.shares.slices[s].sm_count, device_ns, dram_ns, 1.0)
        pipe = work.flops / peak / device.sm_count / solo
        l2 = work.hbm_bytes / (self.shares.l2_bytes_per_ns * clock)
        return Segment(solo, pipe, l2 / solo, device_ns / solo, work.hbm_bytes / solo, kernel)

    def layer_times(self, layer: int, clock: float = 1.0) -> LayerTimes:
        """Return what a layer takes when nothing else runs."""
        head, fluid = self.head_ns(layer, clock), self.slices(layer, clock)
        starts = [head + (first or 0) for first in fluid.first_ns]
        return LayerTimes(head + fluid.now_ns + self.tail_ns(layer), starts, fluid.busy_ns)
