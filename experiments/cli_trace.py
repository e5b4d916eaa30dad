"""`trace list | info | import | compose | synth | recover`: look at, read, batch, make up routing."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_lists import print_json, print_table
from .cli_options import AsJson

if TYPE_CHECKING:
    from ..traces.schema import StepSource
    from ..traces.statistics import TraceStatistics

app = typer.Typer(help="Look at routing traces, import, batch and synthesise them.", no_args_is_help=True)

Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same trace.")]
Segment = Annotated[str | None, typer.Option(help="Part of the trace; 'all' takes every step.")]
Out = Annotated[Path, typer.Option(help="The trace to write (Parquet).")]
STATISTICS_TOKENS = 150_000
"""Statistics of more tokens than this take long and hardly move."""


@app.command()
def info(
    trace: Annotated[str, typer.Argument(help="A trace file, or 'bundled'.")],
    *,
    segment: Segment = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for figures (SVG and PNG).")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show what a trace holds: its shape, how skewed, how local and how dependent its routing is."""
    from .inputs import choose_segment, open_source
    from .table import shape_words, statistics_rows
    from .workload import survey

    opened = choose_segment(open_source(trace), segment)
    look = survey(opened.source, num_windows=1, window_steps=1)
    stats, notes = _statistics(opened.source, seed)
    drawn: list[str] = []
    if figures is not None:
        from .figures_trace import draw_trace

        drawn = [str(figures / f"{one.name}.svg") for one in draw_trace(stats, look.mean_LE, figures)]
    phases = {phase: n for phase, n in look.steps_of_phase.items() if n}
    facts = opened.plain() | {"num_tokens": look.num_tokens, "steps_of_phase": phases, "figures": drawn}
    facts["notes"] += notes
    if as_json:
        print_json({"trace": facts, "statistics": asdict(stats)})
        return
    words = ", ".join(f"{n} {phase}" for phase, n in phases.items())
    shown = {
        "trace": facts["name"],
        "shape": shape_words(facts),
        "steps": f"{facts['num_steps']} ({words}), {facts['num_tokens']} tokens",
        "segments": ", ".join(getattr(opened.source, "segments", ())),
        "domains": ", ".join(getattr(opened.source, "domains", ())),
        **{name: facts[name] for name in ("model", "device", "source", "sha256")},
    }
    for name, value in [*shown.items(), *(("note", note) for note in facts["notes"])]:
        if value:
            typer.echo(f"{name:9s} {value}")
    columns = ("median", "least", "most")
    print_table("statistics, over layers", ("", *columns), statistics_rows(stats), right=columns)
    for path in drawn:
        typer.echo(path)


def _statistics(source: "StepSource", seed: int) -> "tuple[TraceStatistics, list[str]]":
    from rich.console import Console

    from ..traces.statistics import summarise
    from .inputs import in_memory

    tokens = in_memory(source, STATISTICS_TOKENS)
    with Console(stderr=True).status("computing statistics"):
        stats = summarise(tokens or source, seed=seed)
    total = getattr(source, "num_tokens", stats.num_tokens)
    partly = stats.num_tokens < total
    return stats, [f"statistics are of the first {stats.num_tokens} of {total} tokens"] if partly else []


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the traces that ship with the package; each can be named wherever a trace file can."""
    from .inputs import library

    found = library()
    if as_json:
        print_json(found)
        return
    columns = ("trace", "model", "shape", "steps", "tokens", "device", "MB")
    rows = [[str(one[column]) for column in columns] for one in found]
    print_table("traces", columns, rows, right=("steps", "tokens", "MB"))


@app.command()
def recover(
    trace: Annotated[Path, typer.Argument(help="The path that a recording was to be written to.")],
) -> None:
    """Make a trace of what a recording that was killed had flushed."""
    from ..traces.append import recover as recovered
    from ..traces.store import open_trace

    recovered(trace)
    _report_written(trace, open_trace(trace), ("partial: the recording broke off",), as_json=False)


@app.command("import")
def import_(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="A file of routing records of another tool.")],
    *,
    out: Out,
    form: Annotated[str | None, typer.Option("--format", help="Left out: detected.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="For formats that do not say.")] = None,
    num_experts: Annotated[int | None, typer.Option(min=1, help="Likewise.")] = None,
    num_layers: Annotated[int | None, typer.Option(min=1, help="Likewise.")] = None,
    prompt_len: Annotated[int | None, typer.Option(min=0, help="Likewise: tokens of each prompt.")] = None,
    member: Annotated[str | None, typer.Option(help="Which of several recordings in the file.")] = None,
    score: Annotated[str | None, typer.Option(help="How router logits are scored: softmax or sigmoid.")] = None,
    num_groups: Annotated[int | None, typer.Option(min=1, help="Of router logits: expert groups.")] = None,
    top_groups: Annotated[int | None, typer.Option(min=1, help="Groups that a token may choose from.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name, for the trace's provenance.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read routing records of another tool and write them as a trace."""
    from ..traces.importers import FORMATS, import_trace
    from ..traces.schema import nearest
    from ..traces.store import write_trace

    if form is not None and form not in FORMATS:
        raise ValueError(nearest("format", form, FORMATS))
    own = ("source", "out", "form", "as_json")
    options = {name: value for name, value in context.params.items() if name not in own and value is not None}
    result = import_trace(source, format=form, **options)
    write_trace(result.trace, out)
    _report_written(out, result.trace, [f"format {result.format}", *result.notes], as_json=as_json)


