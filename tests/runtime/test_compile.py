"""The runtime's own kernels compile for Hopper without a GPU: wide loads, matrix instructions, nothing spilled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from expertslice.kernels.ahead import kernel_source, resources
from expertslice.runtime.back import BLOCK, back_kernel
from expertslice.runtime.lanes import stamp_kernel
from expertslice.runtime.other import CHUNK_WORDS, NUM_WARPS, TILE, other_kernel
from expertslice.runtime.upload import logits_kernel

m, n, k = TILE["bf16"]
constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "CHUNK": CHUNK_WORDS}
types = {"tile_ptr": "*bf16", "sink_ptr": "*fp32", "asked_ptr": "*i64"}
sources = {"other": kernel_source(other_kernel, constants, types),
           "stamp": kernel_source(stamp_kernel, {}, {"out_ptr": "*i64"})}
constants = {"K": 8, "BLOCK_T": 16, "BLOCK_E": 128, "CHOSEN": 8.0, "STEP_DOWN": 0.125, "OTHERS": -8.0}
types = {"ids_ptr": "*i16", "num_tokens_ptr": "*i32", "logits_ptr": "*bf16"}
sources["logits"] = kernel_source(logits_kernel, constants, types)
types = {f"{name}{out}_ptr": kind for name, kind in (("counts", "*i32"), ("stamps", "*i64")) for out in ("", "_out")}
sources["back"] = kernel_source(back_kernel, {"BLOCK": BLOCK}, types | {"slot_ptr": "*i32"})
found = {}
for name, source in sources.items():
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS}).asm["ptx"]
    held = resources(source, 90, num_warps=NUM_WARPS)
    found[name] = {"ptx": ptx, "stack": held.stack_bytes, "regs": held.regs_per_thread, "smem": held.smem_bytes}
json.dump(found, sys.stdout)
"""


@pytest.mark.slow
def test_other_work_stamps_and_the_ways_of_steps_compile_as_they_should():
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    links = Path(__file__).parents[2] / ".links"
    env["PYTHONPATH"] = os.pathsep.join([*([str(links)] if links.exists() else []), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-P", "-c", SCRIPT], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    other = found["other"]
    assert other["ptx"].count("wgmma.mma_async") >= 4
    assert "ld.global.v4" in other["ptx"]
    assert other["stack"] == 0
    # Two CTAs share an SM: one reads, the other multiplies.
    assert 2 * (other["smem"] + 1024) <= 233_472
    assert "%globaltimer" in found["stamp"]["ptx"]
    assert (found["logits"]["stack"], found["back"]["stack"]) == (0, 0)
