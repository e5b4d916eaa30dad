"""Compile kernels for a GPU that need not be there: what a tile holds of an SM, and whether it spills.

Not for a process in which Triton interprets.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from .fused import fused_kernel
from .grouped import grouped_kernel
from .pingpong import BLOCK_M, CHUNK_K, GROUP_WARPS, REGS, pingpong_kernel
from .spec import LaunchSpec

PLAIN: dict[str, Any] = {"EPILOGUE": "none", "HAS_BIAS": False, "PRECISION": "ieee"}
GROUPED = PLAIN | dict.fromkeys(("STEAL", "DEPENDENT", "GATHER", "SCATTER", "HAS_SCALE", "UNEVEN"), False)
GROUPED |= {"ALIGNED": True, "EVEN_K": True}
FUSED = PLAIN | {"THREE": True, "DEPENDENT": False, "EPILOGUE": "relu", "EVEN_D": True, "EVEN_F": True}
UP = {"GATHER": True, "EPILOGUE": "swiglu"}
DOWN = {"SCATTER": True}
WIDE_TYPES = dict.fromkeys(("scale_ptr", "weights_ptr", "logits_ptr", "bias_ptr"), "*fp32")
WIDE_TYPES |= dict.fromkeys(("offset_ptr", "bias_offset_ptr"), "*i64")
ROW_SIZES = (
    *("k_dim", "n_dim", "d_model", "d_ff", "prefetch_bytes"),
    *("a_pitch", "out_pitch", "x_pitch", "hidden_pitch", "rows_pitch"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What the compiler gave one CTA."""

    smem_bytes: int
    regs_per_thread: int
    stack_bytes: int
    """Above 0: registers were spilled."""


def kernel_source(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], source_type: type[ASTSource] = ASTSource
) -> ASTSource:
    """Return a kernel's source: arguments without a type are int32, behind a pointer where the name says so."""
    types = WIDE_TYPES | types
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*i32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    # Without divisibility the loads are scalar and the register count means nothing.
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or name in ROW_SIZES]
    return source_type(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})


def grouped_source(spec: LaunchSpec, dtype: str = "bf16", **chosen: Any) -> ASTSource:
    """Return the grouped product's source for a tile; `chosen` are constants that differ from a plain product's."""
    constants = GROUPED | chosen
    constants |= {
        "A_DESC": spec.descriptors and not constants["GATHER"],
        "B_DESC": spec.descriptors,
        "FLATTEN": spec.flatten and not constants["GATHER"],
        "BLOCK_M": spec.block_m,
        "BLOCK_N": spec.block_n,
        "BLOCK_K": spec.block_k,
    }
    types = dict.fromkeys(("a", "b", "out_ptr", "bias_ptr", "weight_ptr"), f"*{dtype}")
    if constants["A_DESC"]:
        types["a"] = f"tensordesc<{dtype}[{spec.block_m},{spec.block_k}]>"
    if constants["B_DESC"]:
        types["b"] = _weight_type(dtype, constants["EPILOGUE"], spec.block_n, spec.block_k)
    return kernel_source(grouped_kernel, constants, types)


def fused_source(spec: LaunchSpec, dtype: str = "bf16", **chosen: Any) -> ASTSource:
    """Return the source of all products of a slice in one launch, of three products unless `chosen` says otherwise."""
    constants = FUSED | chosen
    constants |= {"B_DESC": spec.descriptors, "BLOCK_M": spec.block_m, "BLOCK_K": spec.block_k}
    constants |= {"UP_N": spec.block_n, "DOWN_N": spec.block_n}
    types = {"hidden0_ptr": f"*{dtype}", "hidden1_ptr": f"*{dtype}", "rows_ptr": f"*{dtype}", "x_ptr": f"*{dtype}"}
    types["weight_ptr"] = f"*{dtype}"
    epilogues = (constants["EPILOGUE"], constants["EPILOGUE"] if constants["THREE"] else "none", "none")
    for i, epilogue in enumerate(epilogues):
        held = _weight_type(dtype, epilogue, spec.block_n, spec.block_k) if spec.descriptors else f"*{dtype}"
        types |= {f"b{i}": held, f"bias{i}_ptr": f"*{dtype}"}
    return kernel_source(fused_kernel, constants, types)


def pingpong_source(spec: LaunchSpec, dtype: str = "bf16", **chosen: Any) -> ASTSource:
    """Return the source of the grouped product by specialised warps; a role's constants as in `grouped_source`."""
    constants = {
        "SCATTER": False,
        "EPILOGUE": "none",
        "HAS_BIAS": False,
        **{name: value for name, value in chosen.items() if name != "GATHER"},
        "BLOCK_N": spec.block_n,
        "STAGES": spec.num_stages,
        "CHUNKS": spec.block_k // CHUNK_K.value,
    }
    types = {"out_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}"}
    for name, rows in (("a_desc", BLOCK_M.value), ("b_desc", spec.block_n // 2)):
        block = [rows, CHUNK_K.value]
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
        types[name] = f"tensordesc<{dtype}[{rows},{CHUNK_K.value}],{layout!r}>"
    return kernel_source(pingpong_kernel, constants, types, GluonASTSource)


def _weight_type(dtype: str, epilogue: str, block_n: int, block_k: int) -> str:
    rows = f"2,{block_n // 2}" if epilogue in ("swiglu", "swiglu_clamped") else f"{block_n}"
    return f"tensordesc<{dtype}[{rows},{block_k}]>"


def resources(source: ASTSource, compute_capability: int, **options: Any) -> Resources:
    """Return what one CTA holds as compiled for a GPU of that compute capability (90: Hopper).

    Raises:
        RuntimeError: triton runs as an interpreter in this process.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("triton interprets in this process; unset TRITON_INTERPRET before starting it")
    compiled = triton.compile(source, target=GPUTarget("cuda", compute_capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no registers: {report!r:.200}; is it the one that triton ships?")
    return Resources(smem_bytes=compiled.metadata.shared, regs_per_thread=int(found[1]), stack_bytes=int(found[2]))


def tile_resources(spec: LaunchSpec, compute_capability: int, dtype: str = "bf16", **chosen: Any) -> Resources:
    """Return what one tile of the grouped product holds; `chosen` as in `grouped_source`, or in `fused_source`."""
    if spec.pingpong:
        options = {"num_warps": GROUP_WARPS.value, "maxnreg": REGS}
        return resources(pingpong_source(spec, dtype, **chosen), compute_capability, **options)
    source = fused_source if "THREE" in chosen else grouped_source
    return resources(source(spec, dtype, **chosen), compute_capability, **spec.options)


def main() -> None:
    """Compile the [tile fields, capability, dtype, chosen constants] on standard input; print their resources."""
    jobs = json.load(sys.stdin)
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        json.dump(list(pool.map(_run_job, jobs)), sys.stdout)


def _run_job(job: tuple[dict[str, Any], int, str, dict[str, Any]]) -> dict[str, int]:
    fields, capability, dtype, chosen = job
    return asdict(tile_resources(LaunchSpec(**fields, num_ctas=1), capability, dtype, **chosen))


if __name__ == "__main__":
    main()
