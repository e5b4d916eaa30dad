"""`expertslice reproduce`: what the paper claims, measured: a target is a list of tasks, a task a probe at a point.

Rows are appended to rows.jsonl as tasks finish, and a task whose rows are there is not run again, whichever target asks
for it; rows.parquet and manifest.json are those of `bench`, with an entry for each call. What rows say of a claim is
judged elsewhere (`claims.py`).
"""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..policies.data import load_device
from ..runtime.meter import EnergyMeter, MeterError
from ..traces.schema import Dtype, nearest
from .bench import DEVICES
from .bench_contenders import device_name, sm_count
from .bench_rows import Point, claim, cold_batches, device_manifest, read_rows, write_parquet
from .errors import StoppedError
from .pair_gpu import sensor
from .reproduce_probes import PROBES, SIMULATED, Bench, simulated
from .runs import provenance, to_json

CONFIGS = ("small", "medium", "large")
BATCHES = (32, 64, 128, 256, 512)
DTYPES: tuple[Dtype, ...] = ("bf16", "fp32")
PUBLISHED = ("mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v2-lite")
LOADED = ("load", "parts")
"""Probes that ask what idles."""
Row = dict[str, Any]
Say = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A probe at a point."""

    probe: str
    point: Point


def tasks(
    probe: str,
    models: Sequence[str] = CONFIGS,
    batches: Sequence[int] = (256,),
    dtypes: Sequence[Dtype] = DTYPES,
    *,
    kind: str = "relu3",
    skew: str = "uniform",
) -> tuple[Task, ...]:
    """Return a probe's tasks, those of one layer side by side."""
    return tuple(
        Task(probe=probe, point=Point(model=model, kind=kind, skew=skew, tokens=batch, dtype=dtype))
        for dtype in dtypes
        for model in models
        for batch in batches
    )


ONLY_BF16: tuple[Dtype, ...] = DTYPES[:1]
TARGETS: dict[str, tuple[Task, ...]] = {
    "table1": (
        *tasks("arms", batches=BATCHES),
        # When the approach excels, and when it does not (6.1).
        *tasks("arms", batches=(1, 2048), dtypes=ONLY_BF16),
        *tasks("arms", dtypes=ONLY_BF16, skew="zipf"),
        *tasks("arms", PUBLISHED, dtypes=ONLY_BF16, kind="swiglu"),
    ),
    "figure1": tasks("load", dtypes=ONLY_BF16),
    "table2": (*tasks("load"), *tasks("load", PUBLISHED, dtypes=ONLY_BF16, kind="swiglu")),
    "table3": (*tasks("parts", dtypes=ONLY_BF16), *tasks("load", dtypes=ONLY_BF16)),
    "table4": (
        *tasks("factorial", ("medium",)),
        *tasks("factorial", ("medium", "large"), dtypes=ONLY_BF16, skew="zipf"),
        *tasks("costs", ("medium",), dtypes=ONLY_BF16),
    ),
    "table5": (*tasks("arms", ("medium",)), *tasks("load", ("medium",))),
    "accuracy": (*tasks("arms"), *tasks("tokens", ("medium",), dtypes=ONLY_BF16)),
}


def tasks_of(target: str) -> tuple[Task, ...]:
    """Return a target's tasks, or those of all, each once; ValueError where there is no such target."""
    if target not in (*TARGETS, "all"):
        raise ValueError(nearest("target", target, (*TARGETS, "all")))
    wanted = TARGETS.values() if target == "all" else (TARGETS[target],)
    return tuple(dict.fromkeys(task for one in wanted for task in one))


def missing_of(wanted: Sequence[Task], rows: Sequence[Row]) -> tuple[Task, ...]:
    """Return the tasks of which there are no rows."""
    fields = Point.__dataclass_fields__
    done = {Task(probe=row["probe"], point=Point(**{name: row[name] for name in fields})) for row in rows}
    return tuple(task for task in wanted if task not in done)


