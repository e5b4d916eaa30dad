"""The ranking on a terminal: one table, the reasons below it, where the report lies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "policy",
    "p50 step",
    "p95",
    "p99",
    "tokens/s",
    "J/1k tok",
    "slices busy",
    "changes",
    "vs unsliced",
    "rank",
)


def time_words(ns: float) -> str:
    """Return a duration in the unit that fits it."""
    return f"{ns / 1e3:,.0f} µs" if ns < 1e7 else f"{ns / 1e6:,.1f} ms"


def rate_words(per_s: float) -> str:
    """Return a rate in thousands where that is shorter."""
    return f"{per_s / 1e3:,.1f} k" if per_s >= 1e4 else f"{per_s:,.0f}"


def effect_words(row: Mapping[str, Any]) -> str:
    """Return the effect with its interval; the reference has none."""
    if row["policy"] == "unsliced":
        return "–"
    return f"{row['effect_percent']:+.1f} % ± {row['effect_half_percent']:.1f}".replace("-", "−")


def rank_words(row: Mapping[str, Any]) -> str:
    """Return the place, ties and bounds named."""
    if not row["deployable"]:
        return "bound, not deployable"
    return f"{row['rank']} (tie)" if row["tied"] else str(row["rank"])


def busy_words(row: Mapping[str, Any]) -> str:
    """Return how busy each slice of the layout most used was."""
    slices = row["layouts"][0]["slices"] if row["layouts"] else []
    shares = [f"{100 * one['busy_share']:.0f}" for one in slices[:4]]
    return "/".join(shares) + (" … %" if len(slices) > 4 else " %") if shares else "–"


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return one policy's row."""
    energy = row["energy_j_per_1k_tokens"]
    return [
        row["policy"],
        time_words(row["step_p50_ns"]),
        time_words(row["step_p95_ns"]),
        time_words(row["step_p99_ns"]),
        rate_words(row["tokens_per_s"]),
        "–" if energy is None else f"{energy:.2f}",
        busy_words(row),
        str(row["reconfigurations"]),
        effect_words(row),
        rank_words(row),
    ]


def headline(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what is compared on what, in a few lines."""
    work, trace, model, device = (summary[key] for key in ("workload", "trace", "model", "device"))
    phases = ", ".join(f"{n} {phase}" for phase, n in work["steps_of_phase"].items() if n)
    mean_tokens = work["num_tokens"] / work["num_steps"]
    status = "PROVISIONAL: not calibrated on hardware" if summary["provisional"] else "calibrated"
    return [
        ("trace", f"{trace['name']}, {work['num_steps']} steps ({phases}), {mean_tokens:.0f} tokens a step"),
        (
            "model",
            f"{model['name']}, {model['num_layers']} MoE layers × {model['num_experts']} experts, top-{model['top_k']}",
        ),
        ("device", f"{device['name']}, simulated, {status}"),
        *(("note", note) for note in summary["notes"]),
    ]


def print_summary(summary: Mapping[str, Any], folder: Path, *, report: bool) -> None:
    """Print the outcome to stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console = Console(highlight=False, width=max(console.width, 110))
    title = "slicing policies" + (" (provisional device model)" if summary["provisional"] else "")
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for row in summary["ranking"]:
        table.add_row(*map(Text, cells(row)), style="dim" if not row["deployable"] else "")
    _print_pairs(console, headline(summary))
    console.print()
    console.print(table)
    console.print()
    statistics = summary["statistics"]
    console.print(
        Text(f"± covers the workload and the model's error together ({statistics['level']:.0%})", style="dim")
    )
    _print_pairs(console, [("why" if i == 0 else "", s) for i, s in enumerate(summary["why"]["sentences"])])
    _print_pairs(console, [("report", str(folder / "report.html"))] if report else [("records", str(folder))])


def _print_pairs(console: Any, pairs: Sequence[tuple[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", width=7)
    grid.add_column(overflow="fold")
    for name, text in pairs:
        grid.add_row(name, Text(text))
    console.print(grid)