@app.command()
def compose(
    trace: Annotated[str, typer.Argument(help="A trace of requests, or 'bundled'.")],
    *,
    out: Out,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 64,
    steps: Annotated[int | None, typer.Option(min=1, help="Left out: until every request has run once.")] = None,
    prefill_chunk: Annotated[int | None, typer.Option(min=1, help="Most tokens of one prompt in a step.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens in a step.")] = None,
    arrivals_per_step: Annotated[float | None, typer.Option(help="Poisson arrivals; left out: all wait.")] = None,
    segment: Segment = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Run a trace's requests in other continuous batches, as a server would."""
    from ..traces.compose import Composition, Poisson
    from ..traces.compose import compose as composed
    from ..traces.store import write_trace
    from .inputs import choose_segment, in_memory, open_source

    opened = choose_segment(open_source(trace), segment)
    requests = in_memory(opened.source, sys.maxsize)
    if requests is None:
        raise ValueError(f"{opened.name} holds counts alone, no requests to batch; give a trace of tokens")
    composition = Composition(
        batch_size=batch_size,
        arrival="closed" if arrivals_per_step is None else Poisson(per_step=arrivals_per_step),
        prefill_chunk_tokens=prefill_chunk,
        max_tokens_per_step=max_tokens,
        num_steps=steps,
        seed=seed,
    )
    result = composed(requests, composition)
    write_trace(result, out)
    _report_written(out, result, opened.notes, as_json=as_json)


@app.command()
def synth(
    *,
    out: Out,
    fit: Annotated[str | None, typer.Option(help="Fit the generator to this trace, or to 'bundled'.")] = None,
    segment: Segment = None,
    model: Annotated[str | None, typer.Option(help="Take layers, experts and top-k from this model.")] = None,
    zipf: Annotated[float, typer.Option(help="Skew of the load, without --fit.")] = 0.5,
    requests: Annotated[int, typer.Option(min=1, help="Requests to draw.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="Per request, without --fit.")] = 64,
    decode_tokens: Annotated[int, typer.Option(min=0, help="Per request, without --fit.")] = 64,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Draw synthetic routing, from a few numbers or like a real trace; `compose` makes batches of it."""
    from dataclasses import replace

    from ..traces.models import load_model
    from ..traces.spec import zipf_spec
    from ..traces.store import write_trace
    from ..traces.synth import synthesise

    shape = load_model(model) if model else None
    if fit is not None:
        from .fitted import fit_like, resized
        from .inputs import choose_segment, open_source

        spec = fit_like(choose_segment(open_source(fit), segment))
        spec = resized(spec, shape) if shape else spec
    elif shape is None:
        raise ValueError("nothing says what to synthesise; give --fit TRACE, --model NAME, or both")
    else:
        spec = zipf_spec(shape.num_layers, shape.num_experts, shape.top_k, zipf_s=zipf, prompt_tokens=prompt_tokens,
                         decode_tokens=decode_tokens, seed=seed)  # fmt: skip
    result = synthesise(spec, requests, seed)
    if shape:
        result = replace(result, provenance=replace(result.provenance, model=shape.name))
    write_trace(result, out)
    _report_written(out, result, (), as_json=as_json)


def _report_written(out: Path, trace: Any, notes: Sequence[str], *, as_json: bool) -> None:
    shape = {
        name: getattr(trace, name, None) for name in ("num_steps", "num_tokens", "num_layers", "num_experts", "top_k")
    }
    if as_json:
        print_json({"path": str(out), **shape, "notes": notes})
        return
    typer.echo(
        f"wrote {out}: {trace.num_steps} steps, {trace.num_layers} layers × {trace.num_experts} experts, "
        f"top-{trace.top_k}"
    )
    for note in notes:
        typer.echo(f"note: {note}")
