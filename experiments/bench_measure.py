"""One point of `expertslice bench`: every arm is built, checked, captured, timed; whatever becomes of it is a row.

burst and sustained are those of `runtime.timer`. Arms in graphs are timed in turn, A B .. B A. What the host launches
one by one, and what outlasts a burst, is timed alone, replay after replay: in bursts with the same idle time between.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..policies.contract import DeviceSpec
from ..runtime.meter import EnergyMeter, MeterError, Window
from ..runtime.timer import BURST_IDLE_NS, Captured, Ratio, Regime, capture, interleave, paired_ratio
from .bench_arms import Batch
from .bench_contenders import ARMS, GROUPED, OURS, Contender, device_name
from .bench_hf import AbsentError
from .bench_peers import PEERS, bridged
from .bench_rows import LONG_LAYER_US, Point, Work, in_us

if TYPE_CHECKING:
    import torch

MOST_INTERLEAVED_NS = 15_000_000
"""Of a replay: it must fit a burst though times spread."""
LEAST_PAIRED_ROUNDS = 6
Found = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How points are measured."""

    arms: tuple[str, ...]
    """Of `table` and of `PEERS`."""
    regimes: tuple[Regime, ...]
    rounds: int
    energy: bool
    device: DeviceSpec
    """Whose ceilings give floors."""
    table: Mapping[str, Callable[[Batch], Contender]] = field(default_factory=lambda: ARMS)


@dataclass(slots=True)
class FromHost:
    """Stands for a graph: a replay launches one step on the next weight set."""

    step: Callable[[int], Any]
    sets: Iterator[int]

    def replay(self) -> None:
        """Launch the step."""
        self.step(next(self.sets))


def measure(
    point: Point, batch: Batch, course: Course, meter: EnergyMeter, idle: Window | None
) -> list[dict[str, Any]]:
    """Return the rows of a point: one for each arm and regime."""
    work = Work.of(batch)
    floor_us = work.floor_us(course.device)
    num_sets = 1 if floor_us > LONG_LAYER_US else len(batch.sets)
    named = {name: course.table[name] for name in course.arms if name in course.table}
    names = list(named)
    arms, checked = prepare(batch, named, num_sets)
    common = {**asdict(point), "weight_sets": num_sets, **asdict(work), "floor_us": floor_us}
    rows: list[dict[str, Any]] = []
    for regime in course.regimes:
        timed, grouped_over_ours = time_arms(arms, course.rounds, regime)
        found = [{"arm": name, **checked[name], **timed.get(name, {})} for name in names]
        # The records are of bursts.
        peers = [name for name in course.arms if name in PEERS and regime == "burst"]
        found += bridged(peers, point, device_name(), grouped_over_ours)
        if course.energy and regime == "sustained":
            found = [row | energy(arms.get(row["arm"]), point.tokens, meter, idle) for row in found]
        after = {f"after_{name}": value for name, value in asdict(meter.snapshot()).items()}
        for row in found:
            share = {"of_floor": floor_us / row["us_q50"]} if "us_q50" in row else {}
            rows.append({**common, "regime": regime, **row, **share, **after})
    return rows


def prepare(
    batch: Batch, arms: Mapping[str, Callable[[Batch], Contender]], num_sets: int
) -> tuple[dict[str, Captured], Found]:
    """Return the arms that are right, ready to be timed, and what was found of each one."""
    import torch

    expected = _expected(batch)
    ready: dict[str, Captured] = {}
    found: Found = {}
    for name, build in arms.items():
        try:
            contender = build(batch)
            found[name] = {**contender.about, **agreement(contender, expected)}
            if found[name]["status"] == "ok":
                # A capture cannot take back what is cached for other streams.
                torch.cuda.empty_cache()
                ready[name] = _captured(contender, num_sets)
        except AbsentError as absent:
            found[name] = {"status": "absent", "reason": str(absent)}
        except Exception as error:
            found[name] = found.get(name, {}) | {"status": "failed", "reason": _sentence(error)}
            # A device that is broken for good ends the run here.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    return ready, found


def _expected(batch: Batch) -> "dict[int, torch.Tensor]":
    """Return the definition's outputs for the first and the last weight set."""
    from ..kernels import reference
    from ..kernels.spec import RouterSpec

    router = RouterSpec.of(batch.spec)
    return {
        p: reference.layer(batch.x_TD, batch.logits_PTE[p], batch.sets[p], router) for p in (0, len(batch.sets) - 1)
    }


