"""What would slicing buy? A trace, a device, a model and policies in; a ranking with its reasons out.

The same tasks, in the same order, with seeds of their own: one worker or several give the same bytes.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..policies.contract import MECHANISMS, Mechanism, Plan, Policy
from ..policies.data import load_device, nearest
from ..policies.layouts import one_slice_plan
from ..traces.schema import StepSource
from ..traces.trace import RoutingTrace
from .errors import StoppedError
from .inputs import BUNDLED, Opened, choose_model, choose_policies, choose_segment, open_source
from .ranking import REFERENCE, Evidence, Ranking, phase_effects, rank, row_of
from .runs import DEFAULT_ROOT, RunFolder, provenance
from .simulate import Outcome, World
from .tasks import Task, run_tasks
from .why import Why, explain
from .workload import Limited, Survey, rebatched, survey

NUM_WINDOWS, WINDOW_STEPS = 3, 24
"""Sampled steps: what model errors are drawn on, and what the reasons are computed from."""
NUM_DRAWS = 12
NUM_COMPOSITIONS, COMPOSITION_STEPS = 3, 96
REBATCH_TOKENS = 400_000
"""Tokens of a trace held in memory to batch its requests anew; a longer trace gives its first ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked for."""

    trace: str | None = None
    device: str = "h100-sxm5-80gb"
    policies: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    model: str | None = None
    fit_routing: str | None = None
    mechanisms: tuple[str, ...] = ()
    segment: str | None = None
    steps: int | None = None
    batch_size: int = 64
    seed: int = 0
    jobs: int = 1
    out: Path = DEFAULT_ROOT
    report: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Everything that is simulated, resolved and checked before the first step."""

    options: Options
    world: World
    opened: Opened
    source: StepSource
    survey: Survey
    rebatch: RoutingTrace | None
    policies: dict[str, Policy[Any]]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished comparison."""

    case: Case
    evidence: Evidence
    ranking: Ranking
    why: Why
    records: dict[str, Path] = field(default_factory=dict[str, Path])

    @property
    def provisional(self) -> bool:
        """Return whether the device's model has not been calibrated."""
        return self.case.world.device.status == "provisional"


def prepare(options: Options) -> Case:
    """Resolve names to objects and look at the trace once.

    Raises:
        ValueError: something is unknown or does not fit; the message says what to give instead.
    """
    device = load_device(options.device)
    policies = choose_policies(options.policies, options.settings)
    mechanisms = _mechanisms(options.mechanisms)
    if options.fit_routing is not None:
        from .fitted import fitted_source

        opened, source, model, notes = fitted_source(options)
    else:
        opened = choose_segment(open_source(options.trace or BUNDLED), options.segment)
        model, said = choose_model(opened.source, options.model)
        source, notes = opened.source, (*opened.notes, *said)
    if options.steps is not None:
        source = Limited(source=source, limit=options.steps)
    world = World(device=device, model=model, mechanisms=mechanisms, seed=options.seed)
    policies, left_out = _runnable(policies, world, strict=bool(options.policies))
    return Case(
        options=options,
        world=world,
        opened=opened,
        source=source,
        survey=survey(source, num_windows=NUM_WINDOWS, window_steps=WINDOW_STEPS),
        rebatch=_in_memory(opened.source),
        policies=policies,
        notes=(*notes, *left_out),
    )


def _mechanisms(names: Sequence[str]) -> frozenset[Mechanism]:
    for name in names:
        if name not in MECHANISMS:
            raise ValueError(nearest("mechanism", name, MECHANISMS))
    return frozenset(m for m in MECHANISMS if not names or m in names)


def _runnable(
    policies: dict[str, Policy[Any]], world: World, *, strict: bool
) -> tuple[dict[str, Policy[Any]], tuple[str, ...]]:
    """Ask every policy for its layouts, so that one that cannot run here says so before the first step."""
    kept: dict[str, Policy[Any]] = {}
    notes: list[str] = []
    truth = world.truth()
    for name, policy in policies.items():
        try:
            policy.layouts(world.setup(foresees=policy.foresees, truth=truth))
            kept[name] = policy
        except ValueError as error:
            if strict or name == REFERENCE:
                raise
            notes.append(f"{name} is left out: {error}")
    return kept, tuple(notes)


