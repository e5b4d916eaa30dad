"""How every figure looks and is saved: colours that the colour-blind tell apart, SVG that follows the page's theme."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import seaborn as sns

INK, GRID = "#1f2329", "#d5d9df"
"""Stand for the page's own colours: in SVG they become currentColor and the grid's."""
PALETTE = sns.color_palette("colorblind", 10).as_hex()
WIDTH_IN = 7.6
PNG_DPI = 130
STYLE: dict[str, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "expertslice",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A finished figure with its words."""

    name: str
    title: str
    caption: str
    """One sentence that says what to see."""
    svg: str


@contextmanager
def styled() -> Iterator[None]:
    """Draw in our style, whatever the caller's settings are."""
    with sns.axes_style("ticks", rc=STYLE), plt.rc_context(STYLE):
        yield


def axes(height_in: float, *, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """Return a figure at the report's width and its axes."""
    return plt.subplots(rows, columns, figsize=(WIDTH_IN, height_in), layout="constrained", **options)


def colours(names: list[str]) -> dict[str, str]:
    """Return a colour for each policy; the reference is grey."""
    others = [name for name in names if name != "unsliced"]
    return {"unsliced": "#7a7f87"} | {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(others)}


def finish(figure: Any, *, name: str, title: str, caption: str, folder: Path | None) -> Drawn:
    """Return the figure as SVG, and save it as SVG and PNG when there is a folder."""
    # Laying out is the slow part; once is enough.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    if folder is not None:
        (folder / f"{name}.svg").write_text(_on_white(buffer.getvalue()), encoding="utf-8")
        figure.savefig(folder / f"{name}.png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    return Drawn(name=name, title=title, caption=caption, svg=inline_svg(buffer.getvalue(), name, title, caption))


def _on_white(svg: str) -> str:
    return re.sub(r"(<svg\b[^>]*>)", r'\1<rect width="100%" height="100%" fill="#ffffff"/>', svg, count=1)


def inline_svg(svg: str, name: str, title: str, caption: str) -> str:
    """Return SVG fit to stand in HTML: no prologue, ids of its own, the page's colours, and a description."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = body.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    words = f"<title>{escape(title)}</title><desc>{escape(caption)}</desc>"
    head, rest = body.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label={quoteattr(title + ". " + caption)}>{words}{rest}'
