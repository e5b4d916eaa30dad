"""What a profile measures beside layers: bandwidth by SMs, neighbours, fixed costs, power.

Streams and products are those of `runtime.other`: one CTA an SM reads, another multiplies. Torch is imported inside
functions alone.
"""

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..policies.contract import DeviceSpec, SliceLayout
from ..policies.layouts import uniform_slice
from ..runtime.meter import EnergyMeter
from ..runtime.timer import capture, interleave
from .bench_rows import in_us
from .slices_load import Step, beside

if TYPE_CHECKING:
    from ..runtime.other import OtherKernels

SMS = (4, 8, 16, 32, 48, 64, 80, 96, 112, 132)
APART_SMS = (16, 32, 48, 64, 96)
READ_BYTES, FLOPS = 400_000_000, 120_000_000_000
"""Some hundred microseconds on a whole H100 each, and no burst too long on few SMs; the bytes exceed L2 eight times."""
READS, MULTIPLIES = 1, 2
"""Places of `runtime.other` that the parts stand for."""
NODES, REPEATS = 1000, 200
LAUNCH_TILE = "64x128x64w4s4"
Row = dict[str, Any]
StreamsOf = Callable[[SliceLayout], Any]


def other(device: DeviceSpec) -> "OtherKernels":
    """Return kernels whose place READS reads, MULTIPLIES multiplies, and 0 does both."""
    import torch

    from ..runtime.other import PLACES, OtherKernels

    asked = torch.zeros(1, PLACES, 3, dtype=torch.int64, device="cuda")
    for place, asks in ((0, (READ_BYTES, FLOPS)), (READS, (READ_BYTES, 0)), (MULTIPLIES, (0, FLOPS))):
        asked[0, place, :2] = torch.tensor(asks, device="cuda")
    return OtherKernels(asked, "bf16", l2_bytes=device.l2_bytes, sm_count=device.sm_count)


def timed(named: dict[str, Step], rounds: int) -> list[Row]:
    """Return a row for each step, timed in turn in bursts."""
    samples = interleave([capture(step, 1) for step in named.values()], rounds, "burst").samples_ns
    return [
        {"arm": name, "status": "ok", "samples": len(one), **in_us("", one)}
        for name, one in zip(named, samples, strict=True)
    ]


def bandwidth(device: DeviceSpec, rounds: int) -> list[Row]:
    """Return times of reading and of multiplying on so many SMs, one CTA each."""
    kernels, rows = other(device), list[Row]()
    for place, name, work in ((READS, "read", READ_BYTES), (MULTIPLIES, "multiply", FLOPS)):
        steps: dict[str, Step] = {f"{name} {n}": lambda _, p=place, n=n: kernels.launch(0, p, n) for n in SMS}
        for n, row in zip(SMS, timed(steps, rounds), strict=True):
            rows.append(row | {"sms": n, "work": name, "per_s": work / row["us_q50"] * 1e6})
    return rows


def neighbours(device: DeviceSpec, streams: StreamsOf, rounds: int) -> list[Row]:
    """Return times of reading beside multiplying, on the same SMs and apart, beside each alone on the same SMs."""
    kernels = other(device)
    most = device.sm_count // device.sm_partition_step * device.sm_partition_step

    def part(place: int, sms: int) -> Step:
        return lambda _: kernels.launch(0, place, sms)

    steps = {"same SMs": part(0, device.sm_count)}
    for n in APART_SMS:
        layout = SliceLayout(slices=tuple(uniform_slice("green_context", k, LAUNCH_TILE) for k in (n, most - n)))
        both = streams(layout)
        steps |= {
            f"apart {n}+{most - n}": beside([part(READS, n), part(MULTIPLIES, most - n)], both),
            f"read alone {n}": beside([part(READS, n)], both[:1]),
            f"multiply alone {most - n}": beside([part(MULTIPLIES, most - n)], both[1:]),
        }
    return [row | {"hbm_bytes": READ_BYTES, "flops": FLOPS} for row in timed(steps, rounds)]


