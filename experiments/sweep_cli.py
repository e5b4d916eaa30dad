"""`sweep`: the command line of `sweep.py`."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_lists import print_json
from .cli_options import AsJson, LimitS, MemoryGib, Segment, Steps

Many = list[str] | None


def sweep(
    context: typer.Context,
    *,
    policies: Annotated[Many, typer.Option("--policy", help="'name(parameter=value|value)'; repeatable.")] = None,
    traces: Annotated[Many, typer.Option("--trace", help="Repeatable; left out: the bundled one.")] = None,
    models: Annotated[Many, typer.Option("--model", help="A name or a config.json; repeatable.")] = None,
    devices: Annotated[Many, typer.Option("--device", help="See `expertslice devices`; repeatable.")] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", min=0, help="The trace's requests in other batches; repeatable.")
    ] = None,
    fit_routing: Annotated[str | None, typer.Option(help="Synthesise routing for --model like this trace.")] = None,
    segment: Segment = None,
    steps: Steps = None,
    out: Annotated[Path, typer.Option(help="Folder of the dataset; one that exists is gone on with.")] = Path(
        "runs/sweep"
    ),
    backend: Annotated[str, typer.Option(help="loky, sequential, dask or ray.")] = "loky",
    scheduler: Annotated[str | None, typer.Option(help="Address of a running Dask or Ray scheduler.")] = None,
    jobs: Annotated[int, typer.Option(help="Worker processes; -1: one per core.")] = -1,
    limit_s: LimitS = 300,
    memory_gib: MemoryGib = 2,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed points again.")] = False,
    as_json: AsJson = False,
) -> int:
    """Run policies x parameters x traces x models x devices x seeds; exits with 3 when some points failed."""
    from .sweep import EXIT_FAILED, Grid, print_outcome
    from .sweep import sweep as run_sweep

    outcome = run_sweep(Grid(**{name: value for name, value in context.params.items() if name != "as_json"}))
    if as_json:
        print_json(outcome)
    else:
        print_outcome(outcome)
    return EXIT_FAILED if outcome["failed"] else 0
