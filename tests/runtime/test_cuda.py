"""The executor on a real GPU: the plans of the simulator, the bits of one launch, no host waits, nothing left."""

import gc
import itertools
import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from expertslice.experiments.run import stoppable
from expertslice.kernels.layer import moe_layer
from expertslice.policies.contract import ByTokens, Pinned, Plan, Setup, SliceLayout
from expertslice.policies.cost import CostModel
from expertslice.policies.data import load_device, load_variants
from expertslice.policies.layouts import co_resident_layout, fallback_plan, uniform_slice
from expertslice.policies.loop import drive
from expertslice.policies.registry import make_policy
from expertslice.runtime.backend import ExecutorError, RuntimeBackend
from expertslice.runtime.cuda import CudaExecutor
from expertslice.runtime.layers import launch_of
from expertslice.sim.backend import SimBackend
from expertslice.traces.schema import MoeSpec, OtherWork, RoutedStep, next_power_of_two

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(200),
]
MODEL = MoeSpec(name="test", num_layers=3, num_experts=16, top_k=4, d_model=512, d_ff=(768,))
HOT, COLD = "128x128x64w8s3", "64x128x64w4s3"


def setup_here():
    device = load_device({"H100": "h100-sxm5-80gb", "H200": "h200-sxm5-141gb"}[torch.cuda.get_device_name().split()[1]])
    return Setup(device=device, model=MODEL, variants=load_variants(device.compute_capability))


def draw_steps(num_steps, most_tokens=300, seed=0):
    rng = np.random.default_rng(seed)
    for step in range(num_steps):
        num_tokens = int(rng.integers(1, most_tokens + 1))
        ids_TLK = np.stack([[rng.permutation(16)[:4] for _ in range(3)] for _ in range(num_tokens)]).astype(np.uint16)
        counts_LE = np.stack([np.bincount(ids_TLK[:, layer].ravel(), minlength=16) for layer in range(3)])
        yield RoutedStep(
            step=step,
            phase="mixed",
            counts_LE=counts_LE.astype(np.int32),
            num_tokens=num_tokens,
            expert_ids_TLK=ids_TLK if step % 2 else None,
        )


def layouts_of(setup):
    tiles = {v.name for v in setup.variants}
    assert {HOT, COLD} <= tiles
    apart = (uniform_slice("green_context", 32, COLD), uniform_slice("green_context", 96, HOT))
    return (
        fallback_plan(setup).layout,
        SliceLayout(slices=(uniform_slice("shared", 132, COLD), uniform_slice("shared", 132, HOT))),
        co_resident_layout(setup, (COLD, HOT)),
        SliceLayout(slices=apart),
    )


def random_plan(layout, rng):
    num_slices = layout.num_slices
    if rng.random() < 0.5:
        placement = ByTokens(bounds=(40,), slice_ids=tuple(int(i) for i in rng.integers(0, num_slices, 2)))
    else:
        placement = Pinned(slice_of_expert_LE=rng.integers(0, num_slices, (3, 16)).astype(np.int16))
    order = ("expert", "heavy", "light")[rng.integers(3)]
    return Plan(layout=layout, placement=placement, tile_order=order, steal=bool(rng.random() < 0.3))


def backend(max_tokens=512, **options):
    options = {"energy": False} | options
    return RuntimeBackend(CudaExecutor(max_tokens=max_tokens, **options), bucket_of=next_power_of_two)


@pytest.mark.parametrize("name", ["unsliced", "static", "proportional", "hot_cold"])
def test_policies_decide_here_as_in_the_simulator(name):
    setup = setup_here()
    decided = ([], [])
    truth = CostModel(device=setup.device, model=MODEL, variants=setup.variants)
    for on, seen in zip((backend(), SimBackend(truth)), decided, strict=True):
        records = []
        drive(
            make_policy(name), on, draw_steps(30), setup, on_record=records.append,
            on_decision=lambda obs, plan, seen=seen: seen.append((obs.step, plan.plan_id)),
        )  # fmt: skip
        assert [r.step for r in records] == list(range(30))
        assert all(r.fallback is None for r in records[1:])
        for record in records:
            assert record.start_ns < record.end_ns
            assert (record.busy_ns_LS > 0).all()
            # Events resolve half a microsecond.
            assert record.start_ns_LS.min() > record.start_ns - 5_000
            assert (record.start_ns_LS + record.busy_ns_LS).max() < record.end_ns + 5_000
    assert decided[0] == decided[1]


