"""`reproduce`: the command line of `reproduce.py`."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_gpu import require_gpu


def reproduce(
    target: Annotated[
        str, typer.Argument(help="table1, figure1, table2, table3, table4, table5, accuracy, or all of them.")
    ],
    *,
    seconds: Annotated[float, typer.Option(min=1, help="After which no point begins; the same command goes on.")] = 480,
    out: Annotated[Path, typer.Option(help="Folder of rows, kept and added to by later calls.")] = Path(
        "runs/reproduce"
    ),
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Only what the simulator says of it; needs no GPU.")
    ] = False,
    commit: Annotated[str | None, typer.Option(help="Of a checkout that has no history with it.")] = None,
    busy_gpu: Annotated[bool, typer.Option("--busy-gpu", help="Measure though others use the GPU.")] = False,
) -> None:
    """Measure what the paper claims, table by table: every arm checked, timed on cold weights, and kept as rows."""
    from .reproduce import reproduce as run_reproduce
    from .reproduce import reproduce_simulated, tasks_of

    tasks_of(target)
    if simulated:
        reproduce_simulated(target, out, say=typer.echo)
        return
    require_gpu("reproduce")
    run_reproduce(target, out, seconds=seconds, commit=commit, busy_ok=busy_gpu, say=typer.echo)
