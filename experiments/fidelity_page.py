"""The page about fidelity: what the committed summary says of the simulator's errors.

Usage: python -P -m expertslice.experiments.fidelity_page docs/results/fidelity > docs/fidelity.md
"""

import json
import sys
from pathlib import Path
from typing import Any

from .device_model import load
from .kernels_page import page_of


def facts(folder: Path) -> dict[str, Any]:
    """Return what the page shows of a results folder."""
    model = load(folder / "profile/model.json")
    manifest = json.loads((folder / "profile/manifest.json").read_text(encoding="utf-8"))
    return {
        **json.loads((folder / "summary.json").read_text(encoding="utf-8")),
        "about": manifest["runs"][-1],
        "points": model.about["points"],
        "constants": model.truth.constants,
    }


if __name__ == "__main__":
    sys.stdout.write(page_of("fidelity.md.j2", facts(Path(sys.argv[1]))))