def agreement(contender: Contender, expected: "Mapping[int, torch.Tensor]") -> dict[str, Any]:
    """Return how far outputs are from the definition's at worst, and whether that is near enough to be timed."""
    differing, distance = 0.0, 0.0
    for p, expected_TD in expected.items():
        out_TD = contender.step(p)
        differing = max(differing, float((out_TD != expected_TD).float().mean()))
        wide_TD = expected_TD.float()
        found = float((out_TD.float() - wide_TD).norm() / wide_TD.norm())
        # NaN is no distance, and max would lose it.
        distance = found if not found <= distance else distance
    right = distance <= contender.most_difference
    return {
        "status": "ok" if right else "wrong",
        **({} if right else {"reason": f"off by {distance:.1e}; at most {contender.most_difference:.0e} is right"}),
        "same_bits": differing == 0,
        "differing_share": differing,
        "rel_difference": distance,
    }


def _captured(contender: Contender, num_sets: int) -> Captured:
    if contender.in_graph:
        return capture(contender.step, num_sets)
    graph = FromHost(contender.step, itertools.cycle(range(num_sets)))
    return Captured(graph=graph, step=contender.step, layers=1)


def _sentence(error: Exception) -> str:
    """Return the first line of an error with its kind; messages of libraries run to pages."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first:.300}"


def time_arms(arms: Mapping[str, Captured], rounds: int, regime: Regime) -> tuple[Found, Ratio | None]:
    """Return quantiles of every arm and its time over ours, and the paired ratio of torch's grouped product to ours."""
    together = [name for name, arm in arms.items() if not isinstance(arm.graph, FromHost) and _fits(arm)]
    taken_ns = interleave([arms[name] for name in together], rounds, regime).samples_ns if together else ()
    samples = dict(zip(together, taken_ns, strict=True))
    samples |= {name: alone(arm, rounds, regime) for name, arm in arms.items() if name not in samples}
    found: Found = {}
    ratios = {}
    for name, samples_ns in samples.items():
        timed = "in turn" if name in together else "alone"
        found[name] = {"timed": timed, "samples": len(samples_ns), **in_us("", samples_ns)}
        if OURS not in samples:
            continue
        if {name, OURS} <= {*together} and rounds >= LEAST_PAIRED_ROUNDS:
            ratio = ratios[name] = paired_ratio(samples_ns, samples[OURS])
            found[name] |= {"over_ours": ratio.median, "over_ours_low": ratio.low, "over_ours_high": ratio.high}
        else:
            found[name]["over_ours"] = statistics.median(samples_ns) / statistics.median(samples[OURS])
    return found, ratios.get(GROUPED)


def _fits(arm: Captured) -> bool:
    return max(arm.time_ns() for _ in range(3)) * arm.layers <= MOST_INTERLEAVED_NS


def alone(
    arm: Captured, num_samples: int, regime: Regime, *, sleep: Callable[[float], object] = time.sleep
) -> list[float]:
    """Return samples of one arm, each waited for; the first of all, which warms up, is not counted."""
    samples_ns = []
    for _ in range(num_samples + 1):
        sleep(BURST_IDLE_NS / 1e9 if regime == "burst" else 0)
        samples_ns.append(arm.time_ns())
    return samples_ns[1:]


def energy(arm: Captured | None, num_tokens: int, meter: EnergyMeter, idle: Window | None) -> dict[str, Any]:
    """Return energy per token, idle power included, with its own clock and time; or why there is none."""
    if arm is None:
        return {}
    try:
        found = meter.measure(arm.graph.replay, idle=idle, warm_up_s=1)
    except MeterError as error:
        return {"energy_reason": str(error)}
    return {
        "energy_per_token_uj": found.energy_per_step_uj / (arm.layers * num_tokens),
        "energy_us": found.step_ns / arm.layers / 1000,
        "energy_power_w": found.power_w,
        "energy_idle_w": found.idle_w,
        "energy_sm_clock_mhz": found.sm_clock_mhz,
        "energy_temperature_c": found.temperature_c,
        "energy_times_starved": found.times_starved,
        "energy_throttle_reasons": ", ".join(found.throttle_reasons or ()),
    }
