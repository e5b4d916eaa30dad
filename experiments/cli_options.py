"""Options that several commands share, and how what was given reaches the dataclass behind a command."""

from pathlib import Path
from typing import Annotated, Any

import typer

Trace = Annotated[str | None, typer.Argument(help="A routing trace; left out: the bundled one.")]
Device = Annotated[str, typer.Option(help="See `expertslice devices`; on a GPU: the one that is there.")]
DeviceModel = Annotated[Path | None, typer.Option(help="A file of `expertslice calibrate`.")]
Model = Annotated[str | None, typer.Option(help="A name from `expertslice models`, or a config.json.")]
Segment = Annotated[str | None, typer.Option(help="Part of the trace; 'all' takes every step.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Take only the first steps.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="POLICY.NAME=VALUE", help="Set a policy's parameter.")
]
LimitS = Annotated[float, typer.Option(min=0.01, help="Most seconds that a point or trial may take.")]
MemoryGib = Annotated[float, typer.Option(min=0.01, help="Most memory that a point or trial may take.")]
Commit = Annotated[str | None, typer.Option(help="Of a checkout that has no history with it.")]
Out = Annotated[Path, typer.Option(help="Folder in which the run's folder is made.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
NoReport = Annotated[bool, typer.Option("--no-report", help="Leave out figures and the HTML report.")]

DEVICE = "h100-sxm5-80gb"
RUNS = Path("runs")


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the options that say what is run, without those that were left out, of a command's `locals()`.

    A context's own parameters would do, were they of the declared types in every version of typer.
    """
    about_output, left_out = ("as_json", "no_report"), (None, [], ())
    return {name: value for name, value in arguments.items() if name not in about_output and value not in left_out}
