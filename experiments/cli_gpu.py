"""The commands about a GPU."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from .cli_lists import AsJson, print_json


def tune(
    models: Annotated[list[str], typer.Argument(help="Names from `expertslice models`, or paths of a config.json.")],
    *,
    kind: Annotated[
        Literal["relu3", "swiglu", "gelu2"] | None, typer.Option(help="Experts of this kind instead of the model's.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="For each model, compiling included.")] = 60.0,
    folder: Annotated[Path | None, typer.Option(help="Of tuned files; default: the package's own.")] = None,
) -> None:
    """Find the fastest tiles of a model's layer on this GPU for every range of tokens; stopped, it goes on later."""
    from ..kernels.tuned import FOLDER
    from ..traces.models import load_model
    from .tune_shape import tune_shape

    require_gpu("tune")
    for model in models:
        spec = load_model(model)
        spec = replace(spec, num_layers=1, dtype="bf16", kind=kind or spec.kind)
        path = tune_shape(spec, seconds=seconds, folder=folder or FOLDER, say=typer.echo)
        typer.echo(f"{model}: {path}")


def doctor(*, as_json: AsJson = False) -> None:
    """Say what this machine can do for slicing, and what to do about what it cannot."""
    from ..runtime.doctor import examine

    found = examine()
    if as_json:
        print_json([asdict(one) for one in found])
        return
    width = max(len(one.subject) for one in found)
    for one in found:
        typer.echo(f"{one.subject:{width}}  {one.found}")
        if one.advice:
            typer.echo(f"{'':{width}}  -> {one.advice}")


def run_trace(
    trace: Annotated[str | None, typer.Argument(help="A routing trace; left out: the bundled one.")] = None,
    *,
    policies: Annotated[
        list[str] | None, typer.Option("--policy", help="May be repeated; unsliced always runs first.")
    ] = None,
    on: Annotated[Literal["host", "gpu"], typer.Option(help="host: no GPU timing.")] = "host",
    capture: Annotated[
        Literal["all", "paper"], typer.Option(help="Graphs of every layout from the start, or after ten calls.")
    ] = "all",
    device: Annotated[str, typer.Option(help="See `expertslice devices`; on a GPU: the one that is there.")] = (
        "h100-sxm5-80gb"
    ),
    device_model: Annotated[Path | None, typer.Option(help="A file of `expertslice calibrate`.")] = None,
    model: Annotated[str | None, typer.Option(help="A name from `expertslice models`, or a config.json.")] = None,
    segment: Annotated[str | None, typer.Option(help="Part of the trace; 'all' takes every step.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Take only the first steps.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and inputs.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="POLICY.NAME=VALUE", help="Set a policy's parameter.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say what experts and slices did, and keep it beside the records.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder in which the run's folder is made.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Run policies on a trace's steps, on this GPU or reckoned on this host, and keep a record of every step."""
    from .run import RunOptions, run_trace

    options = RunOptions(
        trace=trace,
        policies=policies or ("unsliced",),
        settings=settings or (),
        model=model,
        device=device,
        device_model=device_model,
        where=on,
        capture=capture,
        segment=segment,
        steps=steps,
        seed=seed,
        profile=profile,
        out=out,
    )
    summary, folder = run_trace(options, say=(lambda _: None) if as_json else typer.echo)
    if as_json:
        print_json({**summary, "folder": str(folder)})
    else:
        typer.echo(f"{summary['label']}\nrecords: {folder}")


def require_gpu(command: str) -> None:
    """Raise ValueError where torch is missing or sees no CUDA device."""
    try:
        import torch
    except ImportError:
        raise ValueError(f"{command} needs torch; install expertslice[gpu]") from None
    if not torch.cuda.is_available():
        raise ValueError(f"{command} needs a CUDA device and torch sees none; run it on a machine with one")
