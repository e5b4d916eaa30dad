"""`expertslice run`: a trace's steps under each policy on the runtime, one file of StepRecords for each.

On a GPU they are times; on a host without one they are reckoned from counts and device facts, and say so.
"""

import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..policies.contract import Control, EnergyWindow, Policy, Setup, StepRecord
from ..policies.data import load_device, load_variants
from ..policies.loop import drive
from ..runtime.backend import Executor, ExecutorError, RuntimeBackend
from ..sim.backend import next_power_of_two
from ..traces.schema import RoutedStep, StepSource
from .errors import StoppedError
from .inputs import BUNDLED, choose_model, choose_policies, choose_segment, open_source
from .records import writing
from .runs import RunFolder, provenance

HOST_LABEL = "no GPU timing: times are reckoned from counts and device facts"
Where = Literal["host", "gpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What the user asked for."""

    trace: str | None = None
    policies: Sequence[str] = ("unsliced",)
    settings: Sequence[str] = ()
    model: str | None = None
    device: str = "h100-sxm5-80gb"
    where: Where = "host"
    segment: str | None = None
    steps: int | None = None
    seed: int = 0
    out: Path = Path("runs")


def run_trace(options: RunOptions, say: Callable[[str], object]) -> tuple[dict[str, Any], Path]:
    """Run every policy over the trace; return a summary of each, and the folder of their records.

    Raises:
        ValueError: something is unknown, does not fit, or cannot run here; the message says what to give instead.
        StoppedError: the user stopped it; records up to then are kept.
    """
    opened = choose_segment(open_source(options.trace or BUNDLED), options.segment)
    model, notes = choose_model(opened, options.model)
    policies = choose_policies(options.policies, options.settings)
    foreseeing = [name for name, policy in policies.items() if policy.foresees]
    if foreseeing:
        raise ValueError(f"policy {foreseeing[0]} foresees steps, which only the simulator offers; use `whatif` for it")
    device = load_device(options.device)
    variants = load_variants(device.compute_capability)
    setup = Setup(device=device, model=model, variants=variants, control=Control(), seed=options.seed)
    executor = _executor(options.where, opened.source, options.steps)
    about = {
        "trace": opened.plain(),
        "model": asdict(model),
        "device": device.name,
        "where": options.where,
        "label": HOST_LABEL if options.where == "host" else "GPU timing",
        "seed": options.seed,
        "notes": [*opened.notes, *notes],
    }
    folder = RunFolder(options.out, "run", {**provenance(), **about})
    summary: dict[str, Any] = {}
    try:
        for name, policy in policies.items():
            summary[name] = _run(policy, executor(), _steps(opened.source, options.steps), setup, folder, name)
            folder.write_json("summary.json", {**about, "policies": summary})
            say(line(name, summary[name]))
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


def _executor(where: Where, source: StepSource, limit: int | None) -> Callable[[], Executor]:
    if where == "host":
        from ..runtime.host import HostExecutor

        return HostExecutor
    from .cli_gpu import require_gpu

    require_gpu("run --on gpu")
    from ..runtime.cuda import CudaExecutor

    most = max((step.num_tokens for step in _steps(source, limit)), default=1)
    return lambda: CudaExecutor(max_tokens=next_power_of_two(most))


def _steps(source: StepSource, limit: int | None) -> Iterator[RoutedStep]:
    return itertools.islice(source.steps(), limit)


def _run(
    policy: Policy[Any],
    executor: Executor,
    steps: Iterator[RoutedStep],
    setup: Setup,
    folder: RunFolder,
    name: str,
) -> dict[str, Any]:
    """Run one policy; a stop by the user keeps its records."""
    backend, took_ns = RuntimeBackend(executor, bucket_of=next_power_of_two), list[int]()
    energy: tuple[EnergyWindow, ...] = ()
    errors, stopped = 0, False
    file = re.sub(r"[^A-Za-z0-9_.-]+", "-", name) + ".parquet"
    with writing(folder.path / file) as append, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def on_record(record: StepRecord) -> None:
            took_ns.append(record.end_ns - record.start_ns)
            append(record)

        try:
            result = drive(policy, backend, steps, setup, on_record=on_record, on_policy_error="unsliced")
            energy, errors = result.energy, result.policy_errors
        except KeyboardInterrupt:
            stopped = True
            for record in backend.drain(wait=True):
                on_record(record)
    return {
        "steps": len(took_ns),
        **_quantiles_us(took_ns),
        "policy_errors": errors,
        "fallbacks": backend.num_fallbacks,
        "energy": [asdict(window) for window in energy],
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


_AMISS = {"policy_errors": "decisions replaced by unsliced", "fallbacks": "steps that ran unsliced instead"}
