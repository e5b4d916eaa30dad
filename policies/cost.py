"""What a plan costs, in closed form: physics from data-sheet figures and measured ceilings, nothing else.

`CostModel` with detail "tiles" is the simulator's truth: waves, padding, tails, L2 and shared-memory limits. Detail
"roofline" is what a policy believes: each expert takes the longer of its bytes and its padded arithmetic. The two
differ in form on purpose: a planner that holds the simulator's own model proves nothing.

Shape letters: L MoE layers, E routed experts, S slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..traces.schema import DTYPE_BYTES, MoeSpec, OtherWork
from .contract import DeviceSpec, Plan, SliceLayout, TileVariant
from .draws import perturb, perturb_constants
from .fluid import Fluid, Segment, gap
from .shares import Shares, shares_of
from .tiles import Residual, TileConstants, matrix_rate_per_s
from .work import Tables, segment_sums, segments_of, tables_of

__all__ = ["CostModel", "LayerTimes", "StepWork", "TileConstants", "floor_ns", "perturb"]

Chains = list[list[Segment]]


def floor_ns(*, hbm_bytes: float, flops: float, device: DeviceSpec, dtype: str) -> float:
    """Return the least time for so many bytes and FLOP: the longer of both at the device's best burst rates."""
    return 1e9 * max(hbm_bytes / max(device.read_curve_bytes_per_s), flops / matrix_rate_per_s(device, dtype))


class LayerTimes(NamedTuple):
    """What one layer takes, ns from its start."""

    ns: int
    start_ns_S: list[int]
    busy_ns_S: list[int]


