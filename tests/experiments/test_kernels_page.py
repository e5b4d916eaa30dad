"""The page about the kernels is what its committed files say."""

from pathlib import Path

from expertslice.experiments.kernels_page import render

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_generated_from_its_results():
    assert (DOCS / "kernels.md").read_text(encoding="utf-8") == render(DOCS / "results" / "kernels")
