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
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "legend.labelcolor"), INK),
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    **dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 8.5),
    "font.family": "DejaVu Sans", "font.size": 9, "axes.labelsize": 9, "axes.titlesize": 10,
    "axes.titlelocation": "left", "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.7,
    "svg.fonttype": "none", "svg.hashsalt": "expertslice",
}  # fmt: skip


Sketch = tuple[Any, str, str, str]
"""A figure before it is finished: matplotlib's figure, its name, its title and its caption."""


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


def axes(height_in: float, **options: Any) -> tuple[Any, Any]:
    return plt.subplots(figsize=(WIDTH_IN, height_in), layout="constrained", **options)


def finish(figure: Any, name: str, title: str, caption: str, folder: Path) -> Drawn:
    """Save the figure as SVG and PNG, and return it as SVG for the page."""
    # Laying out is the slow part; once is enough.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    on_white = re.sub(r"(<svg\b[^>]*>)", r'\1<rect width="100%" height="100%" fill="#ffffff"/>', svg, count=1)
    (folder / f"{name}.svg").write_text(on_white, encoding="utf-8")
    figure.savefig(folder / f"{name}.png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    return Drawn(name=name, title=title, caption=caption, svg=inline_svg(svg, name, title, caption))


def inline_svg(svg: str, name: str, title: str, caption: str) -> str:
    """Return SVG fit to stand in HTML: no prologue, ids of its own, the page's colours, and a description."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", body)
    body = body.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    words = f"<title>{escape(title)}</title><desc>{escape(caption)}</desc>"
    head, rest = body.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label={quoteattr(title + ". " + caption)}>{words}{rest}'
