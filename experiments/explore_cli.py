"""`judge`, `forecast`, `search` and `explain`: the command lines of what explores policies."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_lists import print_json
from .cli_options import DEVICE, RUNS, AsJson, Device, LimitS, MemoryGib, Model, Out, Steps, Trace

Batch = Annotated[int | None, typer.Option(min=1, help="Requests at once; left out: as in the trace.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the first split.")]
Splitting = Annotated[int, typer.Option(help="Independent splits of the requests.")]


def judge(
    trace: Trace = None,
    *,
    policies: Annotated[list[str] | None, typer.Option("--policy", help="Repeatable; parameters as in sweep.")] = None,
    device: Device = DEVICE,
    model: Model = None,
    batch_size: Batch = None,
    splits: Splitting = 5,
    learn_steps: Annotated[int, typer.Option(min=1, help="Steps of one half of the requests.")] = 400,
    judge_steps: Annotated[int, typer.Option(min=8, help="Steps of the other half, which are judged.")] = 400,
    belief: Annotated[str | None, typer.Option(help="Device that policies wrongly believe in.")] = None,
    perturbed: Annotated[
        bool, typer.Option("--perturbed", help="Draw the model's errors anew for each split.")
    ] = False,
    seed: Seed = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
    out: Out = RUNS,
    as_json: AsJson = False,
) -> None:
    """Learn on one half of the requests and judge on the other: what of the gap to the oracle a policy closes."""
    from .case import Options
    from .judge import Splits, lines
    from .judge import judge as run_judge

    options = Options(trace=trace, device=device, model=model, seed=seed, jobs=jobs)
    asked = Splits(
        options=options, policies=policies or ("predictive", "planner"), splits=splits, learn_steps=learn_steps,
        judge_steps=judge_steps, batch_size=batch_size, belief=belief, perturbed=perturbed, out=out,
    )  # fmt: skip
    summary, folder = run_judge(asked)
    if as_json:
        print_json({**summary, "folder": str(folder)})
    else:
        typer.echo("\n".join([*lines(summary), f"run  {folder}"]))


def forecast(
    trace: Trace = None,
    *,
    model: Model = None,
    batch_sizes: Annotated[list[int] | None, typer.Option("--batch-size", min=1, help="Repeatable.")] = None,
    splits: Splitting = 3,
    learn_steps: Annotated[int, typer.Option(min=1, help="Steps of one half of the requests.")] = 300,
    judge_steps: Annotated[int, typer.Option(min=17, help="Steps of the other half, which are judged.")] = 200,
    seed: Seed = 0,
    out: Out = RUNS,
    as_json: AsJson = False,
) -> None:
    """Measure how well loads some steps ahead are predicted, beside persistence and popularity."""
    import numpy as np

    from .case import Options
    from .forecast import HORIZONS, METHODS
    from .forecast import forecast as run_forecast

    rows, folder = run_forecast(
        Options(trace=trace, model=model, seed=seed), batches=tuple(batch_sizes or (None,)), splits=splits,
        learn_steps=learn_steps, judge_steps=judge_steps, out=out,
    )  # fmt: skip
    if as_json:
        print_json({"rows": rows, "folder": str(folder)})
        return
    for size in sorted({row["batch_size"] for row in rows}):
        for horizon in HORIZONS:
            at = [row for row in rows if (row["batch_size"], row["horizon"]) == (size, horizon)]
            means = {method: np.mean([row["error"] for row in at if row["method"] == method]) for method in METHODS}
            words = ", ".join(f"{method} {mean:.4f}" for method, mean in means.items())
            typer.echo(f"{size} requests at once, {horizon} steps ahead: {words}")
    typer.echo(f"run  {folder}")


def search(
    policy: Annotated[str, typer.Argument(help="'name(parameter=least..most, parameter=value|value)'.")],
    *,
    trace: Annotated[str | None, typer.Option(help="Left out: the bundled one.")] = None,
    device: Device = DEVICE,
    model: Model = None,
    objectives: Annotated[
        list[str] | None, typer.Option("--objective", help="latency, p99, energy; repeatable.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Most trials of this process.")] = 50,
    storage: Annotated[
        str, typer.Option(help="A journal file, or an SQL address; may be shared.")
    ] = "runs/search.journal",
    study: Annotated[str | None, typer.Option(help="Name; the same goes on. Left out: the policy as written.")] = None,
    steps: Steps = None,
    seed: Seed = 0,
    limit_s: LimitS = 300,
    memory_gib: MemoryGib = 2,
    out: Out = RUNS,
    as_json: AsJson = False,
) -> None:
    """Search a policy's parameters for several objectives; stops when the fastest is told from all others."""
    from .case import Options
    from .search import Asked, Limits, search_lines
    from .search import search as run_search

    names = objectives or ["latency", "p99", "energy"]
    options = Options(trace=trace, device=device, model=model, steps=steps, seed=seed, policies=("unsliced",), jobs=1)
    limits = Limits(time_s=limit_s, memory_bytes=int(memory_gib * 2**30))
    asked = Asked(
        policy=policy, options=options, objectives=names, trials=trials, storage=storage, limits=limits, out=out,
        study=study or f"{policy} on {trace or 'bundled'}, {device}, {', '.join(names)}, seed {seed}, {steps} steps",
    )  # fmt: skip
    summary, folder = run_search(asked)
    if as_json:
        print_json({**summary, "folder": str(folder)})
    else:
        typer.echo("\n".join([*search_lines(summary), f"run  {folder}"]))


def explain(
    run: Annotated[Path, typer.Argument(help="The folder of an `expertslice whatif` or `run`.")],
    *,
    step: Annotated[int, typer.Option(min=0, help="The step whose plan is explained.")],
    policy: Annotated[str | None, typer.Option(help="Left out: the first but unsliced.")] = None,
    as_json: AsJson = False,
) -> None:
    """Explain a decision of a finished run: what was seen and chosen, what else would have cost, regret over time."""
    from .decisions import decision_lines, explain_decision

    found = explain_decision(run, step, policy)
    if as_json:
        print_json(found)
    else:
        typer.echo("\n".join(decision_lines(found)))
