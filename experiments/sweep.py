"""Many policies on many workloads: one row for each point in one Parquet dataset, which a restart goes on with.

A point is named by a hash of all that decides its row, so the same point is never run twice.
"""

import contextlib
import fcntl
import hashlib
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from joblib import parallel_config
from rich.console import Console

from .. import __version__
from ..policies.contract import Policy
from .case import Options, prepare
from .errors import StoppedError
from .runs import provenance, sha256_of, to_json, whole
from .sweep_grid import grid_of
from .sweep_point import Limits, Workload, composition_of, guarded, measure, steps_of
from .tasks import progress, unordered

EXIT_FAILED = 3
DEVICE = "h100-sxm5-80gb"
BACKENDS = ("loky", "sequential", "dask", "ray")
PART_ROWS, PART_S = 8, 5.0
"""Rows are written when there are so many, or so long after the last ones."""
INTS = ("steps", "reconfigurations", "captures", "capture_ns", "fallback_steps")
FLOATS = (
    "step_mean_ns", "step_p50_ns", "step_p95_ns", "step_p99_ns", "tokens_per_s", "energy_j_per_1k_tokens",
    "hbm_bytes_per_step", "reconfigure_share", "control_stall_share", "unsliced_share",
)  # fmt: skip
TEXTS = ("point", "status", "reason", "policy", "params", "trace", "trace_sha256", "segment", "model", "device",
         "composition", "version")  # fmt: skip
