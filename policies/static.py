"""Fixed slices and pinned experts: the paper's static baseline.

Wins where loads are known, stable and even over the slices. Loses wherever they are not: a slice with little to do
idles, and on exclusive slices nobody may use its SMs.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from ..traces.schema import I16, I32
from .allocator import place_longest_first
from .candidates import auto_tiles, exclusive_slice
from .contract import (
    DeviceSpec,
    Mechanism,
    MigPlacement,
    Observation,
    Pinned,
    Plan,
    Setup,
    Slice,
    SliceLayout,
    TileVariant,
)
from .layouts import uniform_slice
from .mig import maximal_layouts, mig_layout, profile_of


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticState:
    """The plan in force; it is settled at the first loads."""

    setup: Setup
    plan: Plan
    settled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Static:
    """`num_slices` equal slices; experts pinned by expert_id % num_slices, or once by the allocator on first loads."""

    foresees: ClassVar[bool] = False
    reads_clock: ClassVar[bool] = False

    num_slices: int = 4
    mechanism: Mechanism = "green_context"
    placement: Literal["round_robin", "allocator"] = "round_robin"
    tile: str = "auto"
    """A tile variant; "auto": 64 or 128 rows by 128 columns, whichever suits the first loads."""

    def init(self, setup: Setup) -> StaticState:
        placement = Pinned(slice_of_expert_LE=round_robin(setup, self.num_slices))
        return StaticState(setup=setup, plan=Plan(layout=self.layouts(setup)[0], placement=placement))

    def layouts(self, setup: Setup) -> tuple[SliceLayout, ...]:
        return equal_layouts(setup, self.num_slices, self.mechanism, self.tile)

    def plan(self, obs: Observation, state: StaticState) -> tuple[Plan, StaticState]:
        if state.settled or not obs.counts_HLE.any():
            return state.plan, state
        layout = suited_layout(state.setup, self.layouts(state.setup), obs.counts_HLE[-1])
        plan = replace(state.plan, layout=layout)
        if self.placement == "allocator":
            load_LE = obs.counts_HLE.sum(axis=0, dtype=np.float64)
            speed_S = np.asarray([one.sm_count for one in layout.slices], dtype=np.float64)
            ids_LE = place_longest_first(load_LE, speed_S, capacity=-(-load_LE.shape[1] // self.num_slices))
            plan = replace(plan, placement=Pinned(slice_of_expert_LE=ids_LE))
        return plan, replace(state, plan=plan, settled=True)


def equal_layouts(setup: Setup, num_slices: int, mechanism: Mechanism, tile: str) -> tuple[SliceLayout, ...]:
    """Return the layouts of equal slices that differ in their tile: one, or those that "auto" stands for.

    Raises:
        ValueError: the mechanism is unknown, not in the setup, or cannot make that many slices here.
    """
    if mechanism not in setup.mechanisms:
        allowed = ", ".join(sorted(setup.mechanisms)) or "none"
        raise ValueError(f"static slices by {mechanism!r}; this setup allows {allowed}, use one of them")
    if num_slices < 1:
        raise ValueError(f"static with {num_slices} slices; give at least 1")
    tiles = auto_tiles(setup) if tile == "auto" else (setup.variant(tile),)
    if mechanism == "mig":
        placements = _mig_placements(setup.device, num_slices)
        return tuple(mig_layout(setup.device, placements, (one.name,) * num_slices) for one in tiles)
    return tuple(
        SliceLayout(slices=(_equal_slice(setup.device, num_slices, mechanism, one),) * num_slices) for one in tiles
    )


def suited_layout(setup: Setup, layouts: tuple[SliceLayout, ...], counts_LE: I32) -> SliceLayout:
    """Return the first layout whose tile has rows that suit the experts as an average row sees them, or the last."""
    rows = float((counts_LE.astype(np.float64) ** 2).sum() / max(1, counts_LE.sum()))
    # Tiles of too few rows read the weights again, of too many they are padding.
    least, most = min(rows / 2, 128), max(4 * rows, 64)
    suited = (one for one in layouts if least <= setup.variant(one.slices[0].up).block_m <= most)
    return next(suited, layouts[-1])


def round_robin(setup: Setup, num_slices: int) -> I16:
    """Return the paper's rule for every layer: expert_id % num_slices."""
    ids_E = np.arange(setup.model.num_experts, dtype=np.int16) % np.int16(num_slices)
    return np.tile(ids_E, (setup.model.num_layers, 1))


def _equal_slice(device: DeviceSpec, num_slices: int, mechanism: Mechanism, tile: TileVariant) -> Slice:
    if mechanism == "shared":
        return uniform_slice("shared", device.sm_count, tile.name)
    step = device.sm_partition_step if mechanism == "green_context" else 1
    least = device.sm_partition_min if mechanism == "green_context" else 1
    sms = device.sm_count // num_slices // step * step
    if sms < least:
        raise ValueError(
            f"{num_slices} {mechanism} slices leave {sms} SMs each; {device.name} needs {least}, take fewer slices"
        )
    return exclusive_slice(device, tile, sms, mechanism)


def _mig_placements(device: DeviceSpec, num_slices: int) -> tuple[MigPlacement, ...]:
    """Return the legal layout of that many instances whose smallest has the most SMs; ties by the sum of SMs."""

    def strength(placements: tuple[MigPlacement, ...]) -> tuple[int, int]:
        sms = [profile_of(place.profile, device).sm_count for place in placements]
        return min(sms), sum(sms)

    fitting = [one for one in maximal_layouts(device) if len(one) == num_slices]
    if not fitting:
        sizes = sorted({len(one) for one in maximal_layouts(device)})
        raise ValueError(
            f"{device.name} has no MIG layout of {num_slices} instances; it has {sizes or 'none'}, use one"
        )
    return max(fitting, key=strength)