def _in_memory(source: StepSource) -> RoutingTrace | None:
    if isinstance(source, RoutingTrace):
        return source
    blocks = getattr(source, "blocks", None)
    if blocks is None or not hasattr(source, "num_tokens"):
        return None
    from ..traces.trace import concat

    kept: list[RoutingTrace] = []
    for block in blocks():
        kept.append(block)
        if sum(b.num_tokens for b in kept) >= REBATCH_TOKENS:
            break
    return concat(kept) if kept else None


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
        folder.keep_partial(f"{type(error).__name__}: {error}")
        raise


def _manifest(case: Case) -> dict[str, Any]:
    policies = {name: {"class": _class_name(p), "params": asdict(p)} for name, p in case.policies.items()}  # pyright: ignore[reportArgumentType]
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


def plan_tasks(case: Case, folder: Path) -> list[Task]:
    """Return every simulation of the comparison: the trace, re-batched requests, draws of the model's errors."""
    batches = rebatched(
        case.source, case.rebatch, count=NUM_COMPOSITIONS, num_steps=min(COMPOSITION_STEPS, case.survey.num_steps),
        seed=case.options.seed,
    )  # fmt: skip
    tasks: list[Task] = []

    def add(kind: str, index: int, source: StepSource, label: str, draw: int | None = None) -> None:
        for name, policy in case.policies.items():
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
        add("draw", index, case.survey.windows, f"model error {index + 1} of {NUM_DRAWS}", seed)
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
    steps = list(case.survey.windows.steps())[::6]
    why = explain(ranking, evidence, case.world.truth(), _usual_plan(evidence.main[REFERENCE]), steps)
    records = {name: folder.path / records_name(name) for name in case.policies}
    return Result(case=case, evidence=evidence, ranking=ranking, why=why, records=records)


def _usual_plan(unsliced: Outcome) -> Plan:
    return one_slice_plan(max(unsliced.layouts, key=lambda layout: unsliced.layouts[layout].steps))


def summarise(result: Result) -> dict[str, Any]:
    """Return the result as plain values: what `--json` prints and the report shows."""
    case, ranking = result.case, result.ranking
    order = sorted(range(len(ranking.names)), key=lambda p: (ranking.ranks[p] is None, ranking.effect_P[p]))
    rows = [
        row_of(name, ranking, result.evidence.main[name], case.policies[name].foresees)
        for name in (ranking.names[p] for p in order)
    ]
    device = case.world.device
    return {
        "kind": "whatif",
        "provisional": result.provisional,
        "device": {"name": device.name, "title": device.title, "status": device.status},
        "model": {"name": case.world.model.name, **asdict(case.world.model)},
        "trace": case.opened.plain(),
        "workload": {
            "num_steps": case.survey.num_steps,
            "num_tokens": case.survey.num_tokens,
            "steps_of_phase": case.survey.steps_of_phase,
            "tokens_of_phase": case.survey.tokens_of_phase,
        },
        "seed": case.options.seed,
        "statistics": {
            "effect": "mean step time against unsliced on the same steps, percent; negative is faster",
            "level": 0.95,
            "block_steps": ranking.block_steps,
            "compositions": len(ranking.composition_CP),
            "model_draws": len(ranking.draw_MP),
            "sampled_steps": case.survey.windows.num_steps,
        },
        "ranking": rows,
        "phases": phase_effects(result.evidence, ranking.names, case.options.seed),
        "compositions": [dict(zip(ranking.names, row.tolist(), strict=True)) for row in ranking.composition_CP],
        "draws": [dict(zip(ranking.names, row.tolist(), strict=True)) for row in ranking.draw_MP],
        "pairs": _pairs(ranking),
        "why": result.why.plain(),
        "notes": list(case.notes),
    }


def _pairs(ranking: Ranking) -> list[dict[str, Any]]:
    c = ranking.comparison
    return [
        {
            "a": a, "b": b, "difference_percent": float(c.difference_PP[i, j]),
            "half_percent": float(c.half_width_PP[i, j]), "differ": bool(c.differ_PP[i, j]),
        }
        for i, a in enumerate(ranking.names)
        for j, b in enumerate(ranking.names)
        if i < j
    ]  # fmt: skip


def with_seed(options: Options, seed: int) -> Options:
    """Return the same options under another seed."""
    return replace(options, seed=seed)
