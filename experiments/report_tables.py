"""The report's tables: what each cell shows and what it sorts by. No HTML here."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ..policies.contract import DeviceSpec
from .table import COLUMNS, cells, share_words

SHOWN_LAYOUT = 0.02
"""Share of the steps from which a layout is listed."""


class Cell(NamedTuple):
    """What a cell shows, and what it sorts by; an empty value sorts last."""

    text: str
    value: float | str = ""


class Table(NamedTuple):
    """A sortable table; columns of `words` wrap and stand left, rows whose number is in `bounds` are set apart."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: Collection[str] = ()
    bounds: Collection[int] = ()


def table(caption: str, forms: Mapping[str, str], rows: Sequence[Sequence[Any]], words: Collection[str] = ()) -> Table:
    """Return a table of values, each shown in the format of its column; None is a dash."""
    return Table(caption, list(forms), [[*map(_cell, row, forms.values())] for row in rows], words)


def _cell(value: Any, form: str) -> Cell:
    if isinstance(value, Cell):
        return value
    if value is None:
        return Cell("–")
    text = form.format(value)
    return Cell(text if isinstance(value, str) else text.replace("-", "−"), value)


def tables(summary: dict[str, Any], device: DeviceSpec) -> dict[str, Table]:
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
    rows: list[list[Cell]] = []
    for row in summary["ranking"]:
        busy = row["layouts"][0]["slices"][0]["busy_share"] if row["layouts"] else None
        values = [row["policy"], *(row[key] for key in keys), busy, row["reconfigurations"], row["effect_percent"],
                  row["rank"]]  # fmt: skip
        rows.append([Cell(text, "" if v is None else v) for text, v in zip(cells(row), values, strict=True)])
    caption = (
        f"Simulated; in brackets the {share_words(summary['statistics']['level'])} interval of workload and model "
        "error together; ties cannot be told apart. Slices busy: share of the step, most used layout."
    )
    bounds = [place for place, row in enumerate(summary["ranking"]) if not row["deployable"]]
    return Table(caption, COLUMNS, rows, bounds=bounds)


def _others(summary: dict[str, Any]) -> list[str]:
    return [row["policy"] for row in summary["ranking"] if row["policy"] != "unsliced"]


def _phases(summary: dict[str, Any]) -> Table:
    rows: list[list[Any]] = []
    for phase in summary["phases"]:
        of = {e["policy"]: (e["effect_percent"], e["workload_half_percent"]) for e in phase["effects"]}
        effects = [_cell(of[n][0], f"{{:+.1f}} % ± {of[n][1]:.1f}") for n in _others(summary)]
        rows.append([phase["phase"], phase["steps"], 100 * phase["time_share"], *effects])
    forms = {"phase": "{}", "steps": "{:d}", "time": "{:.0f} %"} | dict.fromkeys(_others(summary), "{}")
    return table("Effect against unsliced by phase; ± covers the workload alone.", forms, rows)


def _pairs(summary: dict[str, Any]) -> Table:
    rows = []
    for pair in summary["pairs"]:
        low, high = pair["interval_percent"]
        told = Cell("yes" if pair["differ"] else "no", int(pair["differ"]))
        between = _cell(low, f"{{:+.2f}} … {high:+.2f}")
        rows.append([pair["a"], pair["b"], pair["difference_percent"], between, told])
    forms = {"first": "{}", "second": "{}", "first − second": "{:+.2f} points", "interval": "{}",
             "can be told apart": "{}"}  # fmt: skip
    caption = (
        "Difference of the two effects; intervals hold for all pairs at once (max-T), so a tie is a tie among all."
    )
    return table(caption, forms, rows)


