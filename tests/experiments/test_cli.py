"""The command line: what it explains, lists and refuses, and with which exit code."""

import errno
import json
import time

import numpy as np
import pytest

from expertslice.experiments import cli, cli_lists
from expertslice.experiments.errors import sentence_of


def test_without_arguments_it_explains_itself(expertslice):
    code, out, _ = expertslice()
    assert code == 0
    assert "expertslice whatif" in out
    assert len(out.splitlines()) <= 10


def test_help_starts_fast_and_loads_nothing_heavy(start):
    begin = time.perf_counter()
    process = start("--help")
    out, _ = process.communicate(timeout=30)
    took = time.perf_counter() - begin
    assert process.returncode == 0
    assert "whatif" in out
    # A loaded machine is slower than the 0.6 s that a free one needs; what is loaded decides, and is checked below.
    assert took < 5


def test_importing_the_command_line_loads_nothing_heavy(start):
    import subprocess
    import sys

    code = "import sys, expertslice.experiments.cli; print([m for m in sys.modules if '.' not in m])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("numpy", "pandas", "seaborn", "matplotlib", "scipy", "pyarrow", "simpy", "joblib", "torch"):
        assert f"'{name}'" not in loaded


@pytest.mark.parametrize("command", ["devices", "models", "policies"])
def test_lists_are_json_lists(expertslice, command):
    code, out, _ = expertslice(command, "--json")
    rows = json.loads(out)
    assert code == 0
    assert isinstance(rows, list)
    assert all(row["name"] for row in rows)
    code, table, _ = expertslice(command)
    assert code == 0
    assert all(row["name"] in table for row in rows)


def test_every_figure_of_a_device_has_its_source(expertslice):
    rows = json.loads(expertslice("devices", "--json")[1])
    h100 = next(row for row in rows if row["name"] == "h100-sxm5-80gb")
    assert h100["sources"]["sm_count"]
    assert h100["status"] in ("provisional", "calibrated")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["device"], "devices"),
        (["devices", "--jsn"], "--json"),
        (["whatif", "bundled", "--device", "h100-sxm5"], "did you mean 'h100-sxm5-80gb'"),
        (["whatif", "bundled", "--policy", "hotcold"], "did you mean 'hot_cold'"),
        (["whatif", "bundled", "--mechanism", "green-context"], "did you mean 'green_context'"),
        (["whatif", "bundled", "--segment", "finale"], "did you mean 'final'"),
        (["whatif", "bundled", "--set", "hot_cold.min_gian=1"], "min_gain"),
        (["whatif", "bundled", "--set", "nonsense"], "policy.name=value"),
        (["whatif", "bundled", "--set", "hotcold.min_gain=1"], "did you mean 'hot_cold'"),
        (["whatif", "bundled", "--model", "mixtral-8x7"], "did you mean 'mixtral-8x7b'"),
        (["whatif", "bundled", "--model", "mixtral-8x7b"], "--fit-routing"),
        (["whatif", "bundled", "--fit-routing", "bundled"], "give --model and no trace"),
        (["whatif", "no-such.parquet"], "no-such.parquet does not exist"),
        (["whatif", "--steps", "0"], "--steps"),
        (["trace", "info", "no-such.parquet"], "does not exist"),
        (["trace", "synth", "--out", "out.parquet"], "--fit"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(expertslice, arguments, expected):
    code, out, err = expertslice(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("expertslice: ")
    assert len(err.strip().splitlines()) == 1
    assert expected in err


def test_our_own_bugs_keep_their_traceback(expertslice, monkeypatch):
    def broken(value):
        return np.zeros(2) + np.zeros(3)

    monkeypatch.setattr(cli_lists, "print_json", broken)
    with pytest.raises(ValueError, match="broadcast"):
        expertslice("devices", "--json")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "the disk is full at x"),
        (errno.EACCES, "may not be read or written"),
        (errno.EROFS, "read-only"),
        (errno.ENOENT, "does not exist"),
        (errno.EIO, "try again"),
    ],
)
def test_what_the_system_refuses_is_said_in_words(number, expected):
    assert expected in str(sentence_of(OSError(number, "words of the system", "x")))


def test_ctrl_c_is_130(expertslice, monkeypatch):
    def interrupted(value):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_lists, "print_json", interrupted)
    code, _, err = expertslice("devices", "--json")
    assert code == 130
    assert err == f"expertslice: {cli.NOTHING_KEPT}\n"


def test_version(expertslice):
    assert expertslice("--version")[1].startswith("expertslice ")
