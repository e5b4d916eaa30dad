"""`expertslice run` on a host without a GPU: records of every step, and what goes wrong."""

import itertools
import json
import os
import signal
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from expertslice.experiments import run as experiments_run
from expertslice.experiments.cli import run
from expertslice.experiments.records import read_records
from expertslice.experiments.runs import provenance
from expertslice.policies.layouts import fallback_plan


@pytest.fixture
def go(trace_path, config_path, tmp_path, capsys):
    """Run policies over the small trace; return the exit code, what was printed, and the run's folder."""

    def ran(*arguments):
        given = ["run", str(trace_path), "--model", str(config_path), "--out", str(tmp_path), *arguments]
        code = run(given)
        said = capsys.readouterr()
        folders = sorted(tmp_path.glob("*-run*"))
        return code, said.out + said.err, folders[-1] if folders else None

    return ran


@dataclass(frozen=True)
class Odd:
    """A policy that goes wrong at its fifth decision."""

    foresees: ClassVar[bool] = False
    reads_clock: ClassVar[bool] = False
    error: ClassVar[BaseException] = ValueError("odd")

    def init(self, setup):
        return 0, fallback_plan(setup)

    def layouts(self, setup):
        return ()

    def plan(self, obs, state):
        decisions, plan = state
        if decisions == 4:
            raise self.error
        return plan, (decisions + 1, plan)


@pytest.fixture
def odd(monkeypatch):
    """Make a policy importable by name, raising what is given."""

    def named(error):
        monkeypatch.setattr(Odd, "error", error)
        module = ModuleType("odd_policies")
        module.Odd = Odd
        monkeypatch.setitem(sys.modules, "odd_policies", module)
        return "odd_policies:Odd"

    return named


def test_every_step_has_a_record_and_the_host_says_that_it_timed_nothing(go):
    code, said, folder = go("--policy", "hot_cold", "--steps", "20")
    assert code == 0
    assert "no GPU timing" in said
    for name in ("unsliced", "hot_cold"):
        records = list(read_records(folder / f"{name}.parquet"))
        assert [record.step for record in records] == list(range(20))
        assert all(a.end_ns <= b.start_ns for a, b in itertools.pairwise(records))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["label"].startswith("no GPU timing")
    assert summary["policies"]["hot_cold"]["steps"] == 20
    assert json.loads((folder / "manifest.json").read_text())["status"] == "complete"


def test_a_profile_lies_beside_the_records(go):
    code, said, folder = go("--policy", "hot_cold", "--steps", "8", "--profile")
    assert code == 0
    assert said.count("recommended: ") == 2
    found = json.loads((folder / "hot_cold.profile.json").read_text())
    assert sum(layout["steps"] for layout in found["layouts"]) == 8
    assert found["utilisation_reason"] == "no GPU"


def test_the_same_run_gives_the_same_records(go, tmp_path):
    folders = [go("--policy", "dynamic", "--steps", "12")[2] for _ in range(2)]
    assert folders[0] != folders[1]
    a, b = ([vars_of(r) for r in read_records(folder / "dynamic.parquet")] for folder in folders)
    assert a == b


def vars_of(record):
    return [str(getattr(record, name)) for name in record.__dataclass_fields__]


def test_json_is_one_document(go):
    code, said, folder = go("--steps", "3", "--json")
    assert code == 0
    found = json.loads(said)
    assert found["folder"] == str(folder)
    assert found["policies"]["unsliced"]["steps"] == 3


def test_a_policy_that_raises_runs_unsliced_and_is_counted(go, odd):
    code, said, folder = go("--policy", odd(ValueError("odd")), "--steps", "10")
    assert code == 0
    assert "6 decisions replaced by unsliced" in said
    found = json.loads((folder / "summary.json").read_text())["policies"]["odd_policies:Odd"]
    assert found["warnings"] == ["Odd at step 4: odd; running unsliced"]


@dataclass(frozen=True)
class Hanging(Odd):
    """A policy that never ends its fifth decision."""

    def plan(self, obs, state):
        decisions, plan = state
        while decisions == 4:
            pass
        return plan, (decisions + 1, plan)


def test_a_policy_that_hangs_keeps_its_last_plan(go, monkeypatch):
    module = ModuleType("odd_policies")
    module.Hanging = Hanging
    monkeypatch.setitem(sys.modules, "odd_policies", module)
    monkeypatch.setattr(experiments_run, "MOST_PLAN_S", 0.2)
    code, said, folder = go("--policy", "odd_policies:Hanging", "--steps", "6")
    assert code == 0
    assert "2 decisions too late, the old plan kept" in said
    found = json.loads((folder / "summary.json").read_text())["policies"]["odd_policies:Hanging"]
    assert found["warnings"] == ["at step 4: no plan within 0.2 s; keeping the plan before"]
    assert len({record.plan_id for record in read_records(folder / "odd_policies-Hanging.parquet")}) == 1


def test_a_stop_by_the_user_keeps_the_records_up_to_then(go, odd):
    code, said, folder = go("--policy", odd(KeyboardInterrupt()), "--steps", "10")
    assert code == 130
    assert "stopped; records up to then are kept in" in said
    assert len(list(read_records(folder / "unsliced.parquet"))) == 10
    (name,) = (path.name for path in folder.glob("odd*.parquet"))
    # What was on its way is waited for.
    assert [record.step for record in read_records(folder / name)] == [0, 1, 2, 3, 4]
    assert json.loads((folder / "manifest.json").read_text())["status"] == "partial"


@dataclass(frozen=True)
class Stopped(Odd):
    """A policy whose user presses Ctrl-C during its third decision, as often as told."""

    times: ClassVar[int] = 1

    def plan(self, obs, state):
        decisions, plan = state
        if decisions == 2:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
        return plan, (decisions + 1, plan)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_a_run_between_two_steps(go, monkeypatch, times):
    module = ModuleType("odd_policies")
    module.Stopped = Stopped
    monkeypatch.setitem(sys.modules, "odd_policies", module)
    monkeypatch.setattr(Stopped, "times", times)
    before = signal.getsignal(signal.SIGINT)
    code, said, folder = go("--policy", "odd_policies:Stopped", "--steps", "10")
    assert code == 130
    assert "stopped; records up to then are kept in" in said
    kept = [record.step for record in read_records(folder / "odd_policies-Stopped.parquet")]
    assert kept == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--policy", "oracle"), "policy oracle foresees steps, which only the simulator offers"),
        (("--policy", "nosuch"), "nosuch"),
        (("--device", "nosuch"), "nosuch"),
        (("--on", "gpu"), "needs a CUDA device"),
    ],
)
def test_what_cannot_run_is_one_sentence_and_leaves_nothing(go, arguments, sentence, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, said, folder = go(*arguments)
    assert code == 2
    assert sentence in said
    assert said.count("\n") == 1
    assert folder is None


@pytest.mark.parametrize(
    ("spec", "command"),
    [
        (None, "expertslice a 'b c'"),
        ("pytest.__main__", "expertslice a 'b c'"),
        ("expertslice.experiments.slices", "python -m expertslice.experiments.slices a 'b c'"),
    ],
)
def test_a_record_says_how_its_program_was_called(monkeypatch, spec, command):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name=spec) if spec else None)
    monkeypatch.setattr(sys, "argv", ["x", "a", "b c"])
    assert provenance()["command"] == command
