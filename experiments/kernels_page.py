"""The page about the kernels: what committed GPU runs say of their bits, errors and times.

Usage: python -P -m expertslice.experiments.kernels_page docs/results/kernels > docs/kernels.md
"""

import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.parquet as pq

FILES = ("errors", "matrix_library", "sequential", "sanitizers", "routing.manifest")


def facts(folder: Path) -> dict[str, Any]:
    """Return what the page shows of a results folder."""
    found = {name.replace(".", "_"): json.loads((folder / f"{name}.json").read_text()) for name in FILES}
    routing = pq.read_table(folder / "routing.parquet").to_pylist()
    route_us: dict[str, dict[int, float]] = {}
    for row in routing:
        name = f"{row['model']} ({row['experts']}, {row['top_k']})"
        route_us.setdefault(name, {})[row["tokens"]] = row["route_us_q50"]
    out_of_order: dict[tuple[int, int], list[int]] = {}
    for one in found["matrix_library"]["bf16"]:
        out_of_order.setdefault((one["k"], one["n"]), []).append(one["rows"])
    return {**found, "route_us": route_us, "out_of_order": out_of_order}


def page_of(template: str, shown: dict[str, Any]) -> str:
    """Return a page in Markdown."""
    source = (files(__package__) / "templates" / template).read_text(encoding="utf-8")
    page = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return page.from_string(source).render(shown)


if __name__ == "__main__":
    sys.stdout.write(page_of("kernels.md.j2", facts(Path(sys.argv[1]))))
