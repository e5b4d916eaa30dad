"""Meter, timer and partitions on a real GPU: figures within physical bounds, slices apart."""

import json
import os
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from expertslice.runtime.meter import EnergyMeter
from expertslice.runtime.partition import Partition
from expertslice.runtime.timer import capture, interleave, paired_ratio, quantiles, sets_to_stay_cold

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(60),
]
SIZE = 8192
COPY_BYTES = 64 * 2**20
PEAK_BYTES_PER_S = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12}
"""Data sheets, SXM."""


def peak_bytes_per_s():
    name = torch.cuda.get_device_name()
    found = [value for key, value in PEAK_BYTES_PER_S.items() if key in name]
    if not found:
        pytest.skip(f"no data sheet of {name}")
    return found[0]


def keep(name, found):
    """Write what was found where EXPERTSLICE_OUT names a folder."""
    if folder := os.environ.get("EXPERTSLICE_OUT"):
        Path(folder, f"{name}.json").write_text(json.dumps(found, indent=1, default=str))


def test_a_matrix_product_draws_between_idle_and_the_limit():
    a, b = (torch.randn(SIZE, SIZE, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    with EnergyMeter(torch.cuda.current_device()) as meter:
        found = meter.measure(lambda: torch.mm(a, b, out=out), warm_up_s=2)
        limit_w = meter.snapshot().limit_w
    keep("product", {"power_w": found.power_w, "step_us": found.step_ns / 1000, "found": found})
    assert 20 < found.idle_w < found.power_w < 1.1 * limit_w
    assert found.duration_ns >= 2e9
    assert found.duration_error_ns < 0.03 * found.duration_ns
    assert found.times_starved == 0
    assert 300 < found.least_sm_clock_mhz <= found.sm_clock_mhz < 3000
    assert found.temperature_c is not None
    # 1e12 operations at up to 1e15 per second and at least half of an A100's rate.
    assert 1e6 < found.step_ns < 8e6


def test_a_copy_is_slower_than_the_data_sheet_and_like_itself():
    peak = peak_bytes_per_s()
    properties = torch.cuda.get_device_properties(0)
    sizes = {"l2_bytes": properties.L2_cache_size, "memory_bytes": properties.total_memory}
    sets = sets_to_stay_cold(2 * COPY_BYTES, 2 * COPY_BYTES, **sizes)
    source, target = (torch.randint(255, (sets, COPY_BYTES), dtype=torch.uint8, device="cuda") for _ in range(2))
    arms = [capture(lambda p: target[p].copy_(source[p]), sets) for _ in range(2)]
    found = {}
    for regime in ("burst", "sustained"):
        timed = interleave(arms, 25, regime, load_s=1)
        copy = quantiles(timed.samples_ns[0])
        ratio = paired_ratio(*timed.samples_ns)
        found[regime] = {"quantiles": copy, "ratio": ratio, "bytes_per_s": 2 * COPY_BYTES / copy.q50_ns * 1e9}
        assert 0.5 * peak < found[regime]["bytes_per_s"] < peak
        assert ratio.low < 1.02
        assert ratio.high > 0.98
    keep("copy", found | {"sets": sets, "layers": arms[0].layers})


@triton.jit
def where_kernel(out_ptr):
    sm = tl.inline_asm_elementwise("mov.u32 $0, %smid; // $1", "=r,r", [0], tl.int32, is_pure=False, pack=1)
    tl.store(out_ptr + tl.program_id(0), sm)


@pytest.mark.parametrize("wanted", [(32, 100), (16, 24, 40)])
def test_streams_of_a_partition_keep_to_sms_of_their_own_also_in_graphs(wanted):
    outs = [torch.full((4096,), -1, dtype=torch.int32, device="cuda") for _ in wanted]
    where_kernel[(4096,)](outs[0])
    torch.cuda.synchronize()
    with Partition(wanted=wanted) as split:
        assert tuple(share.sm_count for share in split.shares) == wanted
        graph, fork = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=fork):
            for share, out in zip(split.shares, outs, strict=True):
                share.stream.wait_stream(fork)
                with torch.cuda.stream(share.stream):
                    where_kernel[(4096,)](out)
                fork.wait_stream(share.stream)
        graph.replay()
        torch.cuda.synchronize()
        used = [set(out.tolist()) for out in outs]
        del graph
    assert [len(sms) for sms in used] == list(wanted)
    assert len(set.union(*used)) == sum(wanted)