def reproduce(target: str, folder: Path, *, seconds: float, commit: str | None, busy_ok: bool, say: Say) -> None:
    """Measure what a target lacks in a folder, within a time, on the current GPU.

    Args:
        target: one of `TARGETS`, or all.
        folder: of rows and manifest; one that holds some is gone on with.
        seconds: after which no task begins.
        commit: of a checkout that has no history with it.
        busy_ok: measure though others use the GPU.
        say: takes a line about each row.

    Raises:
        ValueError: no such target; the folder's rows are of another machine; the GPU is busy, or cannot be read.
        StoppedError: the user stopped it; finished tasks are kept.
    """
    end = time.monotonic() + seconds
    wanted = tasks_of(target)
    if device_name() not in DEVICES:
        raise ValueError(f"nothing is known of {device_name()!r}; reproduce runs on {', '.join(DEVICES)}")
    device = load_device(DEVICES[device_name()])
    try:
        with sensor(busy_ok=busy_ok) as read, EnergyMeter(0) as meter:
            run = {**device_manifest(meter, commit), **read(), "cpu": cpu_name()}
            todo = missing_of(wanted, held_rows(folder))
            claim(folder, {**run, "tasks": len(todo)})
            if todo:
                precompile(todo)
                idle = meter.idle() if any(task.probe in LOADED for task in todo) else None
                _append(folder, run["commit"], _measured(todo, Bench(device=device, meter=meter, idle=idle), end), say)
    except MeterError as error:
        raise ValueError(str(error)) from error
    except KeyboardInterrupt:
        raise StoppedError(f"stopped; finished tasks are kept in {folder}: the same command goes on") from None
    finish(folder, wanted, say)


def _measured(todo: Sequence[Task], bench: Bench, end: float) -> Iterator[tuple[Task, list[Row]]]:
    batches = cold_batches([task.point for task in todo], end - time.monotonic())
    for task, (point, batch) in zip(todo, batches, strict=False):
        rows = PROBES[task.probe](point, batch, bench)
        # The next layer's weights need the room of this one's.
        del batch
        yield task, rows


def reproduce_simulated(target: str, folder: Path, *, say: Say) -> None:
    """Write what the simulator says at every point of a target; needs no GPU."""
    points = dict.fromkeys(task.point for task in tasks_of(target))
    wanted = tuple(Task(probe=SIMULATED, point=point) for point in points)
    run = {**provenance(), "device": SIMULATED}
    todo = missing_of(wanted, held_rows(folder))
    claim(folder, {**run, "tasks": len(todo)})
    _append(folder, run["commit"], ((task, simulated(task.point)) for task in todo), say)
    finish(folder, wanted, say)


def held_rows(folder: Path) -> list[Row]:
    """Return a folder's rows."""
    path = folder / "rows.jsonl"
    return read_rows(path) if path.exists() else []


def precompile(todo: Sequence[Task]) -> None:
    """Compile on all cores the launches that tasks will time."""
    import torch

    from ..kernels.tuned import paper_launch
    from ..runtime.experts import default_launch_on
    from .precompile import precompile_launches

    points = dict.fromkeys(task.point for task in todo)
    loads = [(p.spec, p.tokens, default_launch_on(torch.device("cuda"), p.spec, p.tokens)) for p in points]
    loads += [(p.spec, p.tokens, paper_launch(p.spec, p.tokens, sm_count=sm_count())) for p in points]
    precompile_launches(loads)


def cpu_name(path: Path = Path("/proc/cpuinfo")) -> str:
    """Return the host's processor: what launches one by one is as fast as it."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _append(folder: Path, commit: str | None, found: Iterator[tuple[Task, list[Row]]], say: Say) -> None:
    with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
        for task, rows in found:
            about = {"probe": task.probe, **asdict(task.point), "commit": commit}
            file.write("".join(to_json({**row, **about}, indent=None) + "\n" for row in rows))
            file.flush()
            for row in rows:
                say(line(task, row))


def line(task: Task, row: Row) -> str:
    """Return one row for the terminal."""
    point = task.point
    head = f"{task.probe:9} {point.model:14} {point.dtype} {point.skew:7} {point.tokens:5} {row['arm']:24}"
    time_us = f"{row['us_q50']:10.1f} us" if row.get("us_q50") else " " * 13
    power = f" {row['energy_power_w']:5.0f} W" if row.get("energy_power_w") else ""
    status = "" if row["status"] in ("ok", "bridged") else f" {row['status']}: {row.get('reason')}"
    return f"{head}{time_us}{power}{status}"


def finish(folder: Path, wanted: Sequence[Task], say: Say) -> None:
    """Write a folder's rows as Parquet, and say what is still missing."""
    rows = held_rows(folder)
    if not rows:
        raise ValueError(f"nothing was measured within --seconds; give more time ({folder} holds the manifest alone)")
    write_parquet(folder / "rows.parquet", rows)
    left = missing_of(wanted, rows)
    say(f"{len(wanted) - len(left)} of {len(wanted)} tasks are done in {folder}")
    if left:
        say("the same command goes on with the others")