def costs(streams: StreamsOf) -> list[Row]:
    """Return what launches, nodes, forks, events, uploads, captures and changes of layout cost."""
    import torch

    from ..runtime.lanes import stamp_kernel

    stamps = torch.zeros(64, dtype=torch.int64, device="cuda")
    words, staged = (
        torch.zeros(1024, dtype=torch.int32, **place) for place in ({"device": "cuda"}, {"pin_memory": True})
    )
    event = torch.cuda.Event()

    def stamp(at: int = 0, count: int = 1) -> None:
        for _ in range(count):
            stamp_kernel[(1,)](stamps[at])

    chain = capture(lambda _: stamp(count=NODES), 1)
    rows = [_row("graph node", [chain.time_ns() / NODES for _ in range(20)])]
    for branches in (1, 2, 4, 8):
        split = [torch.cuda.Stream() for _ in range(branches)]
        parts: list[Step] = [lambda _, b=b, n=32 // branches: stamp(b, n) for b in range(branches)]
        forked = capture(beside(parts, split), 1)
        rows.append(_row(f"32 nodes on {branches} branches", [forked.time_ns() for _ in range(20)]))
    tiny = capture(lambda _: stamp(), 1)
    rows += [
        _row("kernel launch, host", host_ns(stamp)),
        _row("graph launch, host", host_ns(tiny.graph.replay)),
        _row("event record, host", host_ns(event.record)),
        _row("upload, enqueued", host_ns(lambda: words.copy_(staged, non_blocking=True))),
        _row("upload, waited for", host_ns(lambda: words.copy_(staged), wait=True)),
        _row("capture of a node", host_ns(lambda: capture(lambda _: stamp(), 1), repeats=5)),
    ]
    layouts = [SliceLayout(slices=(uniform_slice("green_context", n, LAUNCH_TILE),)) for n in (16, 32)]
    rows.append(_row("green context creation", host_ns(lambda: streams(layouts[0]), repeats=1)))
    greens = [capture(beside([lambda _: stamp()], streams(layout)), 1) for layout in layouts]
    for name, pair in (("same layout twice", (greens[0], greens[0])), ("change of layout", (greens[0], greens[1]))):
        rows.append(_row(f"{name}, both replays", _pairs_ns(*pair)))
    return rows


def _pairs_ns(first: Any, second: Any) -> list[float]:
    """Return the device time from before one replay to after another, enqueued together."""
    import torch

    found = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        first.graph.replay()
        second.graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e6)
    return found


def host_ns(call: Callable[[], object], *, wait: bool = False, repeats: int = REPEATS) -> list[float]:
    """Return the host's time of calls, the device idle before each, or waited for within it."""
    import torch

    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        before_ns = time.perf_counter_ns()
        call()
        if wait:
            torch.cuda.synchronize()
        found.append(float(time.perf_counter_ns() - before_ns))
    return found


def _row(name: str, samples_ns: list[float]) -> Row:
    return {"arm": name, "status": "ok", "samples": len(samples_ns), **in_us("", samples_ns)}


def power(device: DeviceSpec, meter: EnergyMeter) -> list[Row]:
    """Return sustained power, clock and time of reading, multiplying and both, on half and on all SMs, and burst times.

    Throttling by power is what this measures.
    """
    kernels, idle = other(device), meter.idle()
    rows: list[Row] = [{"arm": "idle", "status": "ok", "power_w": idle.power_w}]
    for name, place in (("read", READS), ("multiply", MULTIPLIES), ("both", 0)):
        for sms in (device.sm_count // 2, device.sm_count):
            arm = capture(lambda _, p=place, n=sms: kernels.launch(0, p, n), 1)
            burst_ns = statistics.median(interleave([arm], 3, "burst").samples_ns[0])
            found = meter.measure(arm.graph.replay, idle=idle, warm_up_s=2.0)
            rows.append({
                "arm": f"{name} {sms}", "status": "ok", "sms": sms, "work": name, "power_w": found.power_w,
                "idle_w": found.idle_w, "sm_clock_mhz": found.sm_clock_mhz, "burst_us": burst_ns / 1000,
                "sustained_us": found.duration_ns / found.steps / arm.layers / 1000,
                "energy_uj": found.energy_uj / found.steps / arm.layers, "reasons": list(found.throttle_reasons or ()),
            })  # fmt: skip
    return rows
