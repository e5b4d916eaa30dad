"""The report of a paired run: what the simulator said, what the backend gave, and one step in both worlds.

Shape letters: P policies.
"""

import shlex
from pathlib import Path
from typing import Any

from .. import __version__
from .figures import GREY, draw_slices, sliced_step, unit_of
from .pair import Found
from .plotting import INK, PALETTE, Sketch, axes, finish, styled
from .ranking import REFERENCE
from .records import read_records
from .report import PROVISIONAL, html
from .report_tables import Table, table
from .runs import file_name
from .table import signed

SIDES = (("backend", "backend", PALETTE[0]), ("closed", "simulator", PALETTE[3]), ("replayed", "replayed", PALETTE[1]))


def verdict_of(row: dict[str, Any]) -> str:
    """Return whether the simulator was right about one policy's difference to the reference."""
    low, high = row["closed_error_interval_points"]
    ends = row["backend_interval_percent"], row["closed_interval_percent"]
    sides = {-1 if high < 0 else 1 for low, high in ends if low > 0 or high < 0}
    if len(sides) > 1:
        return "does not hold: the simulator has the sign wrong"
    if low <= 0 <= high:
        return "holds: the error cannot be told from noise"
    overlap = ends[0][0] <= ends[1][1] and ends[1][0] <= ends[0][1]
    return "holds partly: off, but inside both intervals" if overlap else "does not hold: the intervals are apart"


def lines(summary: dict[str, Any]) -> list[str]:
    """Return the result in a few lines."""
    said = [
        f"{row['policy']:14} backend {_ends(row, 'backend')}   simulator {_ends(row, 'closed')}   "
        f"error {signed(row['closed_error_points'])} points: {verdict_of(row)}"
        for row in summary["rows"]
        if row["policy"] != REFERENCE
    ]
    ranking, noise = summary["ranking"]["closed"], summary["noise_percent"]
    tau = "not defined" if ranking["tau_b"] is None else f"{ranking['tau_b']:.2f}"
    said.append(
        f"ranking: tau-b {tau}, regret {ranking['regret_percent']:.1f} %; repeat noise "
        + ("unknown: one round" if noise is None else f"{noise:.2f} %")
    )
    if summary["slowed"]:
        said.append(f"clocks were held down during blocks: {', '.join(summary['slowed'])}; see blocks.parquet")
    return said


def _ends(row: dict[str, Any], side: str) -> str:
    if f"{side}_effect_percent" not in row:
        return "–"
    low, high = row[f"{side}_interval_percent"]
    return f"{signed(row[f'{side}_effect_percent'])} % ({signed(low)} … {signed(high)})"


def render_pair(summary: dict[str, Any], found: Found, folder: Path) -> str:
    """Return the page; figures are saved beside it."""
    with styled():
        sketches = filter(None, (_effects(summary), _timeline(found, folder)))
        figures = {sketch[1]: finish(*sketch, folder) for sketch in sketches}
    provisional = summary["device"]["status"] == "provisional"
    host = [summary["label"]] if summary["where"] == "host" else []
    return html(
        "pair.html.j2",
        title=f"Backend beside simulator: {summary['model']['name']} on {summary['device']['name']}",
        provisional=". ".join([*host, *([PROVISIONAL] if provisional else [])]),
        headline=[
            ("trace", f"{summary['trace']['name']}, {summary['steps']} steps"),
            ("backend", f"{summary['where']}: {summary['label']}"),
            ("rounds", "; ".join(filter(None, (f"{summary['rounds']} complete, in turn", summary["reason"])))),
        ],
        lines=lines(summary),
        claims=_claims(summary),
        residuals=_residuals(summary),
        figures=figures,
        notes=summary["notes"],
        command=shlex.join(["expertslice", "timeline", str(folder.with_suffix(""))]),
        footer=f"expertslice {__version__}, seed {summary['seed']}; manifest.json beside this page holds all else.",
    )  # fmt: skip


