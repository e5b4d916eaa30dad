"""`mig`: what a GPU offers, the steps to other instances, and, where that is allowed explicitly, the steps taken."""

import re
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_lists import print_table

if TYPE_CHECKING:
    from ..policies.contract import MigPlacement


def mig(
    places: Annotated[
        list[str] | None, typer.Argument(help="Instances to let stand, such as 3g.40gb@0 3g.40gb@4; 'off': none.")
    ] = None,
    *,
    gpu: Annotated[int, typer.Option(min=0, help="The GPU's number, as nvidia-smi counts.")] = 0,
    change: Annotated[bool, typer.Option("--change", help="Take the steps; without it they are only printed.")] = False,
) -> None:
    """Show a GPU's MIG instances, and print or take the steps to others. It has not run on MIG hardware."""
    from ..runtime.mig import MigError
    from ..runtime.mig_change import MigChange

    wanted = _places(places or ())
    try:
        with MigChange(gpu) as device:
            if places is None:
                state = device.state()
                mode = "on" if state.enabled else "off"
                typer.echo(f"GPU {gpu}: MIG {mode}{', a change waits for a reset' * (state.enabled != state.pending)}")
                rows = [
                    [o.name, str(o.sm_count), f"{o.memory_mib} MiB", f"{o.memory_slices}", " ".join(map(str, o.starts))]
                    for o in state.offers
                ]
                print_table("instances that it offers", ("profile", "SMs", "memory", "memory slices", "places"), rows)
                for place in state.instances:
                    typer.echo(f"stands: {place.profile}@{place.start}")
                return
            for step in device.steps(wanted):
                typer.echo(step.words)
            if change:
                device.change(wanted, allowed=True)
                typer.echo("done")
    except MigError as error:
        raise ValueError(str(error)) from error


def _places(given: "list[str] | tuple[str, ...]") -> "list[MigPlacement]":
    from ..policies.contract import MigPlacement

    if list(given) == ["off"]:
        return []
    found: list[MigPlacement] = []
    for text in given:
        match = re.fullmatch(r"(\w+\.\w+)@(\d+)", text)
        if match is None:
            raise ValueError(f"instance {text!r} is not profile@place; write for example 3g.40gb@0, or off")
        found.append(MigPlacement(profile=match[1], start=int(match[2])))
    return found
