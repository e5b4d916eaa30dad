"""`judge`: the command line of what explores policies."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_lists import AsJson, print_json

Trace = Annotated[str | None, typer.Argument(help="A trace of requests; left out: the bundled one.")]
Device = Annotated[str, typer.Option(help="See `expertslice devices`.")]
Model = Annotated[str | None, typer.Option(help="A name from `expertslice models`, or a config.json.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Requests at once; left out: as in the trace.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the first split.")]
Splitting = Annotated[int, typer.Option(help="Independent splits of the requests.")]
Out = Annotated[Path, typer.Option(help="Folder in which the run's folder is made.")]


def judge(
    trace: Trace = None,
    *,
    policies: Annotated[list[str] | None, typer.Option("--policy", help="Repeatable; parameters as in sweep.")] = None,
    device: Device = "h100-sxm5-80gb",
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
    out: Out = Path("runs"),
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
