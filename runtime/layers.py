"""How a layer's kernels are launched for a plan."""

from ..kernels.spec import LaunchSpec, LayerLaunch, SliceLaunch
from ..policies.contract import EXCLUSIVE, Plan, Setup

HOPPER = 90
TILE = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
LEAST_DESCRIPTOR_ROWS = 64
"""Tiles of fewer rows load by pointers."""


def launch_of(plan: Plan, setup: Setup) -> LayerLaunch:
    """Return how the kernels are launched for a plan's layout: its tiles, grids and whether slices steal."""

    def spec(name: str, num_ctas: int) -> LaunchSpec:
        tile = setup.variant(name)
        by_desc = setup.device.compute_capability >= HOPPER and tile.block_m >= LEAST_DESCRIPTOR_ROWS
        shape = {name: getattr(tile, name) for name in TILE}
        return LaunchSpec(**shape, num_ctas=num_ctas, descriptors=by_desc, flatten=by_desc)

    slices = tuple(
        SliceLaunch(
            up=spec(one.up, one.num_ctas),
            down=spec(one.down, one.num_ctas),
            sm_count=one.sm_count if one.mechanism in EXCLUSIVE else None,
        )
        for one in plan.layout.slices
    )
    return LayerLaunch(slices=slices, steal=plan.steal)