def _claims(summary: dict[str, Any]) -> Table:
    forms = dict.fromkeys(("policy", "backend", "simulator decides", "plans replayed"), "{}")
    forms |= {"error, points": "{:+.2f}", "error of replay, points": "{:+.2f}", "steps of other plans": "{}"}
    forms |= {"verdict": "{}"}
    rows = [
        [row["policy"], *(_ends(row, side) for side, _, _ in SIDES), row["closed_error_points"],
         row.get("replayed_error_points"), row["plans_differ_steps"], verdict_of(row)]
        for row in summary["rows"]
        if row["policy"] != REFERENCE
    ]  # fmt: skip
    caption = (
        "Mean step time against unsliced, negative is faster, with 95 % intervals: the simulator's holds its declared "
        "error, the backend's the workload and repeats. Replayed plans leave the cost model's error alone."
    )
    return table(caption, forms, rows, words=("verdict",))


def _residuals(summary: dict[str, Any]) -> Table:
    forms = {"policy": "{}", "layer": "{}", "backend over replay, %": "{:+.2f}"}
    rows = [[row["policy"], row["layer"], row["residual_percent"]] for row in summary["residuals"]]
    return table("How much longer each layer took on the backend than its plans do in the simulator.", forms, rows)


def _effects(summary: dict[str, Any]) -> Sketch:
    rows = [row for row in summary["rows"] if row["policy"] != REFERENCE]
    figure, ax = axes(1.1 + 0.5 * len(rows))
    for y, row in enumerate(rows):
        for lift, (side, _, colour) in zip((-0.2, 0, 0.2), SIDES, strict=True):
            if f"{side}_effect_percent" in row:
                ax.plot(row[f"{side}_interval_percent"], [y + lift] * 2, color=colour, lw=2.5, solid_capstyle="butt")
                ax.plot([row[f"{side}_effect_percent"]], [y + lift], "o", color=INK, ms=3.5, zorder=3)
    for _, label, colour in SIDES:
        ax.plot([], [], color=colour, lw=2.5, label=label)
    ax.axvline(0, color=GREY, lw=0.8)
    ax.set(yticks=range(len(rows)), yticklabels=[row["policy"] for row in rows], ylim=(len(rows) - 0.5, -0.5))
    ax.set_xlabel("mean step time against unsliced, % (left is faster)")
    ax.grid(axis="x")
    ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    caption = "Bars of one policy that overlap are differences on which both worlds agree within their intervals."
    return figure, "effects", "Differences in both worlds", caption


def _timeline(found: Found, folder: Path) -> Sketch | None:
    """Draw one step of the first policy that slices, in both worlds; None where none slices."""
    outcomes = {name: ran.outcome for name, ran in found.rounds[0].items()}
    chosen = sliced_step(list(outcomes), outcomes)
    if chosen is None:
        return None
    name, step = chosen
    simulated = "replayed" if found.replayed else "simulator"
    files = (("backend", f"backend-{file_name(name)}-0"), (simulated, f"{simulated}-{file_name(name)}"))
    shown = [(world, next(read_records(folder / f"{file}.parquet", step, step))) for world, file in files]
    heights = [record.busy_ns_LS.shape[1] + 0.6 for _, record in shown]
    figure, panels = axes(1.0 + 0.34 * sum(heights), nrows=2, sharex=True, gridspec_kw={"height_ratios": heights})
    scale, unit = unit_of(max(record.end_ns - record.start_ns for _, record in shown))
    for ax, (world, record) in zip(panels, shown, strict=True):
        draw_slices(ax, record, scale)
        ax.set_title(f"{world}: whole step {(record.end_ns - record.start_ns) / scale:,.1f} {unit}")
    panels[1].set_xlabel(f"time since the step started, {unit}")
    caption = f"Step {step} of {name}: bars that begin and end alike are layers whose time the simulator knows."
    return figure, "timeline", "One step in both worlds", caption
