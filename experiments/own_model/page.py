"""The page about the bundled trace: how it was made, and its statistics beside those of other traces.

Usage: python -m expertslice.experiments.own_model.page TRACE [NAME=OTHER.parquet ...] > docs/bundled-trace.md
"""

import json
import sys
from importlib.resources import files
from pathlib import Path

import jinja2

from ...traces.statistics import summarise
from ...traces.store import StoredTrace, open_trace
from ..table import statistics_rows


def column_of(source: StoredTrace) -> dict[str, str]:
    """Return each statistic as 'median [least–most]' over layers."""
    rows = statistics_rows(summarise(source.read()))
    return {name: f"{median} [{least}–{most}]" for name, median, least, most in rows}


def main(trace: Path, others: list[str]) -> None:
    stored = open_trace(trace)
    columns = {f"ours, {segment}": column_of(stored.select(segment=segment)) for segment in stored.segments}
    columns |= {name: column_of(open_trace(path)) for name, path in (other.split("=", 1) for other in others)}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    facts = json.loads(trace.with_suffix(".training.json").read_text())
    source = (files(__package__).parent / "templates" / "bundled_trace.md.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    shown = {"trace": stored, "megabytes": trace.stat().st_size / 1e6, "columns": columns, "names": names}
    sys.stdout.write(page.from_string(source).render(facts, **shown))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
