"""`expertslice run`: a trace's steps under each policy on the runtime, one file of StepRecords for each.

On a GPU they are times; on a host without one they are reckoned from counts and device facts, and say so.
"""

import itertools
import signal
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np

from ..policies.contract import MECHANISMS, Policy, Setup, StepRecord
from ..policies.loop import drive
from ..runtime.backend import Executor, ExecutorError, RuntimeBackend
from ..traces.schema import RoutedStep, next_power_of_two
from .case import Case, Options, prepare
from .errors import StoppedError
from .records import writing
from .runs import RunFolder, file_name, provenance
from .simulate import with_other_work
from .watch import Watch

HOST_LABEL = "no GPU timing: times are reckoned from counts and device facts"
MOST_PLAN_S = 10.0
"""A decision that takes longer hangs: the old plan is kept."""
Where = Literal["host", "gpu"]
Capture = Literal["all", "paper"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(Options):
    """What the user asked for."""

    policies: Sequence[str] = ("unsliced",)
    where: Where = "host"
    capture: Capture = "all"
    profile: bool = False


def run_trace(options: RunOptions, say: Callable[[str], object]) -> tuple[dict[str, Any], Path]:
    """Run every policy over the trace; return a summary of each, and the folder of their records.

    Raises:
        ValueError: something is unknown, does not fit, or cannot run here; the message says what to give instead.
        StoppedError: the user stopped it; records up to then are kept.
    """
    case = prepare_to_run(options, options.where)
    setup = case.world.setup()
    steps = partial(steps_of, case)
    about = {
        "trace": case.opened.plain(),
        "model": asdict(case.world.model),
        "device": setup.device.name,
        "where": options.where,
        "label": HOST_LABEL if options.where == "host" else "GPU timing",
        "seed": options.seed,
        "notes": list(case.notes),
    }
    folder = RunFolder(options.out, "run", {**provenance(), **about, "options": asdict(case.options)})
    summary: dict[str, Any] = {}
    try:
        with executors(options.where, steps(), seed=options.seed, capture=options.capture) as executor:
            for name, policy in case.policies.items():
                watch = Watch(setup, counters=options.where == "gpu") if options.profile else None
                summary[name] = _run(policy, executor(), steps(), setup, folder, name, watch)
                folder.write_json("summary.json", {**about, "policies": summary})
                say(line(name, summary[name]))
                if watch:
                    folder.write_json(f"{file_name(name)}.profile.json", watch.found)
                    say("\n".join(f"  {text}" for text in watch.lines()))
                if summary[name]["stopped"]:
                    break
    except ExecutorError as error:
        kept = folder.keep_partial(str(error))
        raise ValueError(f"{error}{f'; what had finished is kept in {kept}' if kept else ''}") from error
    except BaseException as error:
        folder.keep_partial(str(error))
        raise
    if summary[name]["stopped"]:
        raise StoppedError(f"stopped; records up to then are kept in {folder.finish('partial')}")
    return {**about, "policies": summary}, folder.finish()


def prepare_to_run(options: Options, where: Where) -> Case:
    """Resolve what is asked for on a backend that is no simulator.

    Raises:
        ValueError: something is unknown, does not fit, or cannot run there; the message says what to give instead.
    """
    # A process on a GPU holds one MIG instance: slices of several are not carried out there.
    mechanisms = [name for name in MECHANISMS if name != "mig" or where == "host"]
    case = prepare(replace(options, mechanisms=mechanisms))
    if foreseeing := [name for name, policy in case.policies.items() if policy.foresees]:
        raise ValueError(f"policy {foreseeing[0]} foresees steps, which only the simulator offers; use `whatif` for it")
    if options.device_model is not None and where == "gpu":
        _check_machine(options.device_model)
    return case


def _check_machine(device_model_path: Path) -> None:
    """Raise ValueError where a device model was not measured on this GPU."""
    from ..runtime.meter import EnergyMeter
    from . import device_model
    from .bench_rows import device_manifest, machine_of
    from .cli_gpu import require_gpu

    require_gpu("a device model on a GPU")
    with EnergyMeter(0) as meter:
        device_model.load(device_model_path).check_machine(machine_of(device_manifest(meter, None)))


@contextmanager
def executors(
    where: Where, steps: Iterator[RoutedStep], *, seed: int, capture: Capture = "all"
) -> Generator[Callable[[], Executor]]:
    """Yield what gives an executor for steps like these: on a GPU one for all runs, whose graphs and weights stay.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if where == "host":
        from ..runtime.host import HostExecutor

        yield HostExecutor
        return
    from .cli_gpu import require_gpu

    require_gpu("--on gpu")
    from ..runtime.cuda import CudaExecutor
    from ..runtime.graphs import CAPTURE_RULES
    from ..runtime.other import slice_ids_of

    loads = {(next_power_of_two(step.num_tokens), slice_ids_of(step.other_L)) for step in steps}
    most, rule = max((bucket for bucket, _ in loads), default=1), CAPTURE_RULES[capture]
    executor = CudaExecutor(max_tokens=most, loads=loads, rule=rule, seed=seed, keep=True)
    try:
        yield lambda: executor
    finally:
        executor.release()


def steps_of(case: Case) -> Iterator[RoutedStep]:
    """Yield the trace's steps, with the model's work beside the experts where the trace names none."""
    taken = itertools.islice(case.source.steps(), case.survey.num_steps)
    return with_other_work(taken, case.world.model, keep_ids=True)


@contextmanager
def stoppable(steps: Iterator[RoutedStep]) -> Generator[Iterator[RoutedStep]]:
    """Yield steps that Ctrl-C ends between two of them, where nothing is half done; the second one stops at once."""
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if asked:
            signal.default_int_handler(number, frame)
        asked.append(number)

    def until_asked() -> Iterator[RoutedStep]:
        for step in steps:
            yield step
            if asked:
                raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield until_asked()
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _time_limit() -> Generator[None]:
    """Raise TimeoutError where a decision hangs."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no plan within {MOST_PLAN_S} s")

    before = signal.signal(signal.SIGALRM, late)
    left = signal.setitimer(signal.ITIMER_REAL, MOST_PLAN_S)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *left)


