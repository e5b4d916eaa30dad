"""The commands about a GPU."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from .cli_lists import print_json
from .cli_options import DEVICE, RUNS, AsJson, Device, DeviceModel, Model, Out, Segment, Settings, Steps, Trace, given


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
    trace: Trace = None,
    *,
    policies: Annotated[
        list[str] | None, typer.Option("--policy", help="May be repeated; unsliced always runs first.")
    ] = None,
    where: Annotated[Literal["host", "gpu"], typer.Option("--on", help="host: no GPU timing.")] = "host",
    capture: Annotated[
        Literal["all", "paper"], typer.Option(help="Graphs of every layout from the start, or after ten calls.")
    ] = "all",
    device: Device = DEVICE,
    device_model: DeviceModel = None,
    model: Model = None,
    segment: Segment = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and inputs.")] = 0,
    settings: Settings = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say what experts and slices did, and keep it beside the records.")
    ] = False,
    out: Out = RUNS,
    as_json: AsJson = False,
) -> None:
    """Run policies on a trace's steps, on this GPU or reckoned on this host, and keep a record of every step."""
    arguments = locals()
    from .run import RunOptions, run_trace

    summary, folder = run_trace(RunOptions(**given(arguments)), say=(lambda _: None) if as_json else typer.echo)
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
