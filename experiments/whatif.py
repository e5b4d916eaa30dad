"""What would slicing buy? A trace, a device, a model and policies in; a ranking with its reasons out.

The same tasks, in the same order, with seeds of their own: one worker or several give the same bytes.
"""

import contextlib
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..policies.candidates import unsliced_plans
from ..policies.contract import Plan, Policy
from ..policies.layouts import one_slice_plan
from ..traces.schema import StepSource
from .case import Case, Options, prepare
from .errors import StoppedError
from .ranking import REFERENCE, Evidence, rank
from .runs import RunFolder, provenance
from .simulate import Outcome
from .summary import Result, summarise
from .tasks import Task, run_tasks
from .why import explain
from .workload import FixedSteps, rebatched

NUM_DRAWS, BOUND_DRAWS = 16, 4
"""Draws of the model's errors; bounds, which are slow and take no rank, see the first of them alone."""
NUM_COMPOSITIONS = 3
COMPOSITION_LAYERS = 512
"""Layers of all steps of one other batching; at least LEAST_STEPS steps."""
LEAST_STEPS = 16


def what_if(options: Options) -> tuple[Result, dict[str, Any], Path]:
    """Compare policies; return the result, its summary and the run folder.

    Raises:
        ValueError: the input cannot be used.
        OSError: the run folder cannot be written.
        StoppedError: the user stopped it; what had finished was kept.
    """
    case = prepare(options)
    folder = RunFolder(options.out, "whatif", _manifest(case))
    try:
        result = _simulate(case, folder)
        summary = summarise(result)
        folder.write_json("summary.json", summary)
        if options.report:
            from .report import write_report

            write_report(result, summary, folder)
        return result, summary, folder.finish()
    except KeyboardInterrupt:
        kept = folder.keep_partial("stopped by the user")
        where = f"finished policies are kept in {kept}" if kept else "no policy had finished, nothing is kept"
        raise StoppedError(f"stopped; {where}") from None
    except BaseException as error:
        # A full disk may refuse the manifest as well; the first error is the one to report.
        with contextlib.suppress(OSError):
            folder.keep_partial(f"{type(error).__name__}: {error}")
        raise


def _manifest(case: Case) -> dict[str, Any]:
    policies = {name: {"class": _class_name(p), "params": asdict(p)} for name, p in case.policies.items()}
    device = case.world.device
    return {
        **provenance(),
        "options": asdict(case.options),
        "seed": case.options.seed,
        "draw_seeds": _draw_seeds(case),
        "trace": case.opened.plain(),
        "device": {"name": device.name, "status": device.status},
        "model": asdict(case.world.model),
        "mechanisms": sorted(case.world.mechanisms),
        "control": asdict(case.world.control),
        "policies": policies,
        "notes": list(case.notes),
    }


def _class_name(policy: Policy[Any]) -> str:
    return f"{type(policy).__module__}:{type(policy).__qualname__}"


def _draw_seeds(case: Case) -> list[int]:
    return [1000 * (case.options.seed + 1) + i for i in range(NUM_DRAWS)]


def records_name(policy: str) -> str:
    """Return the file name of a policy's StepRecords."""
    return f"steps-{re.sub(r'[^A-Za-z0-9_.-]+', '-', policy)}.parquet"


def other_batches(case: Case) -> list[FixedSteps]:
    """Return independent batchings of the trace's requests; none where it has none to batch anew."""
    if case.rebatch is None:
        return []
    wanted = max(LEAST_STEPS, COMPOSITION_LAYERS // case.source.num_layers)
    num_steps, (trace, like) = min(wanted, case.survey.num_steps), case.rebatch
    seeds = [case.options.seed + i + 1 for i in range(NUM_COMPOSITIONS)]
    return [rebatched(trace, like, num_steps=num_steps, seed=seed) for seed in seeds]


def plan_tasks(case: Case, folder: Path) -> list[Task]:
    """Return every simulation of the comparison: the trace, re-batched requests, draws of the model's errors."""
    batches = other_batches(case)
    tasks: list[Task] = []

    def add(
        kind: str, index: int, source: StepSource, label: str, draw: int | None = None, *, bounds: bool = True
    ) -> None:
        # Bounds search most and take longest: started first, they do not leave a worker alone at the end.
        for name, policy in sorted(case.policies.items(), key=lambda item: not item[1].foresees):
            if policy.foresees and not bounds:
                continue
            records = folder / records_name(name) if kind == "trace" else None
            tasks.append(
                Task(
                    label=f"{name} ({label})", kind=kind, index=index, name=name, policy=policy, source=source,
                    num_steps=source.num_steps, draw=draw, records=records,
                )
            )  # fmt: skip

    add("trace", 0, case.source, "the trace")
    for index, batch in enumerate(batches):
        add("composition", index, batch, f"other batches {index + 1} of {len(batches)}")
    add("nominal", 0, case.survey.windows, "sampled steps")
    for index, seed in enumerate(_draw_seeds(case)):
        label = f"model error {index + 1} of {NUM_DRAWS}"
        add("draw", index, case.survey.windows, label, seed, bounds=index < BOUND_DRAWS)
    return tasks


def _simulate(case: Case, folder: RunFolder) -> Result:
    tasks = plan_tasks(case, folder.path)
    found: dict[tuple[str, int], dict[str, Outcome]] = {}
    for task, outcome in run_tasks(tasks, case.world, jobs=case.options.jobs):
        found.setdefault((task.kind, task.index), {})[task.name] = outcome

    def all_of(kind: str) -> list[dict[str, Outcome]]:
        return [found[key] for key in sorted(found) if key[0] == kind]

    evidence = Evidence(
        main=found["trace", 0], compositions=all_of("composition"), nominal=found["nominal", 0], draws=all_of("draw")
    )
    foresees = {name: policy.foresees for name, policy in case.policies.items()}
    ranking = rank(evidence, foresees, seed=case.options.seed)
    steps = list(case.survey.windows.steps())
    truth = case.world.truth()
    controls = unsliced_plans(case.world.setup(foresees=False, truth=truth))
    why = explain(ranking, evidence, truth, _usual_plan(evidence.main[REFERENCE]), steps, controls)
    records = {name: folder.path / records_name(name) for name in case.policies}
    return Result(case=case, evidence=evidence, ranking=ranking, why=why, records=records)


def _usual_plan(unsliced: Outcome) -> Plan:
    return one_slice_plan(max(unsliced.layouts, key=lambda layout: unsliced.layouts[layout].steps))