class StepWork:
    """One step under one plan: what runs before, beside and after the slices of each layer."""

    def __init__(
        self,
        model: "CostModel",
        plan: Plan,
        counts_LE: NDArray[np.integer],
        other_L: Sequence[Sequence[OtherWork]],
        first_layer: int = 0,
    ) -> None:
        self.shares = model.shares(plan.layout)
        self._model, self._plan, self._other_L = model, plan, other_L
        tables = model.tables(plan.layout)
        owner_LE = owners(plan, counts_LE, first_layer)
        self._sums = segment_sums(counts_LE, owner_LE, plan.tile_order, self.shares, tables)
        self._rows_L: list[int] = counts_LE.sum(axis=1).tolist()
        self._remote_rows_LS = _remote_rows(counts_LE, owner_LE, self.shares)
        self._segments: list[list[list[list[Segment]]]] = []
        self._clock = 0.0
        self._moved_bytes_L: list[float] = self._sums[5].sum(axis=(1, 2, 3)).tolist()

    def chains(self, layer: int, clock: float = 1.0) -> Chains:
        """Return each slice's segments of a layer."""
        if clock != self._clock:
            self._segments = segments_of(self._sums, self._plan.tile_order, self.shares, clock)
            self._clock = clock
        return [self._chain(layer, s, products, clock) for s, products in enumerate(self._segments[layer])]

    def _chain(self, layer: int, s: int, products: list[list[Segment]], clock: float) -> list[Segment]:
        device = self.shares.device
        chain: list[Segment] = []
        if self._remote_rows_LS and self._remote_rows_LS[layer][s]:
            size = DTYPE_BYTES[self._model.model.dtype] * self._model.model.d_model
            hop = 2 * self._remote_rows_LS[layer][s] * size / device.host_hop_bytes_per_s * 1e9
            chain.append(gap(device.host_hop_ns + hop))
        if self._other_L:
            for work in self._other_L[layer]:
                if work.slice_id == s:
                    chain += [self._beside(work, s, clock), gap(device.graph_node_ns)]
        for p, segments in enumerate(products):
            if p:
                chain.append(gap(device.graph_node_ns))
            chain += segments
        return chain

    def _beside(self, work: OtherWork, s: int, clock: float) -> Segment:
        share, device = self.shares.slices[s], self.shares.device
        dtype = self._model.model.dtype
        peak = device.mma_flops_per_clk * device.clock_mhz / 1e3 * clock * 2 / DTYPE_BYTES[dtype]
        device_ns = work.flops / (self.shares.flops_per_ns * clock)
        dram_ns = work.hbm_bytes / float(self.shares.read_table_SC[s, share.ctas])
        solo = max(work.flops / peak / share.sms, device_ns, dram_ns, 1.0)
        pipe = work.flops / peak / device.sm_count / solo
        kernel = len(self._segments[0][0])
        return Segment(solo, pipe, 0.0, device_ns / solo, work.hbm_bytes / solo, kernel)

    def head_ns(self, layer: int, clock: float = 1.0) -> int:
        """Return the time before the slices start: other work alone, routing, scheduling, and the fork."""
        device, spec = self.shares.device, self._model.model
        ns = 0.0
        for work in self._other_L[layer] if self._other_L else ():
            if work.slice_id is None:
                ns += device.graph_node_ns + self._front_ns(work.hbm_bytes, work.flops / clock)
        tokens = self._rows_L[layer] // spec.top_k
        routing = tokens * spec.num_experts * 4 + self._rows_L[layer] * 8
        fork = device.fork_join_ns * (len(self.shares.slices) - 1)
        # Routing, scheduling and the first product's launch are nodes; later products add theirs in the chain.
        return round(ns + self._front_ns(routing, 0) + 3 * device.graph_node_ns + fork)

    def tail_ns(self, layer: int) -> int:
        """Return the time to combine the experts' rows after the slices have joined."""
        return round(self._front_ns(self._combined_bytes(layer), 0) + self.shares.device.graph_node_ns)

    def moved_bytes(self, layer: int) -> float:
        """Return the bytes that a layer's kernels move to and from DRAM."""
        other = sum(work.hbm_bytes for work in self._other_L[layer]) if self._other_L else 0
        return self._moved_bytes_L[layer] + self._combined_bytes(layer) + other

    def _combined_bytes(self, layer: int) -> int:
        spec, rows = self._model.model, self._rows_L[layer]
        return (rows + rows // spec.top_k) * spec.d_model * DTYPE_BYTES[spec.dtype]

    def _front_ns(self, hbm_bytes: float, flops: float) -> float:
        device, shares = self.shares.device, self.shares
        read = max(device.read_curve_bytes_per_s) * shares.front_memory_part
        return 1e9 * max(
            hbm_bytes / read, flops / (matrix_rate_per_s(device, self._model.model.dtype) * shares.front_part)
        )

    def layer_times(self, layer: int, clock: float = 1.0) -> LayerTimes:
        """Return what a layer takes when nothing else runs."""
        head = self.head_ns(layer, clock)
        fluid = Fluid(self.shares)
        fluid.load(self.chains(layer, clock))
        now = head
        while (dt_ns := fluid.next_ns()) is not None:
            fluid.advance(dt_ns)
            now += dt_ns
        starts = [head + (0 if first is None else first) for first in fluid.first_ns]
        return LayerTimes(now + self.tail_ns(layer), starts, fluid.busy_ns)


def owners(plan: Plan, counts_LE: NDArray[np.integer], first_layer: int = 0) -> NDArray[np.int16]:
    """Return the slice of every expert under true counts."""
    return np.stack(
        [plan.placement.slice_of_expert_E(first_layer + layer, counts_E) for layer, counts_E in enumerate(counts_LE)]
    )


def _remote_rows(counts_LE: NDArray[np.integer], owner_LE: NDArray[np.int16], shares: Shares) -> list[list[int]] | None:
    if not any(share.remote for share in shares.slices):
        return None
    rows = [np.where(owner_LE == s, counts_LE, 0).sum(axis=1) * share.remote for s, share in enumerate(shares.slices)]
    return np.stack(rows, axis=1).tolist()


@dataclass(frozen=True)
class CostModel:
    """The cost of plans on a device for a model; equal inputs give equal outputs."""

    device: DeviceSpec
    model: MoeSpec
    variants: tuple[TileVariant, ...]
    detail: Literal["tiles", "roofline"] = "tiles"
    constants: TileConstants = TileConstants()
    residual: Residual | None = None
    _shares: dict[SliceLayout, Shares] = field(default_factory=dict[SliceLayout, Shares], repr=False, compare=False)
    _tables: dict[SliceLayout, Tables] = field(default_factory=dict[SliceLayout, Tables], repr=False, compare=False)

    def shares(self, layout: SliceLayout) -> Shares:
        """Return a layout as this model sees it."""
        found = self._shares.get(layout)
        if found is None:
            tiles = {v.name: v for v in self.variants}
            found = self._shares[layout] = shares_of(layout, tiles, self.device, self.constants, self.model.dtype)
        return found

    def tables(self, layout: SliceLayout) -> Tables:
        """Return the tile costs of a layout."""
        found = self._tables.get(layout)
        if found is None:
            found = self._tables[layout] = tables_of(self.model, self.shares(layout), self.residual)
        return found

    def work(self, plan: Plan, counts_LE: NDArray[np.integer], other_L: Sequence[Sequence[OtherWork]] = ()) -> StepWork:
        """Return what one step under a plan consists of."""
        return StepWork(self, plan, counts_LE, other_L)

    def step_ns(self, plan: Plan, counts_LE: NDArray[np.integer], other_L: Sequence[Sequence[OtherWork]] = ()) -> int:
        """Return what all layers of a step take on the device, launch and control plane apart."""
        work = self.work(plan, counts_LE, other_L)
        return sum(work.layer_times(layer).ns for layer in range(len(counts_LE)))

    def layer_times(
        self, plan: Plan, layer: int, counts_E: NDArray[np.integer], other: Sequence[OtherWork] = ()
    ) -> LayerTimes:
        """Return what one layer takes, slice by slice."""
        work = StepWork(self, plan, counts_E[None], (other,) if other else (), first_layer=layer)
        return work.layer_times(0)

    def layer_ns(self, plan: Plan, layer: int, counts_E: NDArray[np.integer], other: Sequence[OtherWork] = ()) -> int:
        """Return what one layer takes."""
        return self.layer_times(plan, layer, counts_E, other).ns

    def perturbed(self, seed: int) -> "CostModel":
        """Return the model under one draw of all its errors; the same seed draws the same for every policy."""
        return replace(
            self,
            device=perturb(self.device, seed),
            constants=perturb_constants(self.constants, seed),
            _shares={},
            _tables={},
        )