def _run(
    policy: Policy[Any],
    executor: Executor,
    steps: Iterator[RoutedStep],
    setup: Setup,
    folder: RunFolder,
    name: str,
    watch: Watch | None,
) -> dict[str, Any]:
    """Run one policy; a stop by the user keeps its records."""
    backend, took_ns = RuntimeBackend(executor, bucket_of=next_power_of_two), list[int]()
    errors, late, stopped = 0, 0, False
    path = folder.path / f"{file_name(name)}.parquet"
    with writing(path) as append, warnings.catch_warnings(record=True) as caught, watch or nullcontext():
        warnings.simplefilter("always")

        def on_record(record: StepRecord) -> None:
            took_ns.append(record.end_ns - record.start_ns)
            append(record)
            if watch:
                watch.finished(record)

        try:
            with stoppable(watch.steps(steps) if watch else steps) as taken:
                result = drive(
                    policy,
                    backend,
                    taken,
                    setup,
                    on_record=on_record,
                    on_decision=watch.decided if watch else None,
                    on_policy_error="unsliced",
                    limit=_time_limit,
                )
            errors, late = result.policy_errors, result.late_plans
        except KeyboardInterrupt:
            stopped = True
            for record in backend.drain(wait=True):
                on_record(record)
    return {
        "steps": len(took_ns),
        **_quantiles_us(took_ns),
        "policy_errors": errors,
        "late_plans": late,
        "fallbacks": backend.num_fallbacks,
        "energy": [asdict(window) for window in backend.energy],
        "warnings": list(dict.fromkeys(str(one.message) for one in caught)),
        "stopped": stopped,
    }


def _quantiles_us(took_ns: Sequence[int]) -> dict[str, float | None]:
    names = {"step_us_q50": 0.5, "step_us_q99": 0.99}
    if not took_ns:
        return dict.fromkeys(("step_us_mean", *names))
    found = {name: float(np.quantile(took_ns, q)) / 1000 for name, q in names.items()}
    return {"step_us_mean": float(np.mean(took_ns)) / 1000, **found}


def line(name: str, found: dict[str, Any]) -> str:
    """Return one policy's summary for the terminal."""
    if not found["steps"]:
        return f"{name:14} no step finished"
    times = " ".join(f"{q} {found[f'step_us_{q}']:.1f}" for q in ("mean", "q50", "q99"))
    amiss = "".join(f", {found[key]} {what}" for key, what in _AMISS.items() if found[key])
    return f"{name:14} {found['steps']} steps, us a step: {times}{amiss}"


_AMISS = {
    "policy_errors": "decisions replaced by unsliced",
    "late_plans": "decisions too late, the old plan kept",
    "fallbacks": "steps that ran unsliced instead",
}
