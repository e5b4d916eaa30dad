"""`expertslice bench`: our layer beside every arm that can be run here and every peer on record, point by point.

Rows are appended to rows.jsonl as points finish; rows.parquet, manifest.json and the figures are made from them at the
end. A point that an earlier run measured is not measured again.
"""

import time
from collections.abc import Callable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from ..policies.data import device_names, load_device
from ..runtime.meter import EnergyMeter, MeterError
from ..runtime.timer import Regime
from ..traces.models import load_model
from ..traces.schema import nearest
from .bench_contenders import ARMS, OURS, device_name, tuned_path
from .bench_measure import Course, measure
from .bench_peers import PEERS, records
from .bench_rows import Point, cold_batches, device_manifest, read_rows, refuse_other_machine, write_parquet
from .errors import StoppedError
from .runs import to_json

SKEWS = ("uniform", "zipf")
DEVICES = {
    "NVIDIA H100 80GB HBM3": "h100-sxm5-80gb",
    "NVIDIA H200": "h200-sxm5-141gb",
    "NVIDIA A100-SXM4-80GB": "a100-sxm4-80gb",
}
"""Facts by the driver's name of a device."""
Row = dict[str, Any]


def points_of(models: Sequence[str], tokens: Sequence[int], skews: Sequence[str], kind: str | None) -> list[Point]:
    """Return the points asked for; ValueError where one is not possible, or its routing is not that of the arms."""
    if min(tokens, default=0) < 1:
        raise ValueError(f"--tokens names {min(tokens, default='none')}; give numbers from 1")
    check_names("skew", skews, SKEWS)
    specs = {model: load_model(model) for model in models}
    for model, spec in specs.items():
        if spec.score != "softmax" or len(set(spec.d_ff)) > 1:
            raise ValueError(
                f"model {model!r}: the arms compared route by softmax to experts of one width; name others"
            )
    return [
        Point(model=model, kind=kind or spec.kind, skew=skew, tokens=num_tokens)
        for model, spec in specs.items()
        for num_tokens in tokens
        for skew in skews
    ]


