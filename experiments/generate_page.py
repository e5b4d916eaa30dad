"""The page about generation: what committed GPU runs of `bench_generate` say of experts implementations and recording.

Usage: python -P -m expertslice.experiments.generate_page docs/results/generate > docs/generate.md
"""

import json
import sys
from pathlib import Path
from typing import Any

from .kernels_page import page_of

NEW_TOKENS = 8
"""Of each generation whose energy was measured."""


def facts(folder: Path) -> dict[str, Any]:
    """Return what the page shows of a results folder."""
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("rows", "recording", "manifest")}
    return {
        "about": found["manifest"],
        "rows": [row | {"mj": mj_a_token(row)} for row in found["rows"]],
        "recording": found["recording"],
    }


def mj_a_token(row: dict[str, Any]) -> float | None:
    """Return the energy of a new token, idle power included; None: it was not measured."""
    found = row.get("energy_of_8_tokens")
    if not isinstance(found, dict):
        return None
    return found["energy_uj"] / found["steps"] / NEW_TOKENS / row["batch"] / 1000


if __name__ == "__main__":
    sys.stdout.write(page_of("generate.md.j2", facts(Path(sys.argv[1]))))
