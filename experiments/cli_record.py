"""`record`: a Python program whose Mixture-of-Experts model is recorded while it runs."""

from pathlib import Path
from typing import Annotated

import typer


def record(
    command: Annotated[list[str], typer.Argument(help="After --: python script.py ..., or python -m module ...")],
    *,
    out: Annotated[Path, typer.Option(help="The trace to write (Parquet).")] = Path("routing.parquet"),
    name: Annotated[str | None, typer.Option(help="The model's name; default: what its config says.")] = None,
    times: Annotated[bool, typer.Option("--times", help="Time experts and the rest, layer by layer.")] = False,
    flush_seconds: Annotated[float, typer.Option(min=0.1, help="What a crash may cost.")] = 5.0,
) -> None:
    """Run a Python program and record how its model routes: any Hugging Face model with experts, or ours."""
    try:
        from .record_program import record_command
    except ImportError as error:
        raise ValueError(f"record needs torch ({error}); install expertslice[gpu,hf]") from None

    found = record_command(command, out, name=name, times=times, flush_s=flush_seconds)
    typer.echo(f"wrote {out}: {found.num_steps} steps of {found.model}; next: expertslice whatif {out}")
