"""`bench`: the command line of `bench.py`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .cli_gpu import require_gpu
from .cli_options import Commit


def bench(
    models: Annotated[
        list[str] | None, typer.Argument(help="Names from `expertslice models`, or paths of a config.json.")
    ] = None,
    *,
    tokens: Annotated[str, typer.Option(help="Of a step; comma-separated.")] = "1,32,256,2048",
    skew: Annotated[str, typer.Option(help="Of the routing: uniform, zipf or both.")] = "uniform,zipf",
    kind: Annotated[
        Literal["relu3", "swiglu", "gelu2"] | None, typer.Option(help="Experts of this kind instead of the model's.")
    ] = None,
    arms: Annotated[
        str | None, typer.Option(help="Such as ours,torch_grouped_graph,vllm; default: all, peers on record too.")
    ] = None,
    regime: Annotated[Literal["burst", "sustained", "both"], typer.Option(help="See runtime/timer.py.")] = "burst",
    energy: Annotated[bool, typer.Option(help="Energy per token too: some 4 s for each arm.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Of A B .. B A; intervals take 6 or more.")] = 12,
    seconds: Annotated[float, typer.Option(min=1, help="After which no point begins.")] = 400.0,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/bench"),
    resume: Annotated[Path | None, typer.Option(help="rows.jsonl of an earlier run: its points are kept.")] = None,
    device: Annotated[str | None, typer.Option(help="Whose floors apply; default: this GPU's.")] = None,
    commit: Commit = None,
    plot: Annotated[Path | None, typer.Option(help="Only draw the figures of a folder; needs no GPU.")] = None,
) -> None:
    """Time our layer beside PyTorch, Hugging Face and peers on record: cold weights, outputs checked, in turn."""
    if plot:
        from .bench_plots import draw

        for path in draw(plot):
            typer.echo(str(path))
        return
    if not models:
        raise ValueError("bench needs a model; name one from `expertslice models`, or give --plot FOLDER")
    numbers = comma_separated(tokens)
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"--tokens is {tokens!r}; give numbers from 1, such as 32,256")
    require_gpu("bench")
    from .bench import bench as run_bench
    from .bench import course_of, points_of

    regimes: dict[str, Any] = {"both": ("burst", "sustained")}
    points = points_of(models, [int(number) for number in numbers], comma_separated(skew), kind)
    course = course_of(
        comma_separated(arms or ""), regimes.get(regime, (regime,)), rounds=rounds, energy=energy, device=device
    )
    run_bench(points, course, out, seconds=seconds, resume=resume, commit=commit, say=typer.echo)


def comma_separated(text: str) -> tuple[str, ...]:
    """Return the words of a list, each once."""
    return tuple(dict.fromkeys(word for word in text.split(",") if word))
