"""The command line's entry: commands are added here, heavy imports wait inside them."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from . import (
    cli_bench,
    cli_fidelity,
    cli_gpu,
    cli_lists,
    cli_mig,
    cli_pair,
    cli_record,
    cli_reproduce,
    cli_trace,
    explore_cli,
    sweep_cli,
)
from . import cli_options as shared
from .cli_lists import print_json
from .errors import EXIT_INTERRUPT, EXIT_USER, StoppedError, sentence_of

NOTHING_KEPT = "stopped; nothing was written"
INTRODUCTION = f"""expertslice {__version__}: would slicing a GPU between experts make your MoE model faster?

  expertslice whatif                 rank the slicing policies on the bundled trace; a report is written
  expertslice whatif my.parquet      the same on a trace of yours, for any --device and --model
  expertslice trace info my.parquet  what a routing trace looks like; `trace import` reads other formats
  expertslice record -- python my_script.py    routing of a Hugging Face model of yours, into routing.parquet
  expertslice pair --policy hot_cold           the same policies on a backend beside the simulator: how far they agree
  expertslice policies | devices | models | doctor

No GPU is needed. Add --help to any command; start with: expertslice whatif
"""

app = typer.Typer(
    name="expertslice",
    help="Explore expert-sliced GPU scheduling of Mixture-of-Experts layers: no GPU needed.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def whatif(
    trace: shared.Trace = None,
    *,
    device: shared.Device = shared.DEVICE,
    policies: Annotated[
        list[str] | None, typer.Option("--policy", help="May be repeated; default: all built-in ones.")
    ] = None,
    device_model: shared.DeviceModel = None,
    model: shared.Model = None,
    beside: Annotated[
        str | None, typer.Option(metavar="GFLOP,MB", help="Other work beside each layer's experts, as for `mixed`.")
    ] = None,
    fit_routing: Annotated[
        str | None, typer.Option(help="Synthesise routing for --model, fitted to this trace; 'bundled' is one.")
    ] = None,
    mechanisms: Annotated[
        list[str] | None, typer.Option("--mechanism", help="Allow only this one; may be repeated.")
    ] = None,
    segment: shared.Segment = None,
    steps: shared.Steps = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once, with --fit-routing.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of resampling, re-batching and model errors.")] = 0,
    jobs: Annotated[int | None, typer.Option(min=1, help="Worker processes; default: one per core.")] = None,
    settings: shared.Settings = None,
    out: shared.Out = shared.RUNS,
    as_json: shared.AsJson = False,
    no_report: shared.NoReport = False,
) -> None:
    """Rank slicing policies on a routing trace: which one, by how much, how sure, and why."""
    arguments = locals()
    from .case import Options
    from .table import print_summary
    from .whatif import what_if

    _, summary, folder = what_if(Options(**shared.given(arguments), report=not no_report))
    if as_json:
        print_json({**summary, "folder": str(folder), "report": None if no_report else str(folder / "report.html")})
    else:
        print_summary(summary, folder, report=not no_report)


app.command(name="doctor")(cli_gpu.doctor)
app.command(name="run")(cli_gpu.run_trace)
app.command(name="pair")(cli_pair.pair)
app.command(name="timeline")(cli_pair.timeline)
app.command(name="record")(cli_record.record)
app.command(name="mig")(cli_mig.mig)
app.command(name="tune")(cli_gpu.tune)
app.command(name="bench")(cli_bench.bench)
app.command(name="reproduce")(cli_reproduce.reproduce)
app.command(name="profile")(cli_fidelity.profile)
app.command(name="calibrate")(cli_fidelity.calibrate)
app.command(name="fidelity")(cli_fidelity.fidelity)
app.command(name="sweep")(sweep_cli.sweep)
for command in (explore_cli.judge, explore_cli.forecast, explore_cli.search, explore_cli.explain):
    app.command()(command)
app.command(name="devices")(cli_lists.devices)
app.command(name="models")(cli_lists.models)
app.command(name="policies")(cli_lists.policies)
app.add_typer(cli_trace.app, name="trace")


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"expertslice {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(INTRODUCTION, nl=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for a user's mistake, 130 after Ctrl-C; bugs raise."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    try:
        code = app(list(arguments), prog_name="expertslice", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort, StoppedError) as stopped:
        return _complain(str(stopped) or NOTHING_KEPT, EXIT_INTERRUPT)
    except BrokenPipeError:
        # Whoever reads us has seen enough; the interpreter must not complain while flushing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        sentence = _usage_sentence(error) or sentence_of(error)
        if sentence is None:
            raise
        return _complain(sentence, EXIT_USER)
    # Some versions of typer turn Ctrl-C into a return value.
    return _complain(NOTHING_KEPT, EXIT_INTERRUPT) if code == EXIT_INTERRUPT else int(code or 0)


def _usage_sentence(error: Exception) -> str | None:
    """Return the sentence for an error of the command line itself; its class differs between versions of typer."""
    if not hasattr(error, "format_message"):
        return None
    message = error.format_message().strip().rstrip(".")
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "expertslice"
    return f"{message[:1].lower()}{message[1:]} (see {where} --help)"


def _complain(sentence: str, code: int) -> int:
    typer.echo(f"expertslice: {sentence}", err=True)
    return code
