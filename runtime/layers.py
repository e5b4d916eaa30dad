"""How a layer's kernels are launched for a plan, and the words that tell them the plan.

Shape letters: L MoE layers, W words of a plan.
"""

from collections.abc import Mapping

import numpy as np
import torch

from ..kernels.spec import LaunchSpec, LayerLaunch, SliceLaunch, fill_plan, plan_words
from ..policies.contract import EXCLUSIVE, ByTokens, Plan, Setup
from ..traces.schema import I32

HOPPER = 90
TILE = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
LEAST_DESCRIPTOR_ROWS = 64
"""Tiles of fewer rows load by pointers."""


def tile_launch(tile: Mapping[str, int], num_ctas: int, compute_capability: int) -> LaunchSpec:
    """Return how a tile variant's kernel is launched on a device of that compute capability."""
    by_desc = compute_capability >= HOPPER and tile["block_m"] >= LEAST_DESCRIPTOR_ROWS
    return LaunchSpec(**tile, num_ctas=num_ctas, descriptors=by_desc, flatten=by_desc)


def launch_of(plan: Plan, setup: Setup) -> LayerLaunch:
    """Return how the kernels are launched for a plan's layout: its tiles, grids and whether slices steal."""

    def spec(name: str, num_ctas: int) -> LaunchSpec:
        tile = setup.variant(name)
        return tile_launch({name: getattr(tile, name) for name in TILE}, num_ctas, setup.device.compute_capability)

    slices = tuple(
        SliceLaunch(
            up=spec(one.up, one.num_ctas),
            down=spec(one.down, one.num_ctas),
            sm_count=one.sm_count if one.mechanism in EXCLUSIVE else None,
        )
        for one in plan.layout.slices
    )
    return LayerLaunch(slices=slices, steal=plan.steal)


def fill_words(words_LW: I32, plan: Plan) -> None:
    """Fill a plan's int32 words for every layer, on the host; the plan is known to be sound."""
    placement = plan.placement
    if isinstance(placement, ByTokens):
        fill_plan(words_LW, placement.bounds, placement.slice_ids, tile_order=plan.tile_order)
    else:
        fill_plan(words_LW, None, placement.slice_of_expert_LE, tile_order=plan.tile_order)


def plan_words_LW(plan: Plan, num_layers: int, num_experts: int) -> torch.Tensor:
    """Return a plan as int32 words for every layer, on the host."""
    words_LW = np.zeros((num_layers, plan_words(num_experts)), dtype=np.int32)
    fill_words(words_LW, plan)
    return torch.from_numpy(words_LW)
