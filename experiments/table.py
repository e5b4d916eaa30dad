"""Tables and figures in words: the ranking with its reasons as a terminal shows them, and a trace's statistics."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..traces.statistics import TraceStatistics

COLUMNS = ("policy", "p50 step", "p95", "p99", "tokens/s", "J/1k tok", "slices busy", "changes", "vs unsliced", "rank")
MISSED_LEAST = ("changes", "slices busy", "p95", "J/1k tok", "tokens/s")
BOUND = "bound, not deployable"
WIDE = 126
"""Columns where nobody watches."""


def time_words(ns: float) -> str:
    return f"{ns / 1e3:,.0f} µs" if ns < 1e7 else f"{ns / 1e6:,.1f} ms"


def rate_words(per_s: float) -> str:
    if per_s >= 1e6:
        return f"{per_s / 1e6:,.2f} M"
    return f"{per_s / 1e3:,.1f} k" if per_s >= 1e4 else f"{per_s:,.0f}"


def share_words(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def effect_words(row: Mapping[str, Any]) -> str:
    """Return the effect with its interval; the reference has none."""
    if row["policy"] == "unsliced":
        return "–"
    low, high = row["effect_interval_percent"]
    return f"{signed(row['effect_percent'])} % ({signed(low)} … {signed(high)})"


def signed(value: float) -> str:
    """Return a number with its sign, a true minus; what rounds to zero has a plus."""
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")


def rank_words(row: Mapping[str, Any]) -> str:
    """Return the place, ties and bounds named."""
    if not row["deployable"]:
        return BOUND
    return f"{row['rank']} (tie)" if row["tied"] else str(row["rank"])


def busy_words(row: Mapping[str, Any]) -> str:
    """Return how busy each slice of the layout most used was."""
    slices = row["layouts"][0]["slices"] if row["layouts"] else []
    shares = [f"{100 * one['busy_share']:.0f}" for one in slices[:4]]
    return "/".join(shares) + (" … %" if len(slices) > 4 else " %") if shares else "–"


def cells(row: Mapping[str, Any]) -> list[str]:
    energy = row["energy_j_per_1k_tokens"]
    times = [time_words(row[f"step_{quantile}_ns"]) for quantile in ("p50", "p95", "p99")]
    return [
        row["policy"], *times, rate_words(row["tokens_per_s"]), "–" if energy is None else f"{energy:.2f}",
        busy_words(row), str(row["reconfigurations"]), effect_words(row), rank_words(row),
    ]  # fmt: skip


def shape_words(shape: Mapping[str, Any]) -> str:
    return f"{shape['num_layers']} MoE layers × {shape['num_experts']} experts, top-{shape['top_k']}"


def headline(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    work, trace, model, device = (summary[key] for key in ("workload", "trace", "model", "device"))
    phases = ", ".join(f"{n} {phase}" for phase, n in work["steps_of_phase"].items() if n)
    mean_tokens = work["num_tokens"] / work["num_steps"]
    status = "PROVISIONAL: not calibrated on hardware" if summary["provisional"] else "calibrated"
    return [
        ("trace", f"{trace['name']}, {work['num_steps']} steps ({phases}), {mean_tokens:.0f} tokens a step"),
        ("model", f"{model['name']}, {shape_words(model)}"),
        ("device", f"{device['name']}, simulated, {status}"),
        *(("note", note) for note in summary["notes"]),
    ]


def print_summary(summary: Mapping[str, Any], folder: Path, *, report: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDE)
    _print_pairs(console, headline(summary))
    console.print()
    console.print(_ranking(summary, console.width))
    console.print()
    level = share_words(summary["statistics"]["level"])
    console.print(Text(f"in brackets: {level} interval of the workload and the model's error together", style="dim"))
    _print_pairs(console, [("why" if i == 0 else "", s) for i, s in enumerate(summary["why"]["sentences"])])
    _print_pairs(console, [("report", str(folder / "report.html"))] if report else [("records", str(folder))])


def plain_table(title: str) -> Any:
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))


def _ranking(summary: Mapping[str, Any], width: int) -> Any:
    """Return the ranking; on a narrow terminal without the columns that can best be missed."""
    from rich.text import Text

    rows = [(row["deployable"], cells(row)) for row in summary["ranking"]]
    shown = columns_that_fit([texts for _, texts in rows], width)
    table = plain_table("slicing policies" + (" (provisional device model)" if summary["provisional"] else ""))
    for index in shown:
        table.add_column(COLUMNS[index], justify="left" if index == 0 else "right", no_wrap=True)
    for deployable, texts in rows:
        if not deployable:
            table.add_row(Text(f"{BOUND}:", style="dim"))
        said = texts if deployable else [f"  {texts[0]}", *texts[1:-1], "–"]
        table.add_row(*(Text(said[index]) for index in shown), style="" if deployable else "dim")
    return table


def columns_that_fit(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return which columns to show: those least missed go first, the answer itself never."""
    widths = [max(len(name), *(len(texts[i]) for texts in rows)) + 2 for i, name in enumerate(COLUMNS)]
    widths[0] = max(widths[0], len(BOUND) + 3)
    widths[-1] = len("1 (tie)")
    shown = list(range(len(COLUMNS)))
    for name in MISSED_LEAST:
        if sum(widths[i] for i in shown) > width:
            shown.remove(COLUMNS.index(name))
    return shown


def _print_pairs(console: Any, pairs: Sequence[tuple[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", width=7)
    grid.add_column(overflow="fold")
    for name, text in pairs:
        grid.add_row(name, Text(text))
    console.print(grid)


def statistics_rows(stats: TraceStatistics) -> list[list[str]]:
    """Return name, median, least and most of what is known of a trace; what a source does not hold has no row."""
    rows = [
        ("Gini coefficient of the load", stats.gini_L, ".2f"),
        ("fullest expert / mean", stats.max_mean_L, ".1f"),
        ("Zipf exponent", stats.zipf_s_L, ".2f"),
        ("overlap of independent tokens", stats.overlap_independent_L, ".2f"),
        *_columns("overlap, {} token(s) apart", stats.lags_G, stats.overlap_LG, ".2f"),
        ("overlap of two tokens of a request", stats.overlap_request_L, ".2f"),
        ("divergence of a request's load, bit", stats.jsd_bits_L, ".3f"),
        ("bits shared with the layer below", stats.mutual_information_bits_L, ".2f"),
        ("recall from the layer below", stats.recall_set_L, ".2f"),
        ("recall from popularity", stats.recall_popularity_L, ".2f"),
        *_columns("experts used by a batch of {}", stats.batch_sizes_Z, stats.distinct_LZ, ".1f"),
        *_columns("fullest / mean in a batch of {}", stats.batch_sizes_Z, stats.step_max_mean_LZ, ".1f"),
    ]
    return [
        [name, *(format(over(values_L), form) for over in (np.nanmedian, np.nanmin, np.nanmax))]
        for name, values_L, form in rows
        if values_L is not None and not np.isnan(values_L).all()
    ]


def _columns(name: str, labels: tuple[int, ...], values_LX: np.ndarray | None, form: str) -> list[tuple]:
    """Return one row for each column that a source may hold."""
    if values_LX is None:
        return []
    return [(name.format(label), values_L, form) for label, values_L in zip(labels, values_LX.T, strict=True)]