def _layers(summary: dict[str, Any]) -> Table:
    best = summary["why"]["best"]
    rows = [
        [t["layer"], t["bound"], t["ns"] / 1e3, t["cold_experts"], t["cold_tokens"], t["hot_experts"], t["hot_tokens"],
         t["max_over_mean"], 100 * t["waste_share"], 100 * t["launch_share"], 100 * t["floor_share"],
         100 * t["overlap_share"], t["gain_percent"]]
        for t in summary["why"]["layers"]
    ]  # fmt: skip
    forms = {"layer": "{:d}", "bound by": "{}", "time": "{:.1f} µs", "cold experts": "{:.1f}", "tokens each": "{:.1f}",
             "hot experts": "{:.1f}", "tokens each ": "{:.0f}", "max / mean load": "{:.1f} ×",
             "waves, padding": "{:.0f} %", "launches": "{:.0f} %", "of floor": "{:.0f} %",
             "overlap could save": "{:.1f} %", f"gain of {best}" if best else "gain": "{:+.1f} %"}  # fmt: skip
    caption = "Unsliced, mean of the sampled steps; cold experts are bound by memory, hot ones by arithmetic."
    return table(caption, forms, rows)


def _cost(summary: dict[str, Any]) -> Table:
    rows = [
        [row["policy"], row["reconfigurations"], 100 * row["reconfigure_share"], row["captures"],
         100 * row["control_stall_share"], row["energy_j_per_1k_tokens"], row["hbm_bytes_per_step"] / 1e6,
         100 * row["unsliced_share"], row["fallback_steps"]]
        for row in summary["ranking"]
    ]  # fmt: skip
    forms = {"policy": "{}", "changes of layout": "{:d}", "time in changes": "{:.2f} %", "late captures": "{:d}",
             "waiting for decisions": "{:.2f} %", "energy per 1k tokens": "{:.2f} J",
             "DRAM traffic a step": "{:,.0f} MB", "steps run unsliced": "{:.0f} %",
             "fallback steps": "{:d}"}  # fmt: skip
    return table("Costs over the whole trace; shares are of the total time.", forms, rows)


def _slices(summary: dict[str, Any]) -> Table:
    rows = [
        [row["policy"], layout["steps"], index, one["slice"], 100 * one["busy_share"]]
        for row in summary["ranking"]
        for place, layout in enumerate(row["layouts"])
        if place == 0 or layout["steps"] >= SHOWN_LAYOUT * row["steps"]
        for index, one in enumerate(layout["slices"])
    ]
    forms = {"policy": "{}", "steps": "{:d}", "slice": "{:d}", "what it is": "{}", "busy": "{:.1f} %"}
    caption = "Busy share of every slice in each policy's most used layouts: its kernels' time over the step's."
    return table(caption, forms, rows, words=("what it is",))


def _draws(summary: dict[str, Any]) -> Table:
    names = _others(summary)
    whole = {row["policy"]: row["effect_percent"] for row in summary["ranking"]}
    parts = (
        ("the trace", [whole]),
        ("other batches", summary["compositions"]),
        ("sampled steps", [summary["sampled"]]),
        ("sampled steps, model error", summary["draws"]),
    )
    rows = [
        [f"{title} {i}" if len(found) > 1 else title, *(one[n] for n in names)]
        for title, found in parts
        for i, one in enumerate(found, 1)
    ]
    caption = (
        "Effect against unsliced, again: on re-batched requests, and on sampled steps with the model's figures as they "
        "are and drawn from their errors."
    )
    return table(caption, {"what changed": "{}"} | dict.fromkeys(names, "{:+.1f} %"), rows)


def _device(device: DeviceSpec) -> Table:
    errors = dict(device.rel_errors)
    rows = [
        [name, Cell(f"{getattr(device, name)}".strip("()"), name), 100 * errors.get(name, 0.0), source]
        for name, source in sorted(device.sources)
    ]
    forms = {"figure": "{}", "value": "{}", "1 standard error": "{:.0f} %", "source": "{}"}
    return table(f"Figures of {device.name}.", forms, rows, words=("value", "source"))
