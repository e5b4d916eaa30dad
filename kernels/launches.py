"""Which tiles and grids a layer is launched with when nobody tuned it: a model of the load, not a measurement.

Shape letters: E experts, K top-k, T tokens.
"""

from dataclasses import replace

from ..traces.schema import MoeSpec
from .spec import HOPPER, LaunchSpec, LayerLaunch, SliceLaunch

Tiles = dict[int, tuple[tuple[LaunchSpec, int], ...]]
"""By rows of an expert, the widest first, each with the CTAs that one SM holds."""


def _tiles(found: dict[int, tuple[tuple[int, int, int, int, int], ...]]) -> Tiles:
    """Return tiles given as columns, K step, warps, stages, CTAs."""
    return {
        m: tuple(
            (LaunchSpec(block_m=m, block_n=n, block_k=k, num_warps=w, num_stages=s, num_ctas=1), ctas)
            for n, k, w, s, ctas in tiles
        )
        for m, tiles in found.items()
    }


TILES = _tiles({
    16: ((128, 64, 4, 4, 3), (64, 128, 4, 4, 2), (32, 128, 4, 4, 3)),
    32: ((128, 64, 4, 4, 2), (64, 128, 4, 4, 2)),
    64: ((128, 128, 4, 2, 2), (128, 64, 4, 4, 2), (64, 64, 4, 4, 3)),
    128: ((256, 64, 8, 4, 1), (128, 64, 8, 4, 1), (128, 64, 4, 3, 2)),
})  # fmt: skip
FP32_TILES = _tiles({16: ((128, 32, 8, 3, 2), (64, 32, 4, 3, 3)), 64: ((64, 32, 4, 3, 2),)})
"""For products without matrix instructions: registers hold the operands too, and wider tiles spill. The fastest of
22 on an H100, on the paper's larger two configurations (docs/results/speed/fp32_tiles.json)."""

PINGPONG = tuple(
    LaunchSpec(block_m=64, block_n=n, block_k=k, num_warps=4, num_stages=s, num_ctas=1, pingpong=True)
    for n, k, s in ((256, 64, 4), (128, 64, 6), (128, 128, 4))
)
"""One CTA an SM."""


def rows_per_expert(spec: MoeSpec, num_tokens: int) -> tuple[float, float]:
    """Return how many experts even routing hits, and the rows of one of them."""
    hit = spec.num_experts * (1 - (1 - spec.top_k / spec.num_experts) ** max(1, num_tokens))
    return hit, max(1, num_tokens) * spec.top_k / hit


def tile_for(
    block_m: int,
    hit: float,
    rows: float,
    n_dim: int,
    *,
    sm_count: int,
    capability: tuple[int, int] = HOPPER,
    fp32: bool = False,
) -> LaunchSpec:
    """Return the widest tile of a height that still gives every SM work, with its grid."""
    for spec, ctas in (FP32_TILES if fp32 else TILES)[block_m]:
        tiles = hit * -(-rows // block_m) * -(-n_dim // spec.block_n)
        chosen = replace(spec, num_ctas=sm_count * ctas)
        if tiles >= sm_count:
            break
    hopper = capability >= HOPPER and block_m >= 64 and not fp32
    return replace(chosen, descriptors=hopper, flatten=hopper)


def default_launch(
    spec: MoeSpec, num_tokens: int, *, sm_count: int = 132, capability: tuple[int, int] = HOPPER
) -> LayerLaunch:
    """Return the unsliced launch of a model's layer for batches of about so many tokens."""
    hit, rows = rows_per_expert(spec, num_tokens)
    block_m = 16 if rows <= 20 else 64 if rows <= 96 else 128
    fp32 = spec.dtype == "fp32"
    if fp32 or (spec.kind == "gelu2" and block_m == 128):
        block_m = min(block_m, 64)
    products = spec.products(max(spec.d_ff))
    up, down = (
        tile_for(block_m, hit, rows, product.n_dim, sm_count=sm_count, capability=capability, fp32=fp32)
        for product in (products[0], products[-1])
    )
    # A copy of rows pays where each is then multiplied with many columns.
    gathered = block_m == 128 and up.descriptors and min(spec.d_ff) >= spec.d_model
    return LayerLaunch(slices=(SliceLaunch(up=up, down=down),), gathered=gathered)
