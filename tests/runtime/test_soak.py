"""The executor on a real GPU for long: nothing grows, nothing slows down, and what a change of plan costs.

EXPERTSLICE_SOAK_STEPS says how many steps; `-s` shows the rows.
"""

import contextlib
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from expertslice.experiments.watch import Watch
from expertslice.kernels.layer import moe_layer
from expertslice.policies.contract import ByTokens, Control, Pinned, Plan, Setup, SliceLayout
from expertslice.policies.data import load_device, load_variants
from expertslice.policies.layouts import co_resident_layout, fallback_plan, uniform_slice
from expertslice.policies.loop import drive
from expertslice.policies.registry import make_policy
from expertslice.runtime.backend import RuntimeBackend
from expertslice.runtime.cuda import CudaExecutor, GraphKey
from expertslice.runtime.graphs import CaptureRule
from expertslice.runtime.layers import launch_of
from expertslice.runtime.other import PLACES, OtherKernels, places_of, slice_ids_of
from expertslice.runtime.timer import capture
from expertslice.traces.schema import MoeSpec, OtherWork, RoutedStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(580),
]
STEPS = int(os.environ.get("EXPERTSLICE_SOAK_STEPS", "20000"))
CHANGES = ("same plan", "new plan of the layout", "another layout")
BUCKETS = (64, 256, 512)
PROBE_EVERY, REFERENCE_EVERY = 20, 250
MODEL = MoeSpec(name="soak", num_layers=2, num_experts=16, top_k=4, d_model=1024, d_ff=(1024,))
HOT, COLD = "128x128x64w8s3", "64x128x64w4s3"
MOST_GROWTH_BYTES = 8 << 20
MOST_DRIFT = 0.01


def setup_here():
    device = load_device({"H100": "h100-sxm5-80gb", "H200": "h200-sxm5-141gb"}[torch.cuda.get_device_name().split()[1]])
    variants = load_variants(device.compute_capability)
    return Setup(device=device, model=MODEL, variants=variants, control=Control(delay_steps=0, count_lag_steps=1))


def layouts_of(setup):
    def apart(cold, hot):
        return SliceLayout(
            slices=(uniform_slice("green_context", cold, COLD), uniform_slice("green_context", hot, HOT))
        )

    shared = SliceLayout(slices=(uniform_slice("shared", 132, COLD), uniform_slice("shared", 132, HOT)))
    return (fallback_plan(setup).layout, shared, co_resident_layout(setup, (COLD, HOT)), apart(32, 96), apart(64, 64))


def random_plan(layouts, rng):
    layout = layouts[rng.integers(len(layouts))]
    if rng.random() < 0.5:
        ids = tuple(int(i) for i in rng.integers(0, layout.num_slices, 2))
        placement = ByTokens(bounds=(int(rng.integers(8, 200)),), slice_ids=ids)
    else:
        pinned = rng.integers(0, layout.num_slices, (MODEL.num_layers, MODEL.num_experts))
        placement = Pinned(slice_of_expert_LE=pinned.astype(np.int16))
    order = ("expert", "heavy", "light")[rng.integers(3)]
    return Plan(layout=layout, placement=placement, tile_order=order, steal=bool(rng.random() < 0.2))


def random_step(step, rng):
    num_tokens = int(rng.integers(1, BUCKETS[-1] + 1))
    weights = rng.dirichlet(np.full(MODEL.num_experts, 0.7))
    # The experts of greatest noise and weight: distinct for each token.
    noise = rng.gumbel(size=(num_tokens, MODEL.num_layers, MODEL.num_experts)) + np.log(weights + 1e-9)
    ids_TLK = np.argpartition(-noise, MODEL.top_k, axis=2)[..., : MODEL.top_k].astype(np.uint16)
    counts = [np.bincount(ids_TLK[:, layer].ravel(), minlength=MODEL.num_experts) for layer in range(MODEL.num_layers)]
    work = OtherWork(flops=10**8, hbm_bytes=10**6, slice_id=[None, 0, 1][rng.integers(3)])
    return RoutedStep(
        step=step, phase="mixed", counts_LE=np.stack(counts).astype(np.int32), num_tokens=num_tokens,
        expert_ids_TLK=ids_TLK, other_L=((work,),) * MODEL.num_layers if rng.random() < 0.3 else (),
    )  # fmt: skip


def backend(**options):
    executor = CudaExecutor(
        max_tokens=BUCKETS[-1], energy=False, **{"loads": [(b, frozenset()) for b in BUCKETS]} | options
    )
    return RuntimeBackend(executor, bucket_of=lambda n: next(b for b in BUCKETS if n <= b))


def opened(setup, **options):
    on = backend(**options)
    on.open(setup, layouts_of(setup))
    return on


def key_of(on, plan, step):
    """Return what a step's graph is captured for."""
    places = places_of(slice_ids_of(step.other_L), plan.layout.num_slices)
    return plan.layout, plan.steal, on.bucket_of(step.num_tokens), places


