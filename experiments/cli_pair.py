"""`pair`, `timeline` and `reproduce`: experiments that set hardware beside the simulator."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .cli_lists import print_json
from .cli_options import (
    DEVICE,
    RUNS,
    AsJson,
    Device,
    DeviceModel,
    Model,
    NoReport,
    Out,
    Segment,
    Settings,
    Steps,
    Trace,
    given,
)


def pair(
    trace: Trace = None,
    *,
    policies: Annotated[
        list[str] | None, typer.Option("--policy", help="May be repeated; unsliced always takes part.")
    ] = None,
    where: Annotated[Literal["host", "gpu"], typer.Option("--on", help="host: no GPU timing.")] = "host",
    device: Device = DEVICE,
    device_model: DeviceModel = None,
    model: Model = None,
    segment: Segment = None,
    steps: Steps = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every policy; intervals of repeats take 2.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, inputs and resampling.")] = 0,
    settings: Settings = None,
    busy_ok: Annotated[bool, typer.Option("--busy-gpu", help="Measure although others use the GPU.")] = False,
    out: Out = RUNS,
    as_json: AsJson = False,
    no_report: NoReport = False,
) -> None:
    """Run the same policies on a backend and in the simulator, in turn, and say how far the two agree."""
    arguments = locals()
    from .pair import PairOptions
    from .pair import pair as run_pair
    from .pair_report import lines

    options = PairOptions(**given(arguments), report=not no_report)
    summary, folder = run_pair(options, say=(lambda _: None) if as_json else typer.echo)
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
