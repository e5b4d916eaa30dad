"""The report's tables: what each cell shows and what it sorts by. No HTML here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..policies.contract import DeviceSpec
from .table import COLUMNS, cells, share_words

SHOWN_LAYOUT = 0.02
"""Share of the steps from which a layout is listed."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What a cell shows, and what it sorts by; an empty value sorts last."""

    text: str
    value: float | str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A column's head; `words` wrap and stand left."""

    name: str
    words: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A row of cells; a bound is set apart."""

    cells: Sequence[Cell]
    bound: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A sortable table."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]


def table(caption: str, names: Sequence[str], rows: Sequence[Sequence[Cell]], *, words: Sequence[str] = ()) -> Table:
    """Return a table of plain rows."""
    return Table(caption, [Column(name, name in words) for name in names], [Row(row) for row in rows])


def number(value: float | None, form: str, unit: str = "") -> Cell:
    """Return a cell that sorts by its number; a dash where nothing is known."""
    return Cell("–") if value is None else Cell(f"{value:{form}}{unit}".replace("-", "−"), value)


def tables(summary: dict[str, Any], device: DeviceSpec) -> dict[str, Table]:
    """Return every table of the report."""
    return {
        "ranking": _ranking(summary),
        "phases": _phases(summary),
        "pairs": _pairs(summary),
        "layers": _layers(summary),
        "cost": _cost(summary),
        "slices": _slices(summary),
        "draws": _draws(summary),
        "device": _device(device),
    }


def _ranking(summary: dict[str, Any]) -> Table:
    keys = ("step_p50_ns", "step_p95_ns", "step_p99_ns", "tokens_per_s", "energy_j_per_1k_tokens")
    rows: list[Row] = []
    for row in summary["ranking"]:
        texts = cells(row)
        busy = row["layouts"][0]["slices"][0]["busy_share"] if row["layouts"] else ""
        values = [row["policy"], *(_blank(row[key]) for key in keys), busy, row["reconfigurations"],
                  row["effect_percent"], row["rank"] or ""]  # fmt: skip
        rows.append(Row([Cell(t, v) for t, v in zip(texts, values, strict=True)], bound=not row["deployable"]))
    level = f"{share_words(summary['statistics']['level'])}"
    caption = (
        f"Simulated; in brackets the {level} interval of workload and model error together; ties cannot be told apart. "
        "Slices busy: share of the step, most used layout."
    )
    return Table(caption, [Column(name) for name in COLUMNS], rows)


def _blank(value: float | None) -> float | str:
    return "" if value is None else value


def _phases(summary: dict[str, Any]) -> Table:
    names = [row["policy"] for row in summary["ranking"] if row["policy"] != "unsliced"]
    rows: list[list[Cell]] = []
    for phase in summary["phases"]:
        of = {e["policy"]: e for e in phase["effects"]}
        effects = [
            Cell(f"{of[n]['effect_percent']:+.1f} % ± {of[n]['workload_half_percent']:.1f}".replace("-", "−"),
                 of[n]["effect_percent"]) for n in names
        ]  # fmt: skip
        rows.append(
            [
                Cell(phase["phase"], phase["phase"]),
                number(phase["steps"], "d"),
                number(100 * phase["time_share"], ".0f", " %"),
                *effects,
            ]
        )
    return table(
        "Effect against unsliced by phase; ± covers the workload alone.", ("phase", "steps", "time", *names), rows
    )


def _ends(ends: Sequence[float]) -> Cell:
    return Cell(f"{ends[0]:+.2f} … {ends[1]:+.2f}".replace("-", "−"), ends[0])


def _pairs(summary: dict[str, Any]) -> Table:
    rows = [
        [Cell(pair["a"], pair["a"]), Cell(pair["b"], pair["b"]), number(pair["difference_percent"], "+.2f", " points"),
         _ends(pair["interval_percent"]), Cell("yes" if pair["differ"] else "no", int(pair["differ"]))]
        for pair in summary["pairs"]
    ]  # fmt: skip
    caption = (
        "Difference of the two effects; intervals hold for all pairs at once (max-T), so a tie is a tie among all."
    )
    return table(caption, ("first", "second", "first − second", "interval", "can be told apart"), rows)


def _layers(summary: dict[str, Any]) -> Table:
    best = summary["why"]["best"]
    rows = [
        [number(t["layer"], "d"), Cell(t["bound"], t["bound"]), number(t["ns"] / 1e3, ".1f", " µs"),
         number(t["cold_experts"], ".1f"), number(t["cold_tokens"], ".1f"), number(t["hot_experts"], ".1f"),
         number(t["hot_tokens"], ".0f"), number(t["max_over_mean"], ".1f", " ×"),
         number(100 * t["waste_share"], ".0f", " %"),
         number(100 * t["launch_share"], ".0f", " %"), number(100 * t["floor_share"], ".0f", " %"),
         number(100 * t["overlap_share"], ".1f", " %"), number(t["gain_percent"], "+.1f", " %")]
        for t in summary["why"]["layers"]
    ]  # fmt: skip
    names = ("layer", "bound by", "time", "cold experts", "tokens each", "hot experts", "tokens each ",
             "max / mean load", "waves, padding", "launches", "of floor", "overlap could save",
             f"gain of {best}" if best else "gain")  # fmt: skip
    caption = "Unsliced, mean of the sampled steps; cold experts are bound by memory, hot ones by arithmetic."
    return table(caption, names, rows)


def _cost(summary: dict[str, Any]) -> Table:
    rows = [
        [Cell(row["policy"], row["policy"]), number(row["reconfigurations"], "d"),
         number(100 * row["reconfigure_share"], ".2f", " %"), number(row["captures"], "d"),
         number(100 * row["control_stall_share"], ".2f", " %"), number(row["energy_j_per_1k_tokens"], ".2f", " J"),
         number(row["hbm_bytes_per_step"] / 1e6, ",.0f", " MB"), number(100 * row["unsliced_share"], ".0f", " %"),
         number(row["fallback_steps"], "d")]
        for row in summary["ranking"]
    ]  # fmt: skip
    names = ("policy", "changes of layout", "time in changes", "late captures", "waiting for decisions",
             "energy per 1k tokens", "DRAM traffic a step", "steps run unsliced", "fallback steps")  # fmt: skip
    return table("Costs over the whole trace; shares are of the total time.", names, rows)


def _slices(summary: dict[str, Any]) -> Table:
    rows = [
        [Cell(row["policy"], row["policy"]), number(layout["steps"], "d"), number(index, "d"),
         Cell(one["slice"], one["slice"]), number(100 * one["busy_share"], ".1f", " %")]
        for row in summary["ranking"]
        for place, layout in enumerate(row["layouts"])
        if place == 0 or layout["steps"] >= SHOWN_LAYOUT * row["steps"]
        for index, one in enumerate(layout["slices"])
    ]  # fmt: skip
    caption = "Busy share of every slice in each policy's most used layouts: its kernels' time over the step's."
    return table(caption, ("policy", "steps", "slice", "what it is", "busy"), rows, words=("what it is",))


def _draws(summary: dict[str, Any]) -> Table:
    names = [row["policy"] for row in summary["ranking"] if row["policy"] != "unsliced"]
    rows = [[Cell("the trace", "the trace"), *(number(_effect(summary, n), "+.1f", " %") for n in names)]]
    parts = (
        ("other batches", summary["compositions"]),
        ("sampled steps", [summary["sampled"]]),
        ("sampled steps, model error", summary["draws"]),
    )
    for title, found in parts:
        for i, one in enumerate(found):
            label = f"{title} {i + 1}" if len(found) > 1 else title
            rows.append([Cell(label, label), *(number(one[n], "+.1f", " %") for n in names)])
    caption = (
        "Effect against unsliced, again: on re-batched requests, and on sampled steps with the model's figures as they "
        "are and drawn from their errors."
    )
    return table(caption, ("what changed", *names), rows)


def _effect(summary: dict[str, Any], name: str) -> float:
    return next(row["effect_percent"] for row in summary["ranking"] if row["policy"] == name)


def _device(device: DeviceSpec) -> Table:
    errors = dict(device.rel_errors)
    rows: list[list[Cell]] = []
    for name, source in sorted(device.sources):
        error = 100 * errors.get(name, 0.0)
        shown = Cell(f"{getattr(device, name)}".strip("()"), name)
        rows.append([Cell(name, name), shown, number(error, ".0f", " %"), Cell(source, source)])
    columns = ("figure", "value", "1 standard error", "source")
    return table(f"Figures of {device.name}.", columns, rows, words=("value", "source"))
