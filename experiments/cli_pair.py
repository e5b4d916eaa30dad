"""`pair`, `timeline` and `reproduce`: experiments that set hardware beside the simulator."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .cli_lists import AsJson, print_json


def pair(
    context: typer.Context,
    trace: Annotated[str | None, typer.Argument(help="A routing trace; left out: the bundled one.")] = None,
    *,
    policies: Annotated[
        list[str] | None, typer.Option("--policy", help="May be repeated; unsliced always takes part.")
    ] = None,
    where: Annotated[Literal["host", "gpu"], typer.Option("--on", help="host: no GPU timing.")] = "host",
    device: Annotated[str, typer.Option(help="See `expertslice devices`; on a GPU: the one that is there.")] = (
        "h100-sxm5-80gb"
    ),
    model: Annotated[str | None, typer.Option(help="A name from `expertslice models`, or a config.json.")] = None,
    segment: Annotated[str | None, typer.Option(help="Part of the trace; 'all' takes every step.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Take only the first steps.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every policy; intervals of repeats take 2.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, inputs and resampling.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="POLICY.NAME=VALUE", help="Set a policy's parameter.")
    ] = None,
    busy_ok: Annotated[bool, typer.Option("--busy-gpu", help="Measure although others use the GPU.")] = False,
    out: Annotated[Path, typer.Option(help="Folder in which the run's folder is made.")] = Path("runs"),
    as_json: AsJson = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Leave out figures and the HTML report.")] = False,
) -> None:
    """Run the same policies on a backend and in the simulator, in turn, and say how far the two agree."""
    from .pair import PairOptions
    from .pair import pair as run_pair
    from .pair_report import lines

    own = ("as_json", "no_report")
    given = {name: value for name, value in context.params.items() if name not in own and value is not None}
    summary, folder = run_pair(
        PairOptions(**given, report=not no_report), say=(lambda _: None) if as_json else typer.echo
    )
    if as_json:
        print_json({**summary, "folder": str(folder)})
    else:
        shown = [summary["label"], *lines(summary), f"result: {folder if no_report else folder / 'report.html'}"]
        typer.echo("\n".join(shown))


def timeline(
    folder: Annotated[Path, typer.Argument(help="Of a run, pair or what-if.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Default: timeline.pftrace in the folder.")] = None,
    first: Annotated[int, typer.Option(min=0, help="The first step shown.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="How many; default: all.")] = None,
) -> None:
    """Write a run's records as a Perfetto trace: a track for the host, the stream and each slice, worlds together."""
    from .timeline import write_timeline

    typer.echo(str(write_timeline(folder, out, first=first, steps=steps)))
