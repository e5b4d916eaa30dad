"""A whole comparison: its numbers, its folder, its bytes, and what is left when it is stopped."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from expertslice.experiments import records
from expertslice.experiments.records import read_records
from expertslice.experiments.simulate import World
from expertslice.experiments.table import COLUMNS, cells, columns_that_fit, print_summary
from expertslice.policies.data import device_names, load_device, load_variants
from expertslice.traces.schema import MoeSpec

QUICK = ("--policy", "static", "--policy", "hot_cold", "--jobs", "1", "--no-report")


def test_json_is_one_document_and_nothing_else(expertslice, trace_path, config_path):
    code, out, err = expertslice("whatif", trace_path, "--model", config_path, *QUICK, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["provisional"] is True
    assert {row["policy"] for row in summary["ranking"]} == {"unsliced", "static", "hot_cold"}


def test_the_table_names_ranks_bounds_and_the_status(finished, capsys):
    _, summary, folder = finished
    print_summary(summary, folder, report=True)
    out = capsys.readouterr().out
    assert "(provisional device model)" in out
    assert "PROVISIONAL: not calibrated" in out
    assert out.index("bound, not deployable:") < out.index("  oracle")
    assert "why" in out
    assert out.rstrip().endswith("report.html")


@pytest.mark.parametrize(("width", "kept"), [(200, 10), (100, 8), (60, 5)])
def test_a_narrow_terminal_loses_the_columns_least_missed(finished, width, kept):
    rows = [cells(row) for row in finished[1]["ranking"]]
    shown = [COLUMNS[i] for i in columns_that_fit(rows, width)]
    assert len(shown) <= kept
    assert {"policy", "p50 step", "p99", "vs unsliced", "rank"} <= set(shown)


def test_every_policy_runs_on_the_same_steps(finished):
    _, summary, folder = finished
    for row in summary["ranking"]:
        found = list(read_records(folder / f"{row['policy']}.parquet"))
        assert [record.step for record in found] == list(range(48))
        times = np.diff([0, *(record.end_ns for record in found)])
        assert row["step_mean_ns"] == pytest.approx(times.mean())
        assert row["step_p99_ns"] == pytest.approx(np.quantile(times, 0.99))


def test_metrics_are_consistent(finished):
    _, summary, _ = finished
    reference = next(row for row in summary["ranking"] if row["policy"] == "unsliced")
    tokens = summary["workload"]["num_tokens"]
    for row in summary["ranking"]:
        assert row["tokens_per_s"] == pytest.approx(tokens / (row["step_mean_ns"] * row["steps"]) * 1e9)
        assert row["effect_percent"] == pytest.approx(100 * (row["step_mean_ns"] / reference["step_mean_ns"] - 1))
        low, high = row["effect_interval_percent"]
        assert low <= row["effect_percent"] <= high
        for kind in ("workload", "model"):
            part_low, part_high = row[f"{kind}_interval_percent"]
            assert high - low >= 0.8 * (part_high - part_low)
        assert row["energy_j_per_1k_tokens"] > 0
        assert all(0 <= one["busy_share"] <= 1 for layout in row["layouts"] for one in layout["slices"])
    assert reference["effect_percent"] == 0
    assert reference["effect_interval_percent"] == [0, 0]


def test_bounds_take_no_rank_and_stand_last(finished):
    _, summary, _ = finished
    assert [row["policy"] for row in summary["ranking"] if not row["deployable"]] == ["oracle"]
    assert summary["ranking"][-1]["rank"] is None
    ranks = [row["rank"] for row in summary["ranking"][:-1]]
    assert ranks == sorted(ranks)
    assert ranks[0] == 1


def test_the_oracle_is_not_slower_than_unsliced(finished):
    _, summary, _ = finished
    oracle = next(row for row in summary["ranking"] if row["policy"] == "oracle")
    assert oracle["effect_percent"] < 1


def test_the_folder_holds_what_repeats_the_run(finished, trace_path):
    import hashlib

    _, summary, folder = finished
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["trace"]["sha256"] == hashlib.sha256(trace_path.read_bytes()).hexdigest()
    assert manifest["policies"]["hot_cold"]["params"]["min_gain"] > 0
    assert manifest["device"]["status"] == "provisional"
    assert manifest["versions"]["numpy"]
    assert json.loads((folder / "summary.json").read_text())["ranking"] == json.loads(json.dumps(summary["ranking"]))
    assert {p.suffix for p in folder.iterdir()} == {".json", ".parquet", ".html", ".svg", ".png"}
    assert not list(folder.parent.glob("*.partial"))


def test_one_worker_or_two_write_the_same_bytes(expertslice, trace_path, config_path, tmp_path):
    quick = ("--policy", "hot_cold", "--no-report", "--steps", "32", "--json")
    folders = []
    for jobs in (1, 2):
        code, out, err = expertslice("whatif", trace_path, "--model", config_path, *quick, "--jobs", jobs)
        assert code == 0, err
        folders.append(tmp_path / json.loads(out)["folder"])
    first, second = (
        {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"} for folder in folders
    )
    assert first == second
    assert sum(name.endswith(".parquet") for name in first) == 2


def test_parameters_are_set_and_recorded(expertslice, trace_path, config_path, tmp_path):
    quick = ("--policy", "static", "--no-report", "--steps", "16", "--jobs", "1", "--json")
    code, out, err = expertslice("whatif", trace_path, "--model", config_path, *quick, "--set", "static.num_slices=2")
    assert code == 0, err
    summary = json.loads(out)
    manifest = json.loads((tmp_path / summary["folder"] / "manifest.json").read_text())
    assert manifest["policies"]["static"]["params"]["num_slices"] == 2
    static = next(row for row in summary["ranking"] if row["policy"] == "static")
    assert len(static["layouts"][0]["slices"]) == 2


def test_default_policies_that_cannot_run_are_left_out_by_name(expertslice, trace_path, config_path):
    quick = ("--steps", "16", "--jobs", "1", "--no-report", "--json", "--mechanism", "shared")
    code, out, err = expertslice("whatif", trace_path, "--model", config_path, *quick)
    assert code == 0, err
    assert any("static is left out" in note for note in json.loads(out)["notes"])
    code, _, err = expertslice("whatif", trace_path, "--model", config_path, *quick, "--policy", "static")
    assert code == 2
    assert "shared" in err


def test_a_full_disk_is_one_sentence_and_leaves_nothing(expertslice, trace_path, config_path, tmp_path, monkeypatch):
    def full(file, rows):
        raise OSError(errno.ENOSPC, "No space left on device", "steps.parquet")

    monkeypatch.setattr(records, "write_rows", full)
    code, _, err = expertslice("whatif", trace_path, "--model", config_path, *QUICK)
    assert code == 2
    assert "disk is full" in err
    assert len(err.strip().splitlines()) == 1
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(expertslice, trace_path, config_path, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = expertslice("whatif", trace_path, "--model", config_path, *QUICK, "--out", tmp_path / "file" / "x")
    assert code == 2
    assert "give another path" in err


def test_a_policy_that_raises_is_named(expertslice, trace_path, config_path, tmp_path, monkeypatch):
    from expertslice.policies.hot_cold import HotCold

    def broken(self, obs, state):
        raise RuntimeError("no idea")

    monkeypatch.setattr(HotCold, "plan", broken)
    code, _, err = expertslice("whatif", trace_path, "--model", config_path, *QUICK)
    assert code == 2
    assert "HotCold" in err
    assert "no idea" in err
    kept = next((tmp_path / "runs").iterdir())
    assert json.loads((kept / "manifest.json").read_text())["status"] == "partial"


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_keeps_finished_policies(start, tmp_path, config_path, write_batches, jobs):
    write_batches(tmp_path / "long.parquet", 600)
    quick = ("--policy", "static", "--policy", "hot_cold", "--no-report", "--jobs", jobs)
    process = start("whatif", "long.parquet", "--model", config_path, *quick, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/*.partial/*.parquet")):
        assert time.monotonic() < deadline, process.stderr.read()
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1].startswith("expertslice: stopped; finished policies are kept in")
    assert "Traceback" not in err
    (folder,) = (tmp_path / "runs").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "partial"
    assert manifest["finished_files"]
    for name in manifest["finished_files"]:
        assert pq.read_table(folder / name).num_rows == 600
    assert not list(folder.glob("*.part"))


FAULTY = """
from dataclasses import dataclass
from typing import ClassVar
from expertslice.policies.unsliced import Unsliced


