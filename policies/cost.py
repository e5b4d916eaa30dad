"""What a plan costs, in closed form: physics from data-sheet figures and measured ceilings, nothing else.

`CostModel` with detail "tiles" is the simulator's truth: waves, padding, tails, L2 and shared-memory limits. Detail
"roofline" is what a policy believes: each expert takes the longest of its bytes, L2 traffic and padded tiles. The two
differ in form on purpose: a planner that holds the simulator's own model proves nothing. A residual, learned from
measured kernels, corrects the truth.

Shape letters: L MoE layers, E routed experts, S slices.
"""

import zlib
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np

from ..traces.schema import Ints, MoeSpec, OtherWork
from .contract import DeviceSpec, Plan, SliceLayout, TileVariant
from .residual import Residual
from .roofline import roofs_ns
from .shares import Shares
from .stepwork import OtherL, StepWork
from .tiles import TileConstants, matrix_rate_per_s

__all__ = ["CostModel", "StepWork", "TileConstants", "floor_ns", "perturb"]


def floor_ns(*, hbm_bytes: float, flops: float, device: DeviceSpec, dtype: str) -> float:
    """Return the least time for so many bytes and FLOP: the longer of both at the device's best burst rates."""
    return 1e9 * max(hbm_bytes / max(device.read_curve_bytes_per_s), flops / matrix_rate_per_s(device, dtype))


@dataclass(frozen=True)
class CostModel:
    """The cost of plans on a device for a model; equal inputs give equal outputs.

    Times are those of the device in a burst, launch and control plane apart.
    """

    device: DeviceSpec
    model: MoeSpec
    variants: tuple[TileVariant, ...]
    detail: Literal["tiles", "roofline"] = "tiles"
    constants: TileConstants = field(default_factory=TileConstants)
    residual: Residual | None = None
    """Of detail "tiles" alone; it brings its own constants."""
    _shares: dict[SliceLayout, Shares] = field(
        default_factory=dict[SliceLayout, Shares], init=False, repr=False, compare=False
    )

    def step_ns(self, plan: Plan, counts_LE: Ints, other_L: OtherL = (), first_layer: int = 0) -> int:
        """Return what all layers given take; `first_layer` says which they are when the plan pins experts."""
        if self.detail == "roofline":
            owner_LE = plan.placement.owner_LE(counts_LE, first_layer)
            return round(float(roofs_ns(counts_LE, owner_LE, other_L, self.shares(plan.layout)).sum()))
        work = self.work(plan, counts_LE, other_L, first_layer)
        return sum(work.layer_times(layer).ns for layer in range(len(counts_LE)))

    def layer_ns(self, plan: Plan, layer: int, counts_E: Ints, other: tuple[OtherWork, ...] = ()) -> int:
        """Return what one layer takes."""
        return self.step_ns(plan, counts_E[None], (other,) if other else (), layer)

    def work(self, plan: Plan, counts_LE: Ints, other_L: OtherL = (), first_layer: int = 0) -> StepWork:
        """Return what one step under a plan consists of, whatever the detail."""
        return StepWork(self.shares(plan.layout), plan, counts_LE, other_L, first_layer, self.residual)

    def shares(self, layout: SliceLayout) -> Shares:
        """Return a layout as this model sees it."""
        if layout not in self._shares:
            tiles = {v.name: v for v in self.variants}
            constants = self.residual.constants if self.residual else self.constants
            self._shares[layout] = Shares(layout, tiles, self.device, self.model, constants)
        return self._shares[layout]

    def perturbed(self, seed: int) -> "CostModel":
        """Return the model under one draw of all its errors; the same seed draws the same for every policy."""
        device = perturb(self.device, seed)
        if self.residual is None:
            return replace(self, device=device, constants=_drawn(self.constants, seed))
        kept = {name: getattr(self.device, name) for name in CORRECTED}
        return replace(self, device=replace(device, **kept), residual=self.residual.drawn(seed))


CORRECTED = (
    "read_curve_bytes_per_s", "mma_flops_per_clk", "matrix_flops_per_s", "fp32_flops_per_s", "l2_bytes_per_clk",
    "smem_bytes_per_clk", "clock_mhz",
)  # fmt: skip
"""Figures of a device whose errors a residual takes up: its own error is what is left of them."""


Erring = TypeVar("Erring", DeviceSpec, TileConstants)


def _drawn(spec: Erring, seed: int) -> Erring:
    """Return a spec with every figure drawn from its error, keyed by its name: one more leaves the others' alone."""
    changes: dict[str, Any] = {}
    for name, error in spec.rel_errors:
        draw = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal()
        value, factor = getattr(spec, name), float(np.exp(error * draw))
        if isinstance(value, tuple):
            changes[name] = tuple(one * factor for one in value)
        else:
            changes[name] = round(value * factor) if isinstance(value, int) else value * factor
    return replace(spec, **changes)


def perturb(device: DeviceSpec, seed: int) -> DeviceSpec:
    """Return a device with every figure drawn from its error, and what physics orders still in order.

    A measured curve moves as a whole, so that it stays monotone. A sustained rate stays below the burst rate, and a
    power below the limit.
    """
    drawn = _drawn(device, seed)
    matrix_w, stream_w = min(drawn.matrix_w, drawn.limit_w), min(drawn.stream_w, drawn.limit_w)
    return replace(
        drawn,
        sustained_flops_per_s=min(drawn.sustained_flops_per_s, drawn.matrix_flops_per_s),
        matrix_w=matrix_w,
        stream_w=stream_w,
        idle_w=min(drawn.idle_w, matrix_w / 2, stream_w / 2),
    )
