"""Every shipped tile compiles for sm_90 and sm_80 without spilling and fits: in a process that does not interpret."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from expertslice.experiments.compile_tiles import SHAPES, SMEM_PER_CTA_MAX_BYTES, SPILL_BYTES
from expertslice.kernels.launches import PINGPONG, TILES

UP, DOWN, RELU = {"GATHER": True, "EPILOGUE": "swiglu"}, {"SCATTER": True}, {"GATHER": True, "EPILOGUE": "relu"}
GELU = {"GATHER": True, "EPILOGUE": "gelu"}
FIELDS = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
REGS_PER_SM, SMEM_PER_SM_BYTES, RESERVED_SMEM_BYTES = 65_536, 233_472, 1024


def compile_all(jobs):
    """Return the resources of each [tile fields, capability, dtype, constants]."""
    links = Path(__file__).parents[2] / ".links"
    paths = [str(links), *sys.path] if links.exists() else sys.path
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-P", "-m", "expertslice.kernels.ahead"]
    done = subprocess.run(command, input=json.dumps(jobs), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(jobs, spill_bytes):
    found = compile_all(jobs)
    tight = [
        (job, one)
        for job, one in zip(jobs, found, strict=True)
        if one["stack_bytes"] > spill_bytes[job[1]] or one["smem_bytes"] > SMEM_PER_CTA_MAX_BYTES[job[1]]
    ]
    assert not tight


def tiles(**options):
    return [dict(zip(FIELDS, shape, strict=True)) | options for shape in SHAPES]


def test_shipped_tiles_compile_without_spilling():
    check([[fields, capability, "bf16", UP] for fields in tiles() for capability in (90, 80)], {90: 0, 80: SPILL_BYTES})


def test_tiles_of_launches_compile_without_spilling():
    chosen = [asdict(spec) for by_height in TILES.values() for spec, _ in by_height]
    fields = [{name: one[name] for name in FIELDS} for one in chosen]
    hopper = [one | {"descriptors": True, "flatten": True} for one in fields if one["block_m"] >= 64]
    clamped = [
        [one, 90, "bf16", UP | {"EPILOGUE": "swiglu_clamped", "HAS_BIAS": True}] for one in (fields[0], hopper[0])
    ]
    check([[one, 90, "bf16", role] for one in (*fields, *hopper) for role in (UP, DOWN)] + clamped, {90: 0})


def test_pingpong_tiles_compile_without_spilling():
    fields = [{name: value for name, value in asdict(spec).items() if name != "num_ctas"} for spec in PINGPONG]
    check([[one, 90, "bf16", role] for one in fields for role in (UP, DOWN)], {90: 0})


def test_hot_and_cold_tiles_fit_one_sm():
    hot = dict(zip(FIELDS, (128, 128, 64, 8, 4), strict=True))
    cold = [dict(zip(FIELDS, (64, 128, 64, 4, stages), strict=True)) for stages in (3, 4)]
    jobs = [[fields, 90, "bf16", role] for fields in (hot, *cold) for role in (UP, DOWN)]
    found = compile_all(jobs)
    smem = [one["smem_bytes"] + RESERVED_SMEM_BYTES for one in found]
    regs = [
        -(-one["regs_per_thread"] * 32 // 256) * 256 * job[0]["num_warps"] for one, job in zip(found, jobs, strict=True)
    ]
    for neighbour in range(2, len(jobs)):
        for hot_role in (0, 1):
            assert smem[hot_role] + smem[neighbour] <= SMEM_PER_SM_BYTES
            assert regs[hot_role] + regs[neighbour] <= REGS_PER_SM


def test_fused_launches_compile_without_spilling():
    light = [t for t in tiles() if t["block_m"] <= 64]
    roles = [{"THREE": True}, {"THREE": False, "EPILOGUE": "swiglu"}]
    jobs = [[fields, capability, "bf16", role] for fields in light for capability in (90, 80) for role in roles]
    check(jobs, {90: SPILL_BYTES, 80: SPILL_BYTES})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_way_to_launch_a_tile_compiles_without_spilling():
    roles = [DOWN, RELU, UP | {"HAS_BIAS": True}, UP | {"STEAL": True}, DOWN | {"STEAL": True}]
    hopper = [{"descriptors": True}, {"descriptors": True, "flatten": True}, {"flatten": True}]
    jobs = [[fields, capability, "bf16", role] for fields in tiles() for capability in (90, 80) for role in roles]
    jobs += [[fields, 90, "bf16", role] for options in hopper for fields in tiles(**options) for role in (UP, DOWN)]
    # GELU's error function does not fit beside an accumulator of 128 registers a thread.
    light = [t for t in tiles() if t["block_m"] * t["block_n"] <= 64 * 32 * t["num_warps"]]
    jobs += [[fields, 90, dtype, GELU] for fields in light for dtype in ("bf16", "fp16")]
    check(jobs, {90: 2 * SPILL_BYTES, 80: 4 * SPILL_BYTES})
