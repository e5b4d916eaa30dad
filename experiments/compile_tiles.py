"""Compile every tile variant for a GPU that need not be there, and write what each one holds of an SM.

Run without TRITON_INTERPRET: `python -m expertslice.experiments.compile_tiles`. A variant that spills or does not fit
is refused.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..kernels.ahead import Resources

COMPUTE_CAPABILITIES = (90, 80)
SMEM_PER_CTA_MAX_BYTES = {90: 232448, 80: 166912}
"""CUDA programming guide, by compute capability."""
SPILL_BYTES = 8
"""Two registers saved around a tile's K loop cost nothing; more is a spill."""
TILES_FILE = Path(__file__).parents[1] / "policies" / "tiles.toml"

# (block_m, block_n, block_k, num_warps, num_stages), for bf16
SHAPES: tuple[tuple[int, int, int, int, int], ...] = (
    (16, 128, 64, 4, 4),
    (16, 256, 64, 8, 4),
    (32, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 128, 64, 4, 3),
    (64, 128, 64, 4, 4),
    (64, 256, 64, 8, 4),
    (128, 128, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
)


def variant_name(shape: Sequence[int]) -> str:
    """Return the name of a variant, such as 128x128x64w8s4."""
    m, n, k, warps, stages = shape
    return f"{m}x{n}x{k}w{warps}s{stages}"


def compile_tile(shape: Sequence[int], compute_capability: int, dtype: str = "bf16") -> "Resources":
    """Return the most that one variant holds, as first or as last product, compiled as the runtime launches it.

    Raises:
        RuntimeError: triton runs as an interpreter in this process.
    """
    from ..kernels.ahead import DOWN, UP, Resources, tile_resources
    from ..runtime.layers import tile_launch

    m, n, k, warps, stages = shape
    tile = {"block_m": m, "block_n": n, "block_k": k, "num_warps": warps, "num_stages": stages}
    spec = tile_launch(tile, 1, compute_capability)
    found = [tile_resources(spec, compute_capability, dtype, **role) for role in (UP, DOWN)]
    return Resources(
        smem_bytes=max(one.smem_bytes for one in found),
        regs_per_thread=max(one.regs_per_thread for one in found),
        stack_bytes=max(one.stack_bytes for one in found),
    )


def table_text(rows: Sequence[tuple[Sequence[int], dict[int, "Resources"]]], versions: str) -> str:
    """Return the TOML table of variants."""
    lines = [
        "# Tile variants of the grouped expert product: what one CTA holds of an SM, for bf16, by compute capability.",
        "# None spills. Written by `python -m expertslice.experiments.compile_tiles` with",
        f"# {versions}; do not edit.",
    ]
    for shape, found in rows:
        m, n, k, warps, stages = shape
        lines += [
            "[[variants]]",
            f'name = "{variant_name(shape)}"',
            f"block_m = {m}",
            f"block_n = {n}",
            f"block_k = {k}",
            f"num_warps = {warps}",
            f"num_stages = {stages}",
        ]
        lines += [
            f"sm_{capability} = {{ smem_bytes = {one.smem_bytes}, regs_per_thread = {one.regs_per_thread} }}"
            for capability, one in found.items()
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile all variants and write the table; stop at one that spills or does not fit."""
    import triton

    rows: list[tuple[Sequence[int], dict[int, Resources]]] = []
    for shape in SHAPES:
        found = {capability: compile_tile(shape, capability) for capability in COMPUTE_CAPABILITIES}
        for capability, one in found.items():
            sys.stdout.write(f"{variant_name(shape)} sm_{capability} {one}\n")
            if one.stack_bytes > SPILL_BYTES or one.smem_bytes > SMEM_PER_CTA_MAX_BYTES[capability]:
                sys.exit(f"{variant_name(shape)} spills or does not fit sm_{capability}; drop it from SHAPES")
        rows.append((shape, found))
    targets = " and ".join(f"sm_{capability}" for capability in COMPUTE_CAPABILITIES)
    TILES_FILE.write_text(table_text(rows, f"triton {triton.__version__} for {targets}"), encoding="utf-8")


if __name__ == "__main__":
    main()
