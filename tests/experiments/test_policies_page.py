"""The page about the policies is what its committed runs say."""

from pathlib import Path

from expertslice.experiments.policies_page import render

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_generated_from_its_results():
    assert (DOCS / "policies.md").read_text(encoding="utf-8") == render(DOCS)
