"""Compile the grouped product for a GPU that need not be there: what a tile holds of an SM, and whether it spills.

Not for a process in which Triton interprets.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .grouped import grouped_kernel
from .spec import LaunchSpec

PLAIN: dict[str, Any] = {
    "STEAL": False,
    "DEPENDENT": False,
    "TOP_K": 4,
    "GATHER": False,
    "SCATTER": False,
    "EPILOGUE": "none",
    "HAS_BIAS": False,
    "HAS_SCALE": False,
    "UNEVEN": False,
    "ALIGNED": True,
    "EVEN_K": True,
    "PRECISION": "ieee",
}
UP = {"GATHER": True, "EPILOGUE": "swiglu"}
DOWN = {"SCATTER": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What the compiler gave one CTA."""

    smem_bytes: int
    regs_per_thread: int
    stack_bytes: int
    """Above 0: registers were spilled."""


def grouped_source(spec: LaunchSpec, dtype: str = "bf16", **chosen: Any) -> ASTSource:
    """Return the kernel's source for a tile; `chosen` are constants that differ from a plain product's."""
    constants = PLAIN | chosen
    gated = constants["EPILOGUE"] == "swiglu"
    constants |= {
        "A_DESC": spec.descriptors and not constants["GATHER"],
        "B_DESC": spec.descriptors,
        "FLATTEN": spec.flatten,
        "BLOCK_M": spec.block_m,
        "BLOCK_N": spec.block_n,
        "BLOCK_K": spec.block_k,
    }
    wide = {"scale_ptr": "*fp32", "offset_ptr": "*i64", "bias_offset_ptr": "*i64"}
    types = wide | dict.fromkeys(("a", "b", "out_ptr", "bias_ptr"), f"*{dtype}")
    if constants["A_DESC"]:
        types["a"] = f"tensordesc<{dtype}[{spec.block_m},{spec.block_k}]>"
    if constants["B_DESC"]:
        block = f"2,{spec.block_n // 2}" if gated else f"{spec.block_n}"
        types["b"] = f"tensordesc<{dtype}[{block},{spec.block_k}]>"
    names = grouped_kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*i32" if name.endswith("_ptr") else "i32")
        for name in names
    }
    # Without divisibility the loads are scalar and the register count means nothing.
    sizes = ("k_dim", "n_dim", "a_pitch", "out_pitch")
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in sizes]
    return ASTSource(grouped_kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})


def resources(spec: LaunchSpec, compute_capability: int, dtype: str = "bf16", **chosen: Any) -> Resources:
    """Return what one tile holds as compiled for a GPU of that compute capability (90: Hopper).

    Raises:
        RuntimeError: triton runs as an interpreter in this process.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("triton interprets in this process; unset TRITON_INTERPRET before starting it")
    compiled = triton.compile(
        grouped_source(spec, dtype, **chosen),
        target=GPUTarget("cuda", compute_capability, 32),
        options={"num_warps": spec.num_warps, "num_stages": spec.num_stages, "maxnreg": spec.max_regs},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no registers: {report!r:.200}; is it the one that triton ships?")
    return Resources(smem_bytes=compiled.metadata.shared, regs_per_thread=int(found[1]), stack_bytes=int(found[2]))
