"""What would slicing buy? A trace, a device, a model and policies in; a ranking with its reasons out.

The same tasks, in the same order, with seeds of their own: one worker or several give the same bytes.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..policies.candidates import unsliced_plans
from ..policies.layouts import one_slice_plan
from .case import Case, Options, prepare
from .errors import StoppedError
from .ranking import REFERENCE, Outcomes, rank
from .runs import RunFolder, file_name, provenance
from .simulate import Outcome
from .tasks import Run, Task, run_tasks
from .why import explain
from .workload import FixedSteps, rebatched

NUM_DRAWS, BOUND_DRAWS = 16, 4
"""Draws of the model's errors; bounds, which are slow and take no rank, see the first of them alone."""
NUM_COMPOSITIONS = 3
COMPOSITION_LAYERS = 512
"""Layers of all steps of one other batching; at least LEAST_STEPS steps."""
LEAST_STEPS = 16
KINDS = ("trace", "composition", "nominal", "draw")
Runs = Mapping[str, Sequence[Outcomes]]
"""What came out, by the kind of run and its index."""


def what_if(options: Options) -> tuple[Case, dict[str, Any], Path]:
    """Compare policies; return what was compared, the outcome as `--json` prints it, and the run folder.

    Raises:
        ValueError: the input cannot be used.
        OSError: the run folder cannot be written.
        StoppedError: the user stopped it; what had finished was kept.
    """
    case = prepare(options)
    folder = RunFolder(options.out, "whatif", _manifest(case))
    try:
        # Workers that served an earlier call in this process may stand in another folder.
        runs, records = _simulate(case, folder.path.resolve())
        summary = summarise(case, runs)
        folder.write_json("summary.json", summary)
        if options.report:
            from .figures import draw_all
            from .report import render

            figures = draw_all(summary, runs["trace"][0], case.survey.mean_LE, records, folder.path)
            folder.write_text("report.html", render(case, summary, figures))
        return case, summary, folder.finish()
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
    policies = {
        name: {"class": f"{type(policy).__module__}:{type(policy).__qualname__}", "params": asdict(policy)}
        for name, policy in case.policies.items()
    }
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


def _draw_seeds(case: Case) -> list[int]:
    return [1000 * (case.options.seed + 1) + i for i in range(NUM_DRAWS)]


def _other_batches(case: Case) -> list[FixedSteps]:
    """Return independent batchings of the trace's requests; none where it has none to batch anew."""
    if case.rebatch is None:
        return []
    wanted = max(LEAST_STEPS, COMPOSITION_LAYERS // case.source.num_layers)
    num_steps, seed = min(wanted, case.survey.num_steps), case.options.seed
    return [rebatched(*case.rebatch, num_steps=num_steps, seed=seed + i + 1) for i in range(NUM_COMPOSITIONS)]


def _runs(case: Case) -> Iterator[Run]:
    """Yield the trace itself, its requests in other batches, and sampled steps under draws of the model's errors."""
    yield Run(kind="trace", label="the trace", source=case.source, num_steps=case.survey.num_steps)
    batches = _other_batches(case)
    for i, batch in enumerate(batches):
        label = f"other batches {i + 1} of {len(batches)}"
        yield Run(kind="composition", label=label, source=batch, num_steps=batch.num_steps, index=i)
    windows = case.survey.windows
    sample = Run(kind="nominal", label="sampled steps", source=windows, num_steps=windows.num_steps)
    yield sample
    for i, draw in enumerate(_draw_seeds(case)):
        yield replace(sample, kind="draw", label=f"model error {i + 1} of {NUM_DRAWS}", index=i, draw=draw)


def plan_tasks(case: Case, records: Mapping[str, Path]) -> list[Task]:
    """Return every simulation of the comparison."""
    # Bounds search most and take longest: started first, they do not leave a worker alone at the end.
    policies = sorted(case.policies.items(), key=lambda item: not item[1].foresees)
    return [
        Task(run=run, name=name, policy=policy, records=records[name] if run.kind == "trace" else None)
        for run in _runs(case)
        for name, policy in policies
        if not (policy.foresees and run.kind == "draw" and run.index >= BOUND_DRAWS)
    ]


def _simulate(case: Case, folder: Path) -> tuple[Runs, dict[str, Path]]:
    """Run every task; return what came out, and each policy's file of records."""
    records = {name: folder / f"{file_name(name)}.parquet" for name in case.policies}
    tasks = plan_tasks(case, records)
    ended = dict(run_tasks(tasks, case.world, jobs=case.options.jobs))
    runs: dict[str, list[dict[str, Outcome]]] = {kind: [] for kind in KINDS}
    # In the order planned, not in that in which workers ended.
    for place, task in enumerate(tasks):
        of_kind = runs[task.run.kind]
        if task.run.index == len(of_kind):
            of_kind.append({})
        of_kind[task.run.index][task.name] = ended[place]
    return runs, records


def summarise(case: Case, runs: Runs) -> dict[str, Any]:
    """Return the outcome as plain values: what `--json` prints and the report shows."""
    seed, device, look = case.options.seed, case.world.device, case.survey
    (main,), (nominal,), bounds = runs["trace"], runs["nominal"], [n for n, p in case.policies.items() if p.foresees]
    ranked = rank(main, runs["composition"], nominal, runs["draw"], bounds=bounds, seed=seed)
    truth, layouts = case.world.truth(), main[REFERENCE].layouts
    usual = one_slice_plan(max(layouts, key=lambda layout: layouts[layout].steps))
    controls = unsliced_plans(case.world.setup())
    workload = ("num_steps", "num_tokens", "steps_of_phase", "tokens_of_phase")
    return {
        "kind": "whatif",
        "provisional": device.status == "provisional",
        "device": {"name": device.name, "title": device.title, "status": device.status},
        "model": asdict(case.world.model),
        "trace": case.opened.plain(),
        "workload": {name: getattr(look, name) for name in workload},
        "seed": seed,
        **ranked,
        "why": explain(ranked["ranking"], main, truth, usual, look.windows.kept, controls),
        "notes": list(case.notes),
    }
