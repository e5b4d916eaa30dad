"""The tutorial does what it says: its files are written and its commands run, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOC = Path(__file__).resolve().parent.parent / "docs" / "write-your-own-policy.md"
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial_runs_from_top_to_bottom(tmp_path):
    root = DOC.parent.parent
    bin_folder = Path(sys.executable).parent
    paths = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": f"{root / '.links'}", "PYTHONSAFEPATH": ""}
    shell = ["set -e"]
    for language, name, text in BLOCK.findall(DOC.read_text(encoding="utf-8")):
        if name:
            shell.append(f"cat > {name} <<'END_OF_FILE'\n{text}END_OF_FILE")
        elif language == "sh":
            shell += [f"({line})" if line.startswith("cd ") else line for line in text.splitlines()]
    command = ["bash", "-c", "\n".join(shell)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert re.search(r"\d+ passed", said)
    assert re.search(r"calm +Hot beside cold", said)
    assert "-> " in said
    assert "requests never seen" in said
    assert "6 points: 6 run" in said
    assert "4 trials" in said
