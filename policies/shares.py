"""A layout seen by the cost model: what each slice may use alone, and what slices must share.

Slices of green contexts and MIG instances own their SMs, all others share one pool of them. All slices share DRAM and
L2, but MIG instances own a fixed part of both.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..traces.schema import F64, I64, MoeSpec
from .contract import EXCLUSIVE, DeviceSpec, Slice, SliceLayout, TileVariant
from .layouts import fits_together
from .mig import profile_of
from .tiles import Residual, Tables, TileConstants, cta_gain, matrix_rate_per_s, read_bytes_per_ns, tables_of


def reach_ctas(device: DeviceSpec, constants: TileConstants, ctas: float, sms: int) -> float:
    """Return the single CTAs on the read curve that `ctas` spread over `sms` are worth."""
    active = min(ctas, sms)
    return active * cta_gain(device, constants, ctas / active) if active else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one slice may use."""

    sms: int
    ctas: int
    ctas_per_sm: int
    priority: int
    tiles: tuple[TileVariant, TileVariant]
    """Of the first products, and of the down product."""
    reach: float
    """The single CTAs that its CTAs in flight are worth."""
    memory_part: float
    """Its part of DRAM and L2: 1 but for MIG."""
    remote: bool
    """Rows reach it through host memory."""


@dataclass(frozen=True)
class Shares:
    """A layout's slices with what they contend for."""

    device: DeviceSpec
    model: MoeSpec
    constants: TileConstants
    slices: tuple[Share, ...]
    tables: Tables
    pooled: bool
    """Whether all slices run on the same SMs."""
    own_memory: bool
    """Whether each slice owns its part of DRAM and L2."""
    front_part: float
    """Part of the device's SMs that routing, combining and work before the layer run on."""
    front_memory_part: float
    flops_per_ns: float
    """Of the whole device in a burst."""
    l2_bytes_per_ns: float
    """Of the whole device at the burst clock."""
    l2_per_ns_S: F64
    """L2 bytes per ns that each slice gets alone."""
    ctas_S: I64
    sms_S: I64
    weights: list[float]
    """Of the slices, wherever requests compete: their reach."""
    _read_caps: dict[int, float] = field(default_factory=dict[int, float], repr=False, compare=False)
    _fits: dict[tuple[int, int], bool] = field(default_factory=dict[tuple[int, int], bool], repr=False, compare=False)

    @cached_property
    def queues(self) -> bool:
        """Return whether some slice may have to wait until another's CTAs have left the SMs."""
        everyone = (1 << len(self.slices)) - 1
        return self.pooled and any(not self.admits(everyone & ~(1 << i), i) for i in range(len(self.slices)))

    def read_cap(self, mask: int) -> float:
        """Return the DRAM bytes per ns that the slices in a bit mask reach together."""
        cap = self._read_caps.get(mask)
        if cap is None:
            reach = sum(share.reach for i, share in enumerate(self.slices) if mask >> i & 1)
            cap = self._read_caps[mask] = read_bytes_per_ns(self.device, reach)
        return cap

    def admits(self, mask: int, newcomer: int) -> bool:
        """Return whether a slice finds room on the SMs beside those in a bit mask."""
        fits = self._fits.get((mask, newcomer))
        if fits is None:
            present = [s for i, s in enumerate(self.slices) if mask >> i & 1] + [self.slices[newcomer]]
            fits = len(present) == 1 or sum(s.sms for s in present) <= self.device.sm_count
            each_cta = [s for s in present for _ in range(s.ctas_per_sm)]
            fits = fits or all(fits_together([s.tiles[product] for s in each_cta], self.device) for product in (0, 1))
            self._fits[mask, newcomer] = fits
        return fits

    @cached_property
    def read_per_ns_SC(self) -> F64:
        """Return DRAM bytes per ns of each slice [S, C + 1] by its active CTAs."""
        most = max(share.ctas for share in self.slices)
        table = np.ones((len(self.slices), most + 1))
        for i, share in enumerate(self.slices):
            limit = share.memory_part * read_bytes_per_ns(self.device, self.device.read_curve_ctas[-1])
            for ctas in range(1, share.ctas + 1):
                reach = reach_ctas(self.device, self.constants, ctas, share.sms)
                table[i, ctas] = min(read_bytes_per_ns(self.device, reach), limit)
        return table


def _share(
    one: Slice, layout: SliceLayout, tiles: dict[str, TileVariant], device: DeviceSpec, constants: TileConstants
) -> Share:
    part = 1.0
    if one.instance is not None:
        part = profile_of(layout.mig[one.instance].profile, device).bandwidth_share
    ctas = min(one.num_ctas, one.sm_count * one.ctas_per_sm)
    return Share(
        sms=one.sm_count,
        ctas=ctas,
        ctas_per_sm=one.ctas_per_sm,
        priority=one.stream_priority,
        tiles=(tiles[one.up], tiles[one.down]),
        reach=reach_ctas(device, constants, ctas, one.sm_count),
        memory_part=part,
        remote=bool(one.instance),
    )


def shares_of(
    layout: SliceLayout,
    tiles: dict[str, TileVariant],
    device: DeviceSpec,
    model: MoeSpec,
    constants: TileConstants,
    residual: Residual | None = None,
) -> Shares:
    """Return a layout as the cost model sees it."""
    slices = tuple(_share(one, layout, tiles, device, constants) for one in layout.slices)
    front = next((s for one, s in zip(layout.slices, slices, strict=True) if one.instance == 0), None)
    l2_bytes_per_ns = device.l2_bytes_per_clk * device.clock_mhz / 1e3
    return Shares(
        device=device,
        model=model,
        constants=constants,
        slices=slices,
        tables=tables_of([share.tiles for share in slices], model, device, constants, residual),
        pooled=not any(one.mechanism in EXCLUSIVE for one in layout.slices),
        own_memory=bool(layout.mig),
        front_part=front.sms / device.sm_count if front else 1.0,
        front_memory_part=front.memory_part if front else 1.0,
        flops_per_ns=matrix_rate_per_s(device, model.dtype) / 1e9,
        l2_bytes_per_ns=l2_bytes_per_ns,
        l2_per_ns_S=np.array([share.memory_part * l2_bytes_per_ns for share in slices]),
        ctas_S=np.array([share.ctas for share in slices]),
        sms_S=np.array([share.sms for share in slices]),
        weights=[share.reach for share in slices],
    )
