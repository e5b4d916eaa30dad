"""The command line's entry: commands are added here, heavy imports wait inside them."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from . import cli_lists, cli_trace, cli_whatif
from .errors import EXIT_INTERRUPT, EXIT_USER, StoppedError, sentence_of

NOTHING_KEPT = "stopped; nothing was written"
INTRODUCTION = f"""expertslice {__version__}: would slicing a GPU between experts make your MoE model faster?

  expertslice whatif                 rank the slicing policies on the bundled trace; a report is written
  expertslice whatif my.parquet      the same on a trace of yours, for any --device and --model
  expertslice trace info my.parquet  what a routing trace looks like; `trace import` reads other formats
  expertslice policies | devices | models

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
app.command(name="whatif")(cli_whatif.whatif)
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
    """Run the command line and return its exit code."""
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
