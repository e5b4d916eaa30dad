"""Figures of a what-if run: the ranking, where time goes, the load, step times, one step as a timeline.

Shape letters: P policies, L MoE layers, E experts, S slices.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..policies.contract import StepRecord
from .plotting import GRID, INK, PALETTE, Drawn, Sketch, axes, finish, styled
from .ranking import REFERENCE, Outcomes
from .records import read_records
from .table import effect_words, rank_words, share_words, signed

TERMS = (
    ("cold_share", "cold experts: memory", PALETTE[0]),
    ("hot_share", "hot experts: arithmetic", PALETTE[3]),
    ("waste_share", "waves and padding", PALETTE[1]),
    ("launch_share", "routing, launches, combining", PALETTE[7]),
    ("other_share", "attention and other dense work", PALETTE[2]),
)
GREY = "#7a7f87"
ECDF_POINTS = 400
SHOWN_LAYERS = 10
"""Layers of a timeline: more of them leave no room for their numbers."""


def unit_of(ns: float) -> tuple[float, str]:
    """Return the unit, in ns, and its name, that suits a duration."""
    return (1e6, "ms") if ns >= 1e7 else (1e3, "µs")


def draw_all(
    summary: dict[str, Any],
    main: Outcomes,
    mean_LE: NDArray[np.float64],
    records: Mapping[str, Path],
    folder: Path,
) -> list[Drawn]:
    """Draw every figure of a run and save it in the run's folder."""
    names = [row["policy"] for row in summary["ranking"]]
    with styled():
        made = [
            _ranking(summary),
            _layers(summary["why"]),
            _load(mean_LE),
            _timeline(names, main, records),
            _times(names, main),
        ]
        drawn = []
        for figure, name, title, caption in filter(None, made):
            # The load is the trace's, whatever models the device.
            tag = " (provisional device model)" if summary["provisional"] and name != "load" else ""
            drawn.append(finish(figure, name, title + tag, caption, folder))
    return drawn


def _ranking(summary: dict[str, Any]) -> Sketch:
    """Draw each policy's effect with its two intervals apart."""
    rows = summary["ranking"]
    figure, ax = axes(0.9 + 0.42 * len(rows))
    for y, row in enumerate(rows):
        if row["policy"] != REFERENCE:
            for kind, lift, colour in (("workload", -0.12, PALETTE[0]), ("model", 0.12, PALETTE[1])):
                ends = row[f"{kind}_interval_percent"]
                ax.plot(ends, [y + lift] * 2, color=colour, lw=3, solid_capstyle="butt")
            others = [effects[row["policy"]] for effects in summary["compositions"]]
            ax.plot(others, [y - 0.3] * len(others), "|", color=PALETTE[0], ms=5)
        ax.plot([row["effect_percent"]], [y], "o" if row["deployable"] else "D", color=INK, ms=4.5, zorder=3)
        text = f"{effect_words(row)}   {'rank ' if row['deployable'] else ''}{rank_words(row)}"
        ax.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    ax.axvline(0, color=INK, lw=0.8)
    ax.set(yticks=range(len(rows)), yticklabels=[row["policy"] for row in rows], ylim=(len(rows) - 0.5, -0.6))
    ax.set_xlabel("mean step time against unsliced, % (left is faster)")
    ax.grid(axis="x")
    ax.plot([], [], color=PALETTE[0], lw=3, label="workload, 95 %")
    ax.plot([], [], color=PALETTE[1], lw=3, label="model error, 95 %")
    ax.plot([], [], "|", color=PALETTE[0], label="other batches")
    ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handlelength=1.6)
    caption = (
        "Policies whose bars lie left of the line are faster than the unsliced launch; where a bar reaches over the "
        "line, the workload or the device model's error could reverse the verdict."
    )
    return figure, "ranking", "Who wins, and how sure", caption


