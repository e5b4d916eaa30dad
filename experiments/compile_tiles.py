"""Compile every tile variant for a GPU that need not be there, and write what each one holds of an SM.

Run without TRITON_INTERPRET: `python -m expertslice.experiments.compile_tiles`. A variant that spills or does not fit
is refused.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

COMPUTE_CAPABILITIES = (90, 80)
SMEM_PER_CTA_MAX_BYTES = {90: 232448, 80: 166912}
"""CUDA programming guide, by compute capability."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What the compiler gave one CTA."""

    smem_bytes: int
    regs_per_thread: int
    stack_bytes: int
    """Above 0: registers were spilled."""


def variant_name(shape: Sequence[int]) -> str:
    """Return the name of a variant, such as 128x128x64w8s4."""
    m, n, k, warps, stages = shape
    return f"{m}x{n}x{k}w{warps}s{stages}"


def compile_tile(shape: Sequence[int], compute_capability: int, dtype: str = "bf16") -> Resources:
    """Return the resources of one variant as compiled for a GPU of that compute capability.

    Raises:
        RuntimeError: triton runs as an interpreter in this process.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ..kernels.provisional import grouped_product_kernel

    if knobs.runtime.interpret:
        raise RuntimeError("triton interprets in this process; unset TRITON_INTERPRET before starting it")
    m, n, k, warps, stages = shape
    constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "EVEN_K": True, "WIDEN": False}
    pointers = dict.fromkeys(("x_ptr", "w_ptr", "out_ptr"), f"*{dtype}")
    pointers |= dict.fromkeys(("offsets_ptr", "queue_ptr", "num_tiles_ptr"), "*i32")
    numbers = dict.fromkeys(("d_dim", "f_dim", "stride_x", "stride_we", "stride_wf", "stride_out"), "i32")
    signature = pointers | numbers | dict.fromkeys(constants, "constexpr")
    # Without divisibility the loads are scalar and the register count means nothing.
    attrs = {(index,): [["tt.divisibility", 16]] for index in range(len(pointers | numbers))}
    source = ASTSource(grouped_product_kernel, signature, constants, attrs)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", compute_capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    regs, stack = _resource_usage(compiled.asm["cubin"], knobs.nvidia.cuobjdump.path)
    return Resources(smem_bytes=compiled.metadata.shared, regs_per_thread=regs, stack_bytes=stack)


def _resource_usage(cubin: bytes, cuobjdump: str) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([cuobjdump, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no registers: {report!r:.200}; is it the one that triton ships?")
    return int(found[1]), int(found[2])


def table_text(rows: Sequence[tuple[Sequence[int], dict[int, Resources]]], versions: str) -> str:
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
            if one.stack_bytes or one.smem_bytes > SMEM_PER_CTA_MAX_BYTES[capability]:
                sys.exit(f"{variant_name(shape)} spills or does not fit sm_{capability}; drop it from SHAPES")
        rows.append((shape, found))
    targets = " and ".join(f"sm_{capability}" for capability in COMPUTE_CAPABILITIES)
    TILES_FILE.write_text(table_text(rows, f"triton {triton.__version__} for {targets}"), encoding="utf-8")


if __name__ == "__main__":
    main()