def test_every_layout_and_plan_gives_the_bits_of_one_launch():
    setup, rng = setup_here(), np.random.default_rng(4)
    layouts, on = layouts_of(setup), backend()
    on.open(setup, layouts)
    executor = on.executor
    for step in draw_steps(200, seed=5):
        on.apply(random_plan(layouts[rng.integers(len(layouts))], rng))
        on.submit(step)
        on.drain(wait=True)
        ws, tokens = executor._workspaces[2], step.num_tokens
        out = ws.out_TD[:tokens].clone()
        plain = launch_of(fallback_plan(setup), setup)
        ws.plan.zero_()
        expected = moe_layer(
            executor._x_TD[:tokens], executor._logits_LTE[2, :tokens], executor._weights[2 % len(executor._weights)],
            executor._router, ws, plain,
        )  # fmt: skip
        assert torch.equal(out, expected), step.step
    on.close()


WORK = (OtherWork(flops=2_000_000_000, hbm_bytes=20_000_000), OtherWork(flops=0, hbm_bytes=9_000_000, slice_id=1))


def even_steps(num_steps, work):
    counts_LE = np.full((3, 16), 75, dtype=np.int32)
    for i in range(num_steps):
        yield RoutedStep(
            step=i, phase="mixed", counts_LE=counts_LE, num_tokens=300, other_L=(WORK,) * 3 if work else ()
        )


@pytest.mark.parametrize("work", [False, True])
def test_steady_state_never_waits_for_the_device(work):
    setup, rng = setup_here(), np.random.default_rng(1)
    layouts, on = layouts_of(setup), backend(loads=[(512, frozenset())])
    plans = [replace(random_plan(layout, rng), steal=False) for layout in layouts]
    on.open(setup, layouts)
    steps = iter(even_steps(60, work))

    def run(num_steps):
        records = []
        for i in range(num_steps):
            on.submit(next(steps))
            on.observe()
            on.apply(plans[i % len(plans)])
            records += on.drain()
        return records

    run(12)
    on.drain(wait=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        records = run(40)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    records += on.drain(wait=True)
    on.close()
    assert len(records) == 40
    assert all(record.capture_ns == 0 and record.fallback is None for record in records)


def test_other_work_lies_where_it_is_asked_for():
    setup = setup_here()
    layouts = layouts_of(setup)
    on, found = backend(loads=[(512, frozenset())]), {}
    on.open(setup, layouts)
    before = OtherWork(flops=0, hbm_bytes=300_000_000)
    for name, works in (("none", ()), ("before", (before,)), ("beside", (replace(before, slice_id=1),))):
        plan = Plan(layout=layouts[3], placement=ByTokens(bounds=(), slice_ids=(0,)))
        for step in even_steps(8, False):
            on.apply(plan)
            on.submit(replace(step, other_L=(works,) * 3))
        found[name] = on.drain(wait=True)[-1]
    on.close()
    # 300 MB at 4.8 TB/s at most take 62 us, in each of three layers.
    took = {name: record.end_ns - record.start_ns for name, record in found.items()}
    assert min(took["before"], took["beside"]) > took["none"] + 3 * 40_000
    busy = {name: record.busy_ns_LS.sum(axis=0) for name, record in found.items()}
    assert busy["beside"][1] > busy["none"][1] + 3 * 60_000
    assert busy["before"][1] < busy["none"][1] + 3 * 60_000


def test_energy_windows_cover_a_run_without_stopping_it():
    setup, on = setup_here(), backend(loads=[(512, frozenset())], energy=True)
    on.open(setup, ())
    records, end = [], time.monotonic() + 5
    for step in even_steps(10**6, False):
        on.submit(step)
        records += on.drain()
        if time.monotonic() > end:
            break
    records += on.drain(wait=True)
    windows = on.close()
    assert windows
    for one, after in itertools.pairwise(windows):
        assert after.first_step == one.last_step + 1
    for window in windows:
        assert window.duration_ns >= 2e9
        assert 20 < window.idle_w < 800
        assert 20 < window.energy_uj / window.duration_ns * 1000 < 800
        assert window.sm_clock_mhz > 300
    assert windows[-1].last_step == records[-1].step


def test_a_stop_leaves_records_and_the_gpu_as_found():
    torch.cuda.synchronize()
    setup, records, on = setup_here(), [], backend()
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))

    class Started(type(make_policy("hot_cold"))):
        def plan(self, obs, state):
            if obs.step == 0:
                timer.start()
            return super().plan(obs, state)

    with pytest.raises(KeyboardInterrupt), stoppable(even_steps(10**6, False)) as steps:
        drive(Started(), on, steps, setup, on_record=records.append)
    records += on.drain(wait=True)
    assert [record.step for record in records] == list(range(len(records)))
    assert len(records) > 10
    del on
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() < 1 << 20


def test_what_cannot_run_is_one_sentence():
    setup = setup_here()
    on = backend(max_tokens=64)
    on.open(setup, ())
    with pytest.raises(ExecutorError, match="buffers hold 64, give more"):
        on.submit(next(step for step in draw_steps(9) if step.num_tokens > 64))
    on.close()
    other = replace(setup, device=load_device("a100-sxm4-80gb"))
    with pytest.raises(ValueError, match="choose the device that is here"):
        backend().open(other, ())
