"""`devices`, `models` and `policies`: what can be named on the command line, each with its sources."""

from collections.abc import Sequence
from dataclasses import asdict

import typer

from .cli_options import AsJson


def print_json(value: object) -> None:
    from .runs import to_json

    typer.echo(to_json(value))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print a table to stdout, wide enough for its rows when nobody watches."""
    from rich.console import Console
    from rich.text import Text

    from .table import plain_table

    table = plain_table(title)
    for i, column in enumerate(columns):
        # The first one is a name to be typed again: in one piece.
        table.add_column(column, justify="right" if column in right else "left", overflow="fold", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    Console(highlight=False, width=max(console.width, 100)).print(table)


def devices(as_json: AsJson = False) -> None:
    """List the GPUs that can be simulated, with the source of every figure (--json)."""
    from ..policies.data import device_names, load_device

    found = [load_device(name) for name in device_names()]
    if as_json:
        figures = [{"sources": dict(d.sources), "rel_errors": dict(d.rel_errors)} for d in found]
        print_json([asdict(device) | of_figures for device, of_figures in zip(found, figures, strict=True)])
        return
    rows = [
        [d.name, d.title, d.status, str(d.sm_count), f"{max(d.read_curve_bytes_per_s) / 1e12:.2f}",
         f"{d.matrix_flops_per_s / 1e12:.0f}", f"{d.limit_w:.0f}"]
        for d in found
    ]  # fmt: skip
    columns = ("device", "title", "status", "SMs", "read TB/s", "bf16 TFLOP/s", "limit W")
    print_table("devices", columns, rows, right=columns[3:])


def models(as_json: AsJson = False) -> None:
    """List the model shapes known by name; any Hugging Face config.json works too."""
    from ..traces.models import load_model, model_names

    found = [load_model(name) for name in model_names()]
    if as_json:
        print_json([asdict(model) | {"expert_bytes": model.expert_bytes()} for model in found])
        return
    rows = [
        [m.name, m.kind, str(m.num_layers), str(m.num_experts), str(m.top_k), str(m.d_model),
         str(m.d_ff[0]) if len(m.d_ff) == 1 else f"{min(m.d_ff)}..{max(m.d_ff)}", f"{m.expert_bytes() / 2**20:.1f}"]
        for m in found
    ]  # fmt: skip
    columns = ("model", "expert", "MoE layers", "experts", "top-k", "d_model", "d_ff", "MiB/expert")
    print_table("models", columns, rows, right=columns[2:])


def policies(as_json: AsJson = False) -> None:
    """List the policies that `whatif --policy` takes, with their parameters."""
    from ..policies.registry import describe, policy_names

    found = [describe(name) for name in policy_names()]
    if as_json:
        print_json(found)
        return
    rows = [
        [d["name"], "bound, not deployable" if d["foresees"] else "", d["summary"],
         ", ".join(f"{p['name']}={p['default']}" for p in d["parameters"])]
        for d in found
    ]  # fmt: skip
    print_table("policies (set a parameter with --set policy.name=value)", ("policy", "", "what", "parameters"), rows)
