"""The page about the policies, and its figure: what committed runs of `judge` and `forecast` say.

Usage: python -P -m expertslice.experiments.policies_page docs > docs/policies.md
"""

import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.parquet as pq

from .forecast import METHODS
from .judge import lines
from .ranking import REFERENCE


def facts(folder: Path) -> dict[str, Any]:
    """Return what the page shows of a results folder: `judge-*` and `forecast-*`, each a run folder."""
    judged = {
        path.name.removeprefix("judge-"): [json.loads((path / f"{name}.json").read_text()) for name in _FILES]
        for path in sorted(folder.glob("judge-*"))
    }
    forecasts = [row for path in sorted(folder.glob("forecast-*")) for row in _forecast(path)]
    return {"judged": judged, "forecasts": forecasts, "lines": lines}


_FILES = ("manifest", "summary")


def _forecast(folder: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    keys = dict.fromkeys((row["trace"], row["batch_size"], row["horizon"]) for row in rows)
    found: list[dict[str, Any]] = []
    for trace, size, horizon in keys:
        at = [row for row in rows if (row["trace"], row["batch_size"], row["horizon"]) == (trace, size, horizon)]
        means = {m: float(np.mean([row["error"] for row in at if row["method"] == m])) for m in METHODS}
        found.append({"trace": trace, "batch_size": size, "horizon": horizon, **means})
    return found


def render(docs: Path) -> str:
    """Return the page in Markdown."""
    source = (files(__package__) / "templates" / "policies.md.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return page.from_string(source).render(facts(docs / "results" / "policies"))


def draw(docs: Path) -> None:
    """Draw every policy's effect on every workload, a panel each."""
    from .plotting import INK, PALETTE, axes, finish, styled

    judged = facts(docs / "results" / "policies")["judged"]
    with styled():
        figure, panels = axes(1.1 + 2.1 * -(-len(judged) // 2), ncols=2, nrows=-(-len(judged) // 2), squeeze=False)
        for ax in panels.ravel()[len(judged) :]:
            ax.set_visible(False)
        for ax, (name, (_, summary)) in zip(panels.ravel(), judged.items(), strict=False):
            rows = [row for row in summary["ranking"] if row["policy"] != REFERENCE]
            for y, row in enumerate(rows):
                ax.plot(row["interval_percent"], [y, y], color=PALETTE[0], lw=3, solid_capstyle="butt")
                ax.plot(row["effect_percent"], y, "o" if row["deployable"] else "D", color=INK, ms=4)
            ax.axvline(0, color=INK, lw=0.8)
            ax.set(title=name, yticks=range(len(rows)), yticklabels=[row["policy"] for row in rows])
            ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel="step time against unsliced, %")
            ax.grid(axis="x")
        words = "Left of the line is faster than unsliced, on requests never seen; a diamond is a bound."
        finish(figure, "policies", "Where policies win and lose (provisional device model)", words, docs / "figures")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
    sys.stdout.write(render(Path(sys.argv[1])))
