"""A layout seen by the cost model: what each slice may use alone, and what slices must share.

Slices of green contexts and MIG instances own their SMs, all others share one pool of them. All slices share DRAM and
L2, but MIG instances own a fixed part of both.

Shape letters: S slices, C active CTAs.
"""

from functools import cached_property

import numpy as np

from ..traces.schema import DTYPE_BYTES, F64, MoeSpec
from .contract import EXCLUSIVE, DeviceSpec, SliceLayout, TileVariant
from .layouts import fits_together
from .mig import profile_of
from .tiles import Demands, TileConstants, cta_gain, matrix_rate_per_s, read_bytes_per_ns, tables_of


class Shares:
    """A layout's slices with what they contend for; a value, though it remembers what it worked out."""

    def __init__(
        self,
        layout: SliceLayout,
        variants: dict[str, TileVariant],
        device: DeviceSpec,
        model: MoeSpec,
        constants: TileConstants,
    ) -> None:
        self.device, self.model, self.slices = device, model, layout.slices
        self.constants = constants
        self.tiles_S = [(variants[one.up], variants[one.down]) for one in self.slices]
        self.tables = tables_of(self.tiles_S, model, device, constants)
        self.demands = Demands(self.tables)
        self.pooled = not any(one.mechanism in EXCLUSIVE for one in self.slices)
        """Whether all slices run on the same SMs."""
        self.own_memory = bool(layout.mig)
        """Whether each slice owns its part of DRAM and L2."""
        self.flops_per_ns = matrix_rate_per_s(device, model.dtype) / 1e9 * constants.matrix_part
        """Of the whole device in a burst."""
        self.l2_bytes_per_ns = device.l2_bytes_per_clk * device.clock_mhz / 1e3
        """Of the whole device at the burst clock."""
        of_instance = [profile_of(place.profile, device).bandwidth_share for place in layout.mig]
        self._memory_part_S = [1.0 if one.instance is None else of_instance[one.instance] for one in self.slices]
        self.l2_per_ns_S = np.array(self._memory_part_S) * self.l2_bytes_per_ns
        """L2 bytes per ns that each slice gets alone."""
        self.sms_S = np.array([one.sm_count for one in self.slices])
        self.ctas_S = np.array([min(one.num_ctas, one.sm_count * one.ctas_per_sm) for one in self.slices])
        self.reach_S: list[float] = [self._reach(s, ctas) for s, ctas in enumerate(self.ctas_S.tolist())]
        """The single CTAs that each slice's CTAs in flight are worth: its weight wherever requests compete."""
        front = next((s for s, one in enumerate(self.slices) if one.instance == 0), None)
        self.front_part = 1.0 if front is None else self.slices[front].sm_count / device.sm_count
        """Part of the device's SMs that routing, combining and work before the layer run on."""
        self.front_memory_part = 1.0 if front is None else self._memory_part_S[front]
        self._read_caps: dict[int, float] = {}
        self._fits: dict[tuple[int, int], bool] = {}

    def _reach(self, s: int, ctas: int) -> float:
        """Return the single CTAs on the read curve that `ctas` of a slice are worth, spread over its SMs."""
        up, active = self.tiles_S[s][0], min(ctas, self.slices[s].sm_count)
        flight_bytes = (up.num_stages - 1) * up.block_n * up.block_k * DTYPE_BYTES[self.model.dtype]
        return active * cta_gain(self.device, self.constants, ctas / active, flight_bytes) if active else 0.0

    def read(self, reach: float) -> float:
        """Return the DRAM bytes per ns that so much reach gives together."""
        return read_bytes_per_ns(self.device, reach) * self.constants.read_part

    @cached_property
    def latency_S(self) -> list[float]:
        """Return the reach over the rate that each slice has alone: how long a request of its takes."""
        return [reach / self.read(reach) if reach else 0.0 for reach in self.reach_S]

    @cached_property
    def queues(self) -> bool:
        """Return whether some slice may have to wait until another's CTAs have left the SMs."""
        everyone = (1 << len(self.slices)) - 1
        return self.pooled and any(not self.admits(everyone & ~(1 << i), i) for i in range(len(self.slices)))

    @cached_property
    def tile_ns_PS(self) -> list[list[float]]:
        """Return the pipe time of each product's widest tile on each slice, at the burst clock."""
        return self.tables.tile_PSD[0].max(axis=2).tolist()

    def read_cap(self, mask: int) -> float:
        """Return the DRAM bytes per ns that the slices in a bit mask reach together."""
        cap = self._read_caps.get(mask)
        if cap is None:
            reach = sum(reach for i, reach in enumerate(self.reach_S) if mask >> i & 1)
            cap = self._read_caps[mask] = self.read(reach)
        return cap

    def admits(self, mask: int, newcomer: int) -> bool:
        """Return whether a slice finds room on the SMs beside those in a bit mask."""
        fits = self._fits.get((mask, newcomer))
        if fits is None:
            present = [i for i in range(len(self.slices)) if mask >> i & 1] + [newcomer]
            fits = len(present) == 1 or sum(self.slices[i].sm_count for i in present) <= self.device.sm_count
            each_cta = [self.tiles_S[i] for i in present for _ in range(self.slices[i].ctas_per_sm)]
            fits = fits or all(fits_together([tiles[product] for tiles in each_cta], self.device) for product in (0, 1))
            self._fits[mask, newcomer] = fits
        return fits

    @cached_property
    def read_per_ns_SC(self) -> F64:
        """Return DRAM bytes per ns of each slice [S, C + 1] by its active CTAs."""
        table = np.ones((len(self.slices), int(self.ctas_S.max()) + 1))
        for s, most in enumerate(self.ctas_S.tolist()):
            limit = self._memory_part_S[s] * self.read(self.device.read_curve_ctas[-1])
            for ctas in range(1, most + 1):
                table[s, ctas] = min(self.read(self._reach(s, ctas)), limit)
        return table

    @cached_property
    def read_per_ns_S(self) -> list[float]:
        """Return DRAM bytes per ns of each slice with all its CTAs in flight."""
        return [self.read_per_ns(s) for s in range(len(self.slices))]

    def read_per_ns(self, slice_id: int) -> float:
        """Return DRAM bytes per ns of a slice with all its CTAs in flight."""
        return float(self.read_per_ns_SC[slice_id, self.ctas_S[slice_id]])
