"""`whatif`: rank slicing policies on a trace, for a device and a model."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_lists import AsJson, print_json


def whatif(
    trace: Annotated[str | None, typer.Argument(help="A routing trace; left out: the bundled one.")] = None,
    *,
    device: Annotated[str, typer.Option(help="See `expertslice devices`.")] = "h100-sxm5-80gb",
    policy: Annotated[list[str] | None, typer.Option(help="May be repeated; default: all built-in ones.")] = None,
    model: Annotated[str | None, typer.Option(help="A name from `expertslice models`, or a config.json.")] = None,
    fit_routing: Annotated[
        str | None, typer.Option(help="Synthesise routing for --model, fitted to this trace; 'bundled' is one.")
    ] = None,
    mechanism: Annotated[list[str] | None, typer.Option(help="Allow only this one; may be repeated.")] = None,
    segment: Annotated[str | None, typer.Option(help="Part of the trace; 'all' takes every step.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Take only the first steps.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once, with --fit-routing.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of resampling, re-batching and model errors.")] = 0,
    jobs: Annotated[int | None, typer.Option(min=1, help="Worker processes; default: one per core.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="POLICY.NAME=VALUE", help="Set a policy's parameter.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder in which the run's folder is made.")] = Path("runs"),
    as_json: AsJson = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Leave out figures and the HTML report.")] = False,
) -> None:
    """Rank slicing policies on a routing trace: which one, by how much, how sure, and why."""
    from .case import Options
    from .whatif import what_if

    options = Options(
        trace=trace,
        device=device,
        policies=tuple(policy or ()),
        settings=tuple(settings or ()),
        model=model,
        fit_routing=fit_routing,
        mechanisms=tuple(mechanism or ()),
        segment=segment,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        jobs=jobs or _cores(),
        out=out,
        report=not no_report,
    )
    _, summary, folder = what_if(options)
    if as_json:
        print_json({**summary, "folder": str(folder), "report": None if no_report else str(folder / "report.html")})
        return
    from .table import print_summary

    print_summary(summary, folder, report=not no_report)


def _cores() -> int:
    from joblib import cpu_count

    return cpu_count()
