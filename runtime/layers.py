"""A layer under a layout: its slices beside each other, each on a lane of its own.

A lane is a stream on a GPU; without one, lanes run one after another.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from ..kernels.combine import combine
from ..kernels.gather import gather
from ..kernels.layer import run_product, run_slice
from ..kernels.routing import route
from ..kernels.spec import LaunchSpec, LayerLaunch, RouterSpec, SliceLaunch
from ..policies.contract import EXCLUSIVE, Plan, Setup

if TYPE_CHECKING:
    from torch import Tensor

    from ..kernels.weights import ExpertWeights
    from ..kernels.workspace import Workspace

HOPPER = 90
LEAST_DESCRIPTOR_ROWS = 64
"""Tiles of fewer rows load by pointers."""


class Lanes(Protocol):
    """Where the slices of a layout run."""

    def beside(self, parts: list[Callable[[], None]]) -> None:
        """Run part i on lane i, after what was enqueued before and before what comes after."""
        ...


class InTurn:
    """Lanes without a GPU."""

    def beside(self, parts: list[Callable[[], None]]) -> None:
        """Run the parts one after another."""
        for part in parts:
            part()


def launch_of(plan: Plan, setup: Setup) -> LayerLaunch:
    """Return how the kernels are launched for a plan's layout: its tiles, grids and whether slices steal."""

    def spec(name: str, num_ctas: int) -> LaunchSpec:
        tile = setup.variant(name)
        by_desc = setup.device.compute_capability >= HOPPER and tile.block_m >= LEAST_DESCRIPTOR_ROWS
        return LaunchSpec(
            block_m=tile.block_m,
            block_n=tile.block_n,
            block_k=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            num_ctas=num_ctas,
            descriptors=by_desc,
            flatten=by_desc,
        )

    slices = tuple(
        SliceLaunch(
            up=spec(one.up, one.num_ctas),
            down=spec(one.down, one.num_ctas),
            sm_count=one.sm_count if one.mechanism in EXCLUSIVE else None,
        )
        for one in plan.layout.slices
    )
    return LayerLaunch(slices=slices, steal=plan.steal)


def run_layer(
    x_TD: "Tensor",
    logits_TE: "Tensor",
    weights: "ExpertWeights",
    router: RouterSpec,
    ws: "Workspace",
    launch: LayerLaunch,
    lanes: Lanes,
    *,
    bias_E: "Tensor | None" = None,
    num_tokens: "Tensor | None" = None,
    weights_TK: "Tensor | None" = None,
    out_TD: "Tensor | None" = None,
) -> "Tensor":
    """Return the layer's output [T, D], in `out_TD` or else in the workspace, with each slice on a lane of its own.

    The bits are those of `kernels.layer.moe_layer`. `weights_TK` take the place of the router's.
    """
    out_TD = ws.out_TD[: x_TD.shape[0]] if out_TD is None else out_TD
    route(logits_TE, router, launch, ws, bias_E=bias_E, num_tokens=num_tokens)
    if weights_TK is not None:
        ws.weights_TK[: x_TD.shape[0]].copy_(weights_TK)
    rows = gather(x_TD, ws) if launch.gathered else x_TD
    slices = range(len(launch.slices))
    if launch.steal:
        # Whoever steals a tile of a product needs every tile of the one before.
        for product in range(len(weights.products)):
            lanes.beside([_part(rows, weights, ws, launch, s, product) for s in slices])
    else:
        lanes.beside([_part(rows, weights, ws, launch, s, None) for s in slices])
    combine(ws.rows_ND, ws.weights_TK, out_TD, num_tokens=num_tokens)
    return out_TD


def _part(
    rows: "Tensor", weights: "ExpertWeights", ws: "Workspace", launch: LayerLaunch, slice_id: int, product: int | None
) -> Callable[[], None]:
    if product is None:
        return lambda: run_slice(rows, weights, ws, launch, slice_id=slice_id)
    return lambda: run_product(rows, weights, ws, launch, slice_id=slice_id, product=product)