SCHEMA = pa.schema(
    dict.fromkeys(TEXTS, pa.string()) | {"seed": pa.int64()} | dict.fromkeys(INTS, pa.int64())
    | dict.fromkeys(FLOATS, pa.float64()) | {"step_ns": pa.list_(pa.int64())},
    metadata={"expertslice.schema": "sweep/1"},
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What the user asked for, as `sweep_cli` describes it: every combination is a point."""

    policies: Sequence[str] | None
    traces: Sequence[str] | None
    models: Sequence[str] | None
    devices: Sequence[str] | None
    seeds: Sequence[int] | None
    fit_routing: str | None
    segment: str | None
    steps: int | None
    out: Path
    backend: str
    scheduler: str | None
    jobs: int
    limit_s: float
    memory_gib: float
    retry_failed: bool

    @property
    def limits(self) -> Limits:
        return Limits(time_s=self.limit_s, memory_bytes=int(self.memory_gib * 2**30))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A policy on a workload, and what its row says before it has run."""

    policy: Policy[Any]
    work: Workload
    facts: dict[str, Any]


def sweep(grid: Grid) -> dict[str, Any]:
    """Run what the dataset lacks and return what became of the points, as plain values.

    Raises:
        ValueError: the input cannot be used, or another sweep writes to the same folder.
        StoppedError: the user stopped it; what had finished was kept.
    """
    if not grid.policies:
        raise ValueError("nothing to sweep; give --policy 'name(parameter=value|value)', as often as you like")
    points = {point.facts["point"]: point for point in points_of(grid)}
    with _alone(grid.out):
        if grid.retry_failed:
            _forget_failed(grid.out)
        there = outcomes(grid.out)
        missing = [point for name, point in points.items() if name not in there]
        with whole(grid.out / "_manifest.json") as part:
            part.write_text(to_json(provenance() | asdict(grid)), encoding="utf-8")
        begin_s = time.monotonic()
        try:
            _run_all(missing, grid)
        except KeyboardInterrupt:
            kept = len(points.keys() & outcomes(grid.out).keys())
            said = f"{kept} of {len(points)} points are kept in {grid.out}; the same command runs the others"
            raise StoppedError(f"stopped; {said}") from None
        found = outcomes(grid.out)
    failed = Counter(found[name] for name in points if found[name] is not None)
    numbers = {"points": len(points), "run": len(missing), "failed": failed.total()}
    return {**numbers, "reasons": dict(failed), "seconds": time.monotonic() - begin_s, "dataset": str(grid.out)}


def points_of(grid: Grid) -> Iterator[Point]:
    """Yield every combination, each workload looked at once and each policy's parameters checked."""
    policies = [pair for text in grid.policies or () for pair in grid_of(text)]
    nothing = (None,)
    worlds = itertools.product(
        grid.traces or nothing, grid.models or nothing, grid.devices or (DEVICE,), grid.seeds or nothing
    )
    for trace, model, device, seed in worlds:
        options = Options(
            trace=trace, model=model, device=device, seed=seed or 0, policies=("unsliced",), jobs=1,
            fit_routing=grid.fit_routing, segment=grid.segment, steps=grid.steps,
        )  # fmt: skip
        case = prepare(options)
        work = Workload(options=options, seed=seed, num_steps=case.survey.num_steps)
        composition = repr(composition_of(case, work) or grid.fit_routing or "as recorded")
        shared = {
            "trace": case.opened.name, "trace_sha256": case.opened.sha256, "segment": case.opened.segment,
            "model": case.world.model.name, "device": case.world.device.name, "composition": composition,
            "seed": options.seed, "version": __version__,
        }  # fmt: skip
        mechanisms = sorted(case.world.mechanisms)
        world = to_json([asdict(case.world) | {"mechanisms": mechanisms}, shared, work.num_steps, options.batch_size])
        for name, policy in policies:
            yield _point(name, policy, work, shared, world)


def _point(name: str, policy: Policy[Any], work: Workload, shared: dict[str, Any], world: str) -> Point:
    cls, params = type(policy), to_json(asdict(policy), indent=None)
    # An edited policy is another policy, though the package's version is the same.
    source = getattr(sys.modules[cls.__module__], "__file__", None)
    code = sha256_of(Path(source)) if source else ""
    known = to_json([world, f"{cls.__module__}:{cls.__qualname__}", code, params])
    facts = {"point": hashlib.sha256(known.encode()).hexdigest()[:32], "policy": name, "params": params, **shared}
    return Point(policy=policy, work=work, facts=facts)


def run_point(point: Point, limits: Limits) -> dict[str, Any]:
    """Return the point's row."""
    world, source = steps_of(point.work)
    found, reason = guarded(lambda: measure(point.policy, source, point.work.num_steps, world), limits)
    row = {"status": "failed" if reason else "ok", "reason": reason, **point.facts, **(found or {})}
    return {name: row.get(name) for name in SCHEMA.names}


def _run_all(points: Sequence[Point], grid: Grid) -> None:
    """Run points where the backend has workers, writing rows as they come."""
    part, failed = _Part(grid.out), 0
    rows = unordered(run_point, ((point, grid.limits) for point in points), grid.jobs)
    try:
        with progress(len(points)) as advance, _workers(grid), contextlib.closing(rows):
            for row in rows:
                part.add(row)
                failed += row["status"] == "failed"
                advance(1, f"sweeping, {failed} failed" if failed else "sweeping")
    finally:
        part.write()


@contextlib.contextmanager
def _workers(grid: Grid) -> Iterator[None]:
    """Let joblib use a backend; Dask and Ray start workers here unless a scheduler's address is given."""
    if grid.backend not in BACKENDS:
        raise ValueError(f"backend {grid.backend!r} is unknown; there are {', '.join(BACKENDS)}, use one of them")
    with contextlib.ExitStack() as stack:
        try:
            if grid.backend == "dask":
                from distributed import Client

                own = {"n_workers": max(1, grid.jobs) if grid.jobs > 0 else None, "threads_per_worker": 1}
                client = Client(grid.scheduler, timeout=10) if grid.scheduler else Client(**own, dashboard_address=None)
                stack.enter_context(client)
            elif grid.backend == "ray":
                import ray
                from ray.util.joblib import register_ray

                ray.init(grid.scheduler, ignore_reinit_error=True)
                register_ray()
        except ImportError:
            raise ValueError(f"{grid.backend} is not installed; pip install it, or leave --backend out") from None
        except (OSError, TimeoutError) as error:
            raise ValueError(f"no scheduler answers at {grid.scheduler} ({error}); start one or correct it") from None
        stack.enter_context(parallel_config(backend=grid.backend))
        yield


class _Part:
    """Rows that have not been written yet."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._rows, self._written_s = folder, [], time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= PART_ROWS or time.monotonic() - self._written_s > PART_S:
            self.write()

    def write(self) -> None:
        if self._rows:
            table = pa.Table.from_pylist(self._rows, schema=SCHEMA)
            name = hashlib.sha256("".join(table["point"].to_pylist()).encode()).hexdigest()[:16]
            with whole(self._folder / f"part-{name}.parquet") as part:
                pq.write_table(table, part, compression="zstd")
        self._rows, self._written_s = [], time.monotonic()


def outcomes(folder: Path) -> dict[str, str | None]:
    """Return the points that a dataset holds, each with its reason if it failed."""
    tables = [pq.read_table(path, columns=["point", "reason"]) for path in sorted(folder.glob("part-*.parquet"))]
    return {row["point"]: row["reason"] for table in tables for row in table.to_pylist()}


def _forget_failed(folder: Path) -> None:
    for path in folder.glob("part-*.parquet"):
        table = pq.read_table(path)
        good = table.filter(pc.equal(table["status"], "ok"))
        if len(good) < len(table):
            with whole(path) as part:
                pq.write_table(good, part, compression="zstd")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another sweep writes to {folder}; wait for it or give another --out") from None
        yield


def print_outcome(outcome: dict[str, Any]) -> None:
    """Print what became of the points, the commonest reasons of failures first."""
    rate = outcome["run"] / max(outcome["seconds"], 1e-9)
    console = Console(highlight=False, soft_wrap=True)
    here = outcome["points"] - outcome["run"]
    console.print(f"{outcome['points']} points: {outcome['run']} run ({rate:.2f} a second), {here} were there already")
    reasons = sorted(outcome["reasons"].items(), key=lambda item: -item[1])
    for reason, count in reasons[:5]:
        console.print(f"{count} failed: {reason}", markup=False)
    console.print(f"dataset  {outcome['dataset']}", markup=False)