def _layers(why: dict[str, Any]) -> Sketch:
    """Draw where each layer's time goes under an unsliced launch."""
    terms, best = why["layers"], why["best"]
    scale, unit = unit_of(10 * max(t["ns"] for t in terms))
    figure, ax = axes(1.0 + (0.24 if len(terms) <= 16 else 0.15) * len(terms))
    y, left = np.arange(len(terms)), np.zeros(len(terms))
    for name, label, colour in TERMS:
        width = np.array([t[name] * t["ns"] / scale for t in terms])
        if width.any():
            ax.barh(y, width, left=left, color=colour, height=0.72, lw=0, label=label)
            left += width
    for t, total in zip(terms, left, strict=True):
        said = f"{signed(t['gain_percent'])} %" if best else ""
        ax.annotate(said, (total, t["layer"]), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5)
    ax.set(yticks=y[:: 1 + len(terms) // 20], ylim=(len(terms) - 0.4, -0.6), xlim=(0, left.max() * 1.12))
    ax.set(xlabel=f"time of the layer, unsliced, {unit}", ylabel="MoE layer")
    ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    caption = (
        "Slices can overlap memory-bound with arithmetic-bound experts of a layer, and fill waves better; no slice "
        "shortens the rest" + (f". Behind each bar: how much faster {best} is there." if best else ".")
    )
    return figure, "layers", "Where the time goes", caption


def _load(mean_LE: NDArray[np.float64]) -> Sketch:
    """Draw the load of every expert of every layer, against an even load."""
    even_LE = mean_LE / np.maximum(mean_LE.mean(axis=1, keepdims=True), 1e-12)
    num_layers, num_experts = even_LE.shape
    figure, ax = axes(min(6.0, 1.1 + 0.2 * num_layers))
    image = ax.imshow(even_LE, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    ax.set(xticks=range(0, num_experts, max(1, num_experts // 16)), xlabel="expert", ylabel="MoE layer")
    ax.set_yticks(range(0, num_layers, max(1, num_layers // 12)))
    bar = figure.colorbar(image, ax=ax, pad=0.02)
    bar.set_label("tokens, × even share")
    bar.outline.set_edgecolor(INK)
    layer, expert = np.unravel_index(even_LE.argmax(), even_LE.shape)
    caption = (
        f"Bright cells are hot experts: expert {expert} of layer {layer} gets {even_LE.max():.1f} times an "
        f"even share; {share_words(np.mean(even_LE < 0.5))} of the experts get less than half of one."
    )
    return figure, "load", "Load of every expert", caption


def _times(names: Sequence[str], main: Outcomes) -> Sketch:
    """Draw the distribution of step times of every policy."""
    figure, ax = axes(2.9)
    share = np.linspace(0, 1, ECDF_POINTS)
    top = max(float(np.quantile(o.times(), 0.985)) for o in main.values())
    scale, unit = unit_of(top)
    for i, name in enumerate(sorted(names, key=lambda name: name != REFERENCE)):
        colour = PALETTE[(i - 1) % len(PALETTE)] if name != REFERENCE else GREY
        # Curves may lie on each other: dashes of different lengths let both be seen.
        dashes = ("-", "--", "-.", ":")[i % 4]
        quantiles = np.quantile(main[name].times(), share) / scale
        ax.plot(quantiles, 100 * share, dashes, color=colour, label=name, lw=1.5)
    ax.set(xlabel=f"step time, {unit}", ylabel="steps at most that long, %", ylim=(0, 100))
    ax.set_xlim(None, top / scale * 1.02)
    ax.grid()
    ax.legend(loc="lower right")
    caption = (
        "A curve further left is faster at that quantile; curves that cross trade a better median for a worse tail."
    )
    return figure, "times", "Step times, each policy", caption


def _timeline(names: Sequence[str], main: Outcomes, records: Mapping[str, Path]) -> Sketch | None:
    """Draw one step of the best policy that slices, beside the same step unsliced; None when none slices."""
    found = sliced_step(names, main)
    if found is None:
        return None
    name, step = found
    ours, theirs = (next(read_records(records[one], step, step)) for one in (name, REFERENCE))
    pair = ((REFERENCE, theirs), (name, ours))
    heights = [record.busy_ns_LS.shape[1] + 0.6 for _, record in pair]
    ratios = {"height_ratios": heights}
    figure, panels = axes(1.0 + 0.34 * sum(heights), nrows=2, sharex=True, gridspec_kw=ratios)
    our_ns, their_ns = (record.end_ns - record.start_ns for record in (ours, theirs))
    scale, unit = unit_of(max(our_ns, their_ns))
    for ax, (policy, record) in zip(panels, pair, strict=True):
        draw_slices(ax, record, scale)
        ax.set_title(f"{policy}: whole step {(record.end_ns - record.start_ns) / scale:,.1f} {unit}")
    few = theirs.busy_ns_LS.shape[0] > SHOWN_LAYERS
    panels[1].set_xlabel(f"time since the step started, {unit}" + (f", first {SHOWN_LAYERS} layers" if few else ""))
    gain = 1 - our_ns / their_ns
    when = f"{share_words(abs(gain), 1)} {'earlier' if gain > 0 else 'later'}"
    caption = (
        f"Step {ours.step}, typical of {name}: each bar is a slice busy in one layer, numbered; the step ends {when} "
        "than unsliced, and gaps between bars are idle SMs."
    )
    return figure, "timeline", "One step, unsliced and sliced", caption


def draw_slices(ax: Any, record: StepRecord, scale: float) -> None:
    starts_LS, busy_LS = (record.start_ns_LS - record.start_ns) / scale, record.busy_ns_LS / scale
    num_layers, num_slices = min(len(busy_LS), SHOWN_LAYERS), busy_LS.shape[1]
    end = (starts_LS + busy_LS)[:num_layers].max()
    for s in range(num_slices):
        for layer in range(num_layers):
            begin, length = starts_LS[layer, s], busy_LS[layer, s]
            if length <= 0:
                continue
            ax.barh(s, length, left=begin, height=0.8, color=PALETTE[0] if layer % 2 == 0 else PALETTE[9], lw=0)
            if length > 0.012 * end:
                ax.text(begin + length / 2, s, str(layer), ha="center", va="center", fontsize=7, color="#101418")
    if num_layers == len(busy_LS):
        ax.axvline((record.end_ns - record.start_ns) / scale, color=INK, lw=0.8, ls=":")
    ax.set(yticks=range(num_slices), yticklabels=[f"slice {s}" for s in range(num_slices)])
    ax.set_ylim(num_slices - 0.5, -0.5)
    ax.grid(axis="x", color=GRID)


def sliced_step(names: Sequence[str], main: Outcomes) -> tuple[str, int] | None:
    """Return the first policy that slices, and the one of its sliced steps whose gain is the median of all."""
    for name in names:
        sliced_N = np.flatnonzero(main[name].sliced())
        if name != REFERENCE and len(sliced_N):
            ratio_N = main[name].times()[sliced_N] / main[REFERENCE].times()[sliced_N]
            return name, int(sliced_N[np.argsort(ratio_N, kind="stable")[len(sliced_N) // 2]])
    return None
