"""How a point of the paper's tables is measured: arms in bursts, under load, part by part, what graphs cost, tokens.

Each probe returns rows; an arm that fails or computes something else is a row that says so. Torch is imported inside
functions alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..policies.contract import DeviceSpec
from ..policies.data import device_names, load_device
from ..policies.registry import POLICIES, make_policy
from ..runtime.meter import EnergyMeter, Window
from ..runtime.timer import Captured, capture, interleave
from ..runtime.utilisation import Utilisation
from ..traces.schema import DTYPE_BYTES, RoutedStep
from .bench_arms import Batch
from .bench_contenders import EAGER_GROUPED, GROUPED, OURS, expert_graphs, sequential
from .bench_measure import Course, energy, measure, prepare
from .bench_peers import PEERS
from .bench_rows import LONG_LAYER_US, Point, Work, in_us
from .fidelity_records import drawn_counts_LE
from .profile import Streams
from .profile_parts import costs as launch_costs
from .profile_parts import host_ns
from .reproduce_arms import FASTMOE, TABLE, TUTEL, cells, launch_of, parts_of
from .simulate import World, simulate

Row = dict[str, Any]
ROUNDS = 8
HF = ("hf_eager", "hf_grouped_mm", "hf_batched_mm")
COMPILED = "torch_grouped_compiled"
LOOPS = ("sequential", "sequential_graph", FASTMOE, TUTEL)
UNDER_LOAD = (OURS, "sequential", FASTMOE, TUTEL)
SIMULATED_LAYERS, SIMULATED_STEPS, WARM_STEPS = 16, 60, 2
"""Layers alike in a step; the first steps run before the policy's first plan takes effect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all probes on a GPU share."""

    device: DeviceSpec
    """Whose ceilings give floors."""
    meter: EnergyMeter
    idle: Window | None
    """None: no probe asks."""


def arms(point: Point, batch: Batch, bench: Bench) -> list[Row]:
    """Return times in bursts of ours, of PyTorch, of the stand-ins and, where they have such layers, of peers."""
    swiglu = (*HF, *PEERS) if point.kind == "swiglu" else ()
    # Compiling takes longer than all else that is measured of a point.
    compiled = (COMPILED,) if (point.dtype, point.tokens, point.skew) == ("bf16", 256, "uniform") else ()
    names = (OURS, "ours_paper", *LOOPS, grouped_by_torch(point), *compiled, *swiglu)
    return _in_bursts(names, point, batch, bench)


def grouped_by_torch(point: Point) -> str:
    """Return the arm that is torch's grouped product: captured where it can be, and in fp32 it asks the host."""
    return EAGER_GROUPED if point.dtype == "fp32" else GROUPED


def factorial(point: Point, batch: Batch, bench: Bench) -> list[Row]:
    """Return times in bursts of every combination of kernels, graphs, slices and streams."""
    return _in_bursts((OURS, grouped_by_torch(point), *cells()), point, batch, bench)


def _in_bursts(names: Sequence[str], point: Point, batch: Batch, bench: Bench) -> list[Row]:
    course = Course(
        arms=tuple(names), regimes=("burst",), rounds=ROUNDS, energy=False, device=bench.device, table=TABLE
    )
    return measure(point, batch, course, bench.meter, None)


def load(point: Point, batch: Batch, bench: Bench) -> list[Row]:
    """Return energy, power and what is busy, by NVML's counters, while an arm runs without pause for seconds."""
    floor_us = Work.of(batch).floor_us(bench.device)
    sets = 1 if floor_us > LONG_LAYER_US else len(batch.sets)
    names = (*UNDER_LOAD, grouped_by_torch(point))
    ready, found = prepare(batch, {name: TABLE[name] for name in names}, sets)
    rows: list[Row] = []
    for name in names:
        row: Row = {"arm": name, "floor_us": floor_us, **found[name]}
        if name in ready:
            row |= under_load(ready[name], point.tokens, bench)
            row |= {"useful_share": floor_us / row["energy_us"]} if "energy_us" in row else {}
        rows.append(row)
    return rows


def under_load(arm: Captured, num_tokens: int, bench: Bench) -> Row:
    """Return energy and the busy shares of SMs, tensor units and DRAM of an arm that runs without pause."""
    with Utilisation(EnergyMeter(0)) as used:
        found = energy(arm, num_tokens, bench.meter, bench.idle)
        busy = {f"busy_{name.split()[0].lower()}": share for name, share in used.read().items()}
    return {**found, **busy, **({"busy_reason": used.reason} if used.reason else {})}


def parts(point: Point, batch: Batch, bench: Bench) -> list[Row]:
    """Return each operation's time in a graph and its share of DRAM's bandwidth, counted by NVML under load."""
    steps = parts_of(batch)
    captured = {name: capture(step, len(batch.sets)) for name, step in steps.items()}
    samples = interleave(list(captured.values()), ROUNDS, "burst").samples_ns
    peak, asked = peak_bytes_per_s(bench.meter), least_bytes(batch)
    rows: dict[str, Row] = {}
    for (name, arm), samples_ns in zip(captured.items(), samples, strict=True):
        row = rows[name] = {"arm": name, "status": "ok", **in_us("", samples_ns)}
        row |= under_load(arm, point.tokens, bench)
        if row.get("busy_dram") is not None and "energy_us" in row:
            row["dram_bytes"] = row["busy_dram"] * peak * row["energy_us"] / 1e6
    rows["ours experts"] = without(rows["ours routing and experts"], rows["ours routing"])
    for name, row in rows.items():
        if (least := asked.get(name.partition(" ")[2])) is not None:
            node_s = bench.device.graph_node_ns / 1e9
            row |= {"least_bytes": least, "limit_share": min(1.0, least / node_s / peak)}
            row["dram_share"] = row["dram_bytes"] / (row["energy_us"] / 1e6) / peak if "dram_bytes" in row else None
            row["least_share"] = least / (row["us_q50"] / 1e6) / peak
    return list(rows.values())


