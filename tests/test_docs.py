"""The documentation: the tutorials' commands run, every page is in the site's contents, links lead somewhere."""

import glob
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def blocks():
    """Return the commands of each executed block of the tutorials."""
    text = (DOCS / "tutorials.md").read_text(encoding="utf-8")
    return [block.split("```")[1].strip().splitlines() for block in text.split("<!-- executed -->")[1:]]


def test_three_tutorials_have_commands():
    assert len(blocks()) == 3
    assert all(line.startswith("expertslice ") for block in blocks() for line in block)


@pytest.mark.parametrize("commands", blocks(), ids=lambda commands: commands[0].split()[1])
def test_commands_of_a_tutorial_run(commands, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    from expertslice.experiments import cli, pair, whatif

    # Fewer draws of the model's errors: what is tried here is that the commands work.
    monkeypatch.setattr(whatif, "NUM_DRAWS", 2)
    monkeypatch.setattr(whatif, "NUM_COMPOSITIONS", 1)
    monkeypatch.setattr(pair, "NUM_DRAWS", 2)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        arguments = [found for word in shlex.split(command)[1:] for found in (glob.glob(word) or [word])]
        assert cli.run(arguments) == 0, (command, capsys.readouterr().err)


def test_every_page_is_in_the_contents_of_the_site():
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert named == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_links_between_pages_lead_to_files():
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)
