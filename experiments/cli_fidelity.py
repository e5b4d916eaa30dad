"""The commands about fidelity: `profile`, `calibrate`, `fidelity`."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_lists import print_json
from .cli_options import AsJson, Commit


def profile(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the rows; given again, it goes on.")] = Path("runs/profile"),
    seconds: Annotated[float, typer.Option(min=1, help="After which no group begins.")] = 560.0,
    rounds: Annotated[int, typer.Option(min=2, help="Of A B .. B A.")] = 3,
    only: Annotated[str | None, typer.Option(help="Groups whose name holds this, such as costs.")] = None,
    commit: Commit = None,
) -> None:
    """Measure this GPU for `calibrate`: layers under slices, bandwidth, neighbours, fixed costs, power."""
    from .cli_gpu import require_gpu
    from .profile import run_profile

    require_gpu("profile")
    run_profile(out, seconds=seconds, rounds=rounds, only=only, commit=commit, say=typer.echo)


def calibrate(
    folder: Annotated[Path, typer.Argument(metavar="PROFILE", help="Folder of `expertslice profile`.")],
    *,
    out: Annotated[Path, typer.Option(help="File of the device model.")] = Path("runs/device-model.json"),
    seed: Annotated[int, typer.Option(min=0, help="Of which half gives the truth, which the belief.")] = 0,
) -> None:
    """Fit the simulator's truth and a policy's belief to a profile, and say how far off the truth is."""
    from .calibrate import from_profile
    from .device_model import save

    model = from_profile(folder, seed=seed, say=typer.echo)
    save(out, model)
    held = model.held_out
    typer.echo(
        f"{out}: held-out error {held['mape']:.1%} (median {held['median']:.1%}, p95 {held['p95']:.1%}, bias "
        f"{held['bias']:+.1%}) on {held['points']:.0f} points; 90 % bars cover {held['coverage']:.1%}"
    )


def fidelity(
    *,
    out: Annotated[Path | None, typer.Option(help="Folder for rows, summary and figures.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how far the simulator is from committed hardware records of shapes that it was not fitted to."""
    from .fidelity import judge_committed, lines

    rows, summary = judge_committed((lambda _: None) if as_json else typer.echo)
    if out is not None:
        from .fidelity_plots import draw, write

        write(out, rows, summary)
        for path in draw(out, rows["profile"]):
            typer.echo(str(path), err=as_json)
    if as_json:
        print_json(summary)
        return
    for line in lines(summary):
        typer.echo(line)