def held():
    """Return bytes of the device and of the host, open files and threads."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    host = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return np.array([total - free, host, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))])


def keep(name, rows):
    """Print rows, and write them where EXPERTSLICE_OUT names a folder."""
    sys.stdout.write(json.dumps({name: rows}, indent=1) + "\n")
    if folder := os.environ.get("EXPERTSLICE_OUT"):
        Path(folder, f"{name}.json").write_text(json.dumps(rows, indent=1))


def of_fifths(samples):
    """Return the medians of the second and of the last fifth."""
    fifth = len(samples) // 5
    return statistics.median(samples[fifth : 2 * fifth]), statistics.median(samples[-fifth:])


def test_steps_of_random_plans_leave_nothing_behind_and_do_not_slow_down():
    setup, rng = setup_here(), np.random.default_rng(0)
    on, layouts = opened(setup), layouts_of(setup)
    plans = [random_plan(layouts, rng) for _ in range(64)]
    steps = [random_step(i, rng) for i in range(64)]
    probe, probe_ns, before = random_step(0, np.random.default_rng(9)), [], None
    # The device's clock wanders by more than what is looked for: a product of fixed size tells by how much.
    a, b, out = (torch.randn(2048, 2048, device="cuda").bfloat16() for _ in range(3))
    reference, reference_ns = capture(lambda _: torch.mm(a, b, out=out), 1), []
    for plan, step in {key_of(on, *one): one for one in itertools.product(plans, [probe, *steps])}.values():
        on.apply(plan)
        on.submit(step)
    on.drain(wait=True)
    for i in range(STEPS):
        # Well after the host has waited: the device is busy.
        probing = i % PROBE_EVERY == PROBE_EVERY // 2
        on.apply(plans[0] if probing else plans[rng.integers(len(plans))])
        on.submit(replace(probe if probing else steps[rng.integers(len(steps))], step=i))
        if i % PROBE_EVERY == PROBE_EVERY - 1:
            on.observe()
        probe_ns += [r.end_ns - r.start_ns for r in on.drain() if r.step % PROBE_EVERY == PROBE_EVERY // 2]
        if i % REFERENCE_EVERY == 0:
            on.drain(wait=True)
            reference_ns.append(reference.time_ns())
        if i == STEPS // 5:
            on.drain(wait=True)
            before = held()
    on.drain(wait=True)
    after, num_graphs = held(), len(on.executor._graphs)
    first, last = of_fifths(probe_ns)
    first_clock, last_clock = of_fifths(reference_ns)
    drift = last / first / (last_clock / first_clock) - 1
    grown = dict(zip(("device_bytes", "host_bytes", "files", "threads"), (after - before).tolist(), strict=True))
    took = {"grown": grown, "probe_us": [first / 1000, last / 1000]}
    took |= {"reference_us": [first_clock / 1000, last_clock / 1000], "drift": drift}
    room = {"graph_bytes": on.executor._graphs.held_bytes, "device_bytes": int(after[0])}
    keep("soak", {"steps": STEPS, "graphs": num_graphs, **room, **took})
    assert on.num_fallbacks == on.executor.num_eager == 0
    on.close()
    assert grown["device_bytes"] <= MOST_GROWTH_BYTES
    assert grown["host_bytes"] <= MOST_GROWTH_BYTES
    assert (grown["files"], grown["threads"]) == (0, 0)
    assert abs(drift) < MOST_DRIFT


def test_graphs_that_come_and_go_leave_nothing_behind():
    setup, rng = setup_here(), np.random.default_rng(2)
    on, layouts = opened(setup, graph_bytes=0, loads=()), layouts_of(setup)
    for i in range(400):
        on.apply(replace(fallback_plan(setup), layout=layouts[i % len(layouts)]))
        on.submit(random_step(i, rng))
        on.drain(wait=True)
        if i == 200:
            before = held()
    grown = (held() - before).tolist()
    keep("graphs", {"grown": grown})
    on.close()
    assert max(grown[:2]) <= MOST_GROWTH_BYTES
    assert grown[2:] == [0, 0]


def test_a_thousand_random_plans_give_the_same_bits():
    setup, rng = setup_here(), np.random.default_rng(4)
    on, layouts = opened(setup), layouts_of(setup)
    executor, plain = on.executor, launch_of(fallback_plan(setup), setup)
    for i in range(1000):
        step = random_step(i, rng)
        on.apply(random_plan(layouts, rng))
        on.submit(step)
        on.drain(wait=True)
        ws, tokens = executor._workspaces[-1], step.num_tokens
        out = ws.out_TD[:tokens].clone()
        ws.plan.zero_()
        expected = moe_layer(
            executor._x_TD[:tokens], executor._logits_LTE[-1, :tokens],
            executor._weights[(MODEL.num_layers - 1) % len(executor._weights)], executor._router, ws, plain,
        )  # fmt: skip
        assert torch.equal(out, expected), i
    assert on.num_fallbacks == 0
    on.close()


def submitted(on, plans, step, rng, num_steps=600):
    """Return rows of medians by what changed at a step, us: host time to apply a plan and submit, all mixed."""
    host_ns, cases, at, layout = [], [], 0, 0
    for i in range(num_steps):
        cases.append(CHANGES[rng.integers(len(plans) + 1)])
        at += cases[-1] == "new plan of the layout"
        layout = (layout + (cases[-1] == "another layout")) % len(plans)
        begin_ns = time.perf_counter_ns()
        on.apply(plans[layout][at % len(plans[layout])])
        on.submit(replace(step, step=i, other_L=()))
        host_ns.append(time.perf_counter_ns() - begin_ns)
        on.drain(wait=i % 4 == 3)
    return [
        {"case": case, "submit_us_q50": statistics.median(some) / 1000}
        for case in CHANGES
        if (some := [ns for ns, one in zip(host_ns[100:], cases[100:], strict=True) if one == case])
    ]


def device_us(replays):
    """Return the device's time of one replay, of many in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The first time warms up.
    for _ in range(2):
        start.record()
        for replay in replays:
            replay()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) * 1000 / len(replays)