def without(both: Row, first: Row) -> Row:
    """Return a row of what runs after another: times and bytes of both less those of the first."""
    names = [name for name in ("us_q20", "us_q50", "us_q80", "energy_us", "dram_bytes") if {*both} & {name} & {*first}]
    return {"arm": "ours experts", "status": "ok", **{name: both[name] - first[name] for name in names}}


def peak_bytes_per_s(meter: EnergyMeter) -> float:
    """Return DRAM's peak bandwidth, by its clock and its bus: what NVML's share is of."""
    mhz = meter.nvml.nvmlDeviceGetMaxClockInfo(meter.handle, meter.nvml.NVML_CLOCK_MEM)
    return 2 * mhz * 1e6 * meter.nvml.nvmlDeviceGetMemoryBusWidth(meter.handle) / 8


def least_bytes(batch: Batch) -> dict[str, float]:
    """Return the bytes that each operation must move, the mean over weight sets."""
    spec, tokens = batch.spec, len(batch.x_TD)
    rows, wide = tokens * spec.top_k, spec.d_model * DTYPE_BYTES[spec.dtype]
    return {
        "routing": 4.0 * tokens * spec.num_experts + 8 * rows,
        "experts": Work.of(batch).hbm_bytes + (tokens + rows) * wide,
        "aggregation": (rows + tokens) * wide + 4.0 * rows,
    }


def costs(point: Point, batch: Batch, bench: Bench) -> list[Row]:
    """Return what launches and graphs cost, and the time and memory of capturing the paper's graphs and ours."""
    streams = Streams()
    rows = launch_costs(streams)
    streams.close()
    from .bench_arms import our_step

    eager = sequential(batch).step
    eager(0)
    call_ns = float(np.median(host_ns(lambda: eager(0), wait=True, repeats=10)))
    weights = len(batch.sets) * batch.spec.num_experts * batch.spec.expert_bytes()
    ours = our_step(batch, launch_of(batch))
    ours(0)
    for name, build in (
        ("expert graphs", lambda: expert_graphs(batch)),
        ("layer graph", lambda: capture(ours, len(batch.sets))),
    ):
        rows.append({"arm": name, "status": "ok", **captured_cost(build, call_ns, weights)})
    return rows


def captured_cost(build: Callable[[], object], call_ns: float, weights_bytes: int) -> Row:
    """Return what a capture takes: seconds, eager calls of the same time, memory, and its share of the weights'."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    began_ns = time.perf_counter_ns()
    held = build()
    torch.cuda.synchronize()
    took_ns = time.perf_counter_ns() - began_ns
    torch.cuda.empty_cache()
    left, _ = torch.cuda.mem_get_info()
    del held
    taken = max(0, free - left)
    return {
        "seconds": took_ns / 1e9,
        "of_calls": took_ns / call_ns,
        "bytes": taken,
        "of_weights": taken / weights_bytes,
    }


def tokens(point: Point, batch: Batch, bench: Bench) -> list[Row]:
    """Return whether our own model's loss and greedy tokens stay the same under every policy."""
    from .reproduce_tokens import generations

    del point, batch
    return generations(bench.device.name)


def simulated(point: Point) -> list[Row]:
    """Return what the simulator says of a layer on every device, unsliced; and of every policy on an H100."""
    ahead = [(name, "unsliced", name) for name in device_names()]
    names = [name for name in POLICIES if name != "unsliced" and not POLICIES[name].foresees]
    return [_simulated(point, *one) for one in [*ahead, *(("h100-sxm5-80gb", name, name) for name in names)]]


def _simulated(point: Point, device_name: str, policy: str, arm: str) -> Row:
    device = load_device(device_name)
    spec = replace(point.spec, num_layers=SIMULATED_LAYERS)
    drawn = drawn_counts_LE(point.spec, point.tokens, point.skew)
    counts_LE = np.resize(drawn, (SIMULATED_LAYERS, spec.num_experts))
    step = partial(RoutedStep, phase="decode", arrival_ns=None, counts_LE=counts_LE, expert_ids_TLK=None)
    steps = [step(step=i) for i in range(SIMULATED_STEPS)]
    try:
        out = simulate(make_policy(policy), steps, World(device=device, model=spec))
    except ValueError as error:
        return {"arm": arm, "status": "failed", "reason": str(error)}
    us = float(np.median(out.times()[WARM_STEPS:])) / SIMULATED_LAYERS / 1000
    calls = SIMULATED_STEPS * SIMULATED_LAYERS
    joules, seconds = sum(w.energy_uj or 0 for w in out.energy) / 1e6, sum(w.duration_ns for w in out.energy) / 1e9
    peak = max(device.read_curve_bytes_per_s)
    return {
        "arm": arm, "status": "ok", "us_q20": us, "us_q50": us, "us_q80": us, "energy_us": seconds / calls * 1e6,
        "energy_per_token_uj": joules * 1e6 / calls / point.tokens, "energy_power_w": joules / seconds,
        "dram_share": min(1.0, out.hbm_bytes / seconds / peak),
    }  # fmt: skip


Probe = Callable[[Point, Batch, Bench], list[Row]]
PROBES: dict[str, Probe] = {
    "arms": arms, "factorial": factorial, "load": load, "parts": parts, "costs": costs, "tokens": tokens,
}  # fmt: skip
SIMULATED = "simulated"
"""The probe that needs no GPU."""