@dataclass(frozen=True, slots=True, kw_only=True)
class Faulty(Unsliced):
    where: str

    def init(self, setup):
        return Unsliced.init(self, setup) if self.where != "init" else [][0]

    def layouts(self, setup):
        return Unsliced.layouts(self, setup) if self.where != "layouts" else 1 / 0

    def plan(self, obs, state):
        return (None, state) if self.where == "plan" else Unsliced.plan(self, obs, state)
"""


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    ("where", "says"), [("init", "list index"), ("layouts", "division"), ("plan", "returned NoneType first")]
)
def test_a_faulty_policy_ends_the_run_with_one_sentence(
    start, tmp_path, trace_path, config_path, monkeypatch, where, says, jobs
):
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    name = "faulty:Faulty"
    chosen = ("--policy", name, "--set", f"{name}.where={where}", "--no-report", "--jobs", jobs)
    process = start("whatif", trace_path, "--model", config_path, *chosen)
    # With two workers a failure once waited for a thread that waited for it.
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("expertslice: Faulty")
    assert says in last
    assert "Traceback" not in err


def test_tiles_are_those_compiled_for_the_device():
    model = MoeSpec(name="m", num_layers=1, num_experts=8, top_k=2, d_model=64, d_ff=(64,))
    for name in device_names():
        device = load_device(name)
        world = World(device=device, model=model)
        wanted = load_variants(device.compute_capability)
        assert world.truth().variants == wanted
        assert world.setup().variants == wanted
    assert load_variants(80) != load_variants(90)


MEASURE = """
import resource, sys
from expertslice.experiments.cli import run
code = run(sys.argv[1:])
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def peak_kib(path, config_path, folder):
    """Return the peak memory of a run in a process of its own."""
    quick = ["--policy", "static", "--jobs", "1", "--no-report"]
    command = [sys.executable, "-c", MEASURE, "whatif", str(path), "--model", str(config_path), *quick]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    code, peak = done.stderr.split()[-2:]
    assert code == "0", done.stderr
    return int(peak)


def test_memory_does_not_grow_with_the_trace(tmp_path, config_path, write_batches):
    paths = [tmp_path / f"{steps}.parquet" for steps in (100, 1000)]
    for path, steps in zip(paths, (100, 1000), strict=True):
        write_batches(path, steps)
    short, long = (peak_kib(path, config_path, tmp_path) for path in paths)
    assert long <= 1.05 * short