def check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError where a name is not known."""
    for name in names:
        if name not in known:
            raise ValueError(nearest(what, name, known))


def course_of(
    arms: Sequence[str] | None, regimes: tuple[Regime, ...], *, rounds: int, energy: bool, device: str | None
) -> Course:
    """Return how points are measured; None: every arm, and the facts of the current device."""
    check_names("arm", arms or (), (*ARMS, *PEERS))
    if energy and "sustained" not in regimes:
        raise ValueError("energy is that of sustained load; give --regime sustained or both, or --no-energy")
    facts = device or DEVICES.get(device_name())
    if not facts:
        raise ValueError(f"nothing is known of {device_name()!r}; give --device, one of {', '.join(device_names())}")
    return Course(
        arms=tuple(arms or (*ARMS, *PEERS)), regimes=regimes, rounds=rounds, energy=energy, device=load_device(facts)
    )


def missing_of(points: Sequence[Point], rows: Sequence[Row], course: Course) -> list[Point]:
    """Return the points to measure: those of which not every arm and regime is there."""
    # Peers are of bursts alone.
    wanted = {(arm, regime) for arm in course.arms for regime in course.regimes if arm in ARMS or regime == "burst"}
    held: dict[Point, set[tuple[str, str]]] = {}
    for row in rows:
        held.setdefault(_point_of(row), set()).add((row["arm"], row["regime"]))
    return [point for point in points if not wanted <= held.get(point, set())]


def _point_of(row: Row) -> Point:
    # Rows of before fp32 was measured say no dtype.
    return Point(**{name: row[name] for name in Point.__dataclass_fields__ if name in row})


def bench(
    points: Sequence[Point],
    course: Course,
    folder: Path,
    *,
    seconds: float,
    resume: Path | None,
    commit: str | None,
    say: Callable[[str], object],
) -> None:
    """Measure the points that are missing, within a time, into a folder.

    Args:
        points: in the order of measuring; those of a layer side by side.
        course: how they are measured.
        folder: of rows, manifest and figures; one with rows is gone on with by naming them.
        seconds: after which no point begins.
        resume: rows.jsonl of an earlier run, whose finished points are kept.
        commit: of a checkout that has no history with it.
        say: takes a line about each row.
    """
    end, path = time.monotonic() + seconds, folder / "rows.jsonl"
    if path.exists() and resume is None:
        raise ValueError(f"{folder} holds rows already; go on with --resume {path}, or give another --out")
    held = read_rows(resume) if resume else []
    missing = missing_of(points, held, course)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with EnergyMeter(0) as meter:
            manifest = {**about(course), **device_manifest(meter, commit), "resumed": resume is not None}
            if resume:
                refuse_other_machine(resume.parent, manifest)
            write_rows(path, held)
            (folder / "manifest.json").write_text(to_json(manifest) + "\n", encoding="utf-8")
            precompile_searched(missing, course)
            _measure_all(missing, course, meter, path, end, say)
    except MeterError as error:
        raise ValueError(str(error)) from error
    except KeyboardInterrupt:
        raise StoppedError(f"stopped; finished points are kept: go on with --resume {path}") from None
    finish(folder, say)


def about(course: Course) -> dict[str, Any]:
    """Return what the manifest says of the course, with the ceilings that floors and figures are reckoned from."""
    ceilings = {
        "device": course.device.title,
        "bytes_per_s": max(course.device.read_curve_bytes_per_s),
        "burst_flops_per_s": course.device.matrix_flops_per_s,
        "sustained_flops_per_s": course.device.sustained_flops_per_s,
    }
    return {
        **{name: getattr(course, name) for name in ("arms", "regimes", "rounds", "energy")},
        "transformers": next((found.version for found in distributions(name="transformers")), None),
        "ceilings": ceilings,
        "records": records()[0]["source"],
    }


def precompile_searched(points: Sequence[Point], course: Course) -> None:
    """Compile ahead what a search will time, for the shapes that no launches are shipped for."""
    from .precompile import precompile

    loads = [(p.spec, p.tokens) for p in points if OURS in course.arms and not tuned_path(p.spec).exists()]
    if loads:
        precompile(list(dict.fromkeys(loads)))


def _measure_all(
    points: Sequence[Point], course: Course, meter: EnergyMeter, path: Path, end: float, say: Callable[[str], object]
) -> None:
    idle, held = meter.idle() if course.energy and points else None, read_rows(path)
    for point, batch in cold_batches(points, end - time.monotonic()):
        rows = measure(point, batch, course, meter, idle)
        # The next layer's weights need the room of this one's.
        del batch
        # A point's rows of before last until there are new ones.
        held = [*(row for row in held if _point_of(row) != point), *rows]
        write_rows(path, held)
        for row in rows:
            say(line(row))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into a file at once: a stop leaves the old ones or the new."""
    new = path.with_suffix(".new")
    new.write_text("".join(to_json(row, indent=None) + "\n" for row in rows), encoding="utf-8")
    new.replace(path)


def line(row: Row) -> str:
    """Return one row for the terminal."""
    head = f"{row['model']:14} {row['kind']:6} {row['skew']:7} {row['tokens']:5} {row['regime']:9} {row['arm']:22}"
    time_us = f"{row['us_q50']:10.1f} us" if row.get("us_q50") else " " * 13
    over = f" {row['over_ours']:7.2f} x ours" if row.get("over_ours") else ""
    energy = f" {row['energy_per_token_uj']:9.1f} uJ a token" if row.get("energy_per_token_uj") else ""
    status = "" if row["status"] == "ok" else f" {row['status']}: {row.get('reason', 'over its record')}"
    return f"{head}{time_us}{over}{energy}{status}"


def finish(folder: Path, say: Callable[[str], object]) -> None:
    """Write a folder's rows as Parquet and draw its figures."""
    from .bench_plots import draw

    rows = read_rows(folder / "rows.jsonl")
    if not rows:
        raise ValueError(f"no point was measured within --seconds; give more time ({folder} holds the manifest alone)")
    write_parquet(folder / "rows.parquet", rows)
    for path in draw(folder):
        say(str(path))