@pytest.mark.benchmark
def test_what_a_change_of_plan_costs():
    setup, rng = setup_here(), np.random.default_rng(5)
    on, layouts = opened(setup), layouts_of(setup)
    same, other = (
        [replace(random_plan((layout,), rng), steal=False) for _ in range(600)] for layout in (layouts[2], layouts[3])
    )
    step = random_step(0, np.random.default_rng(1))
    rows = submitted(on, (same, other), step, rng)
    bucket = on.bucket_of(step.num_tokens)
    a, b = (on.executor._replay_of(GraphKey(p[0].layout, False, bucket, frozenset()), 1) for p in (same, other))
    alone_us, turns_us = (device_us([a] * 100) + device_us([b] * 100)) / 2, device_us([a, b] * 50)
    rows.append({"case": "device, layouts in turn over each alone", "step_us_q50": turns_us - alone_us})
    on.close()
    on = opened(setup, rule=CaptureRule(least_calls=10**9))
    rows += [row | {"graph": False} for row in submitted(on, (same[:1],), step, rng)[:1]]
    on.close()
    keep("plan_changes", rows)


@pytest.mark.benchmark
def test_what_other_work_takes():
    held = torch.cuda.get_device_properties(0)
    asked = torch.zeros(1, PLACES, 3, dtype=torch.int64, device="cuda")
    kernels = OtherKernels(asked, "bf16", l2_bytes=held.L2_cache_size, sm_count=held.multi_processor_count)
    rows = []
    for name, num_bytes, flops in (("read", 2**30, 0), ("product", 0, 10**12), ("both", 2**30, 10**11 * 2)):
        asked[0, 0] = torch.tensor([num_bytes, flops, 0])
        arm = capture(lambda _: kernels.launch(0, 0), 1)
        ns = statistics.median(arm.time_ns() for _ in range(5))
        rows.append({"work": name, "us": ns / 1000, "tb_per_s": num_bytes / ns / 1000, "tflops": flops / ns / 1000})
    keep("other_work", rows)


@pytest.mark.benchmark
def test_what_profiling_costs():
    """A run of steps with a profiler and its counters over one without, in turn: host time, and the device's."""
    setup, rng = setup_here(), np.random.default_rng(7)
    steps = [replace(random_step(i, rng), other_L=()) for i in range(300)]
    begun_ns = []

    def timed(some):
        # Not before the backend is open.
        begun_ns.append(time.perf_counter_ns())
        yield from some

    def run(profiled):
        on, took_ns, ended_ns = backend(), [], []
        watch = Watch(setup, counters=True) if profiled else None

        def on_record(record):
            if watch:
                watch.finished(record)
            took_ns.append(record.end_ns - record.start_ns)
            ended_ns.append(time.perf_counter_ns())

        with watch or contextlib.nullcontext():
            drive(
                make_policy("hot_cold"), on, timed(watch.steps(iter(steps)) if watch else iter(steps)), setup,
                on_record=on_record, on_decision=watch.decided if watch else None,
            )  # fmt: skip
        return ended_ns[-1] - begun_ns[-1], sum(took_ns)

    run(True)
    found = [(run(False), run(True)) if i % 2 else (run(True), run(False))[::-1] for i in range(8)]
    ratios = [[on / off for on, off in zip(with_it, without, strict=True)] for without, with_it in found]
    wall, device = (statistics.median(some) for some in zip(*ratios, strict=True))
    keep("profiling", {"runs": len(found), "steps": len(steps), "wall_over": wall, "device_over": device})
