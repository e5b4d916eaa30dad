"""A sweep: the same rows wherever they are made, nothing twice, nothing lost, and bad policies marked."""

import json
import os
import signal
import time

import pyarrow.parquet as pq
import pytest

from expertslice.experiments.sweep_grid import grid_of

GRID = ("--policy", "unsliced", "--policy", "hot_cold(min_gain=0.01|0.5, plan_every=4|8)", "--seed", "1", "--seed", "2")

BAD = """
from dataclasses import dataclass
from expertslice.policies.unsliced import Unsliced

@dataclass(frozen=True, kw_only=True)
class Bad(Unsliced):
    how: str = "raises"
    def plan(self, obs, state):
        if self.how == "raises": raise RuntimeError("no idea")
        if self.how == "invalid": return None, state
        if self.how == "exits": import os; os._exit(1)
        if self.how == "allocates": return [bytearray(2**26) for _ in range(2**20)], state
        while True: pass
"""


@pytest.fixture
def sweep(expertslice, trace_path, config_path):
    def run(*arguments):
        code, out, err = expertslice("sweep", "--trace", trace_path, "--model", config_path, *arguments, "--json")
        assert code in (0, 3), err
        return code, json.loads(out)

    return run


def rows(folder):
    return sorted(pq.read_table(folder).to_pylist(), key=lambda row: row["point"])


def test_a_grid_is_every_combination():
    assert [p.min_gain for _, p in grid_of("hot_cold(min_gain=0.1|0.2, plan_every=4)")] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hot_cold(", "form"),
        ("hot_cold(min_gain)", "no value"),
        ("hot_cald", "hot_cold"),
        ("hot_cold(min_gain=x)", "float"),
    ],
)
def test_a_mistake_is_one_sentence(text, said):
    with pytest.raises(ValueError, match=said):
        list(grid_of(text))


@pytest.mark.parametrize("backend", ["loky", "dask"])
def test_the_same_rows_from_workers_and_from_one_process(sweep, tmp_path, backend):
    if backend == "dask":
        pytest.importorskip("distributed")
    sweep(*GRID, "--out", tmp_path / "one", "--backend", "sequential")
    code, found = sweep(*GRID, "--out", tmp_path / "two", "--backend", backend, "--jobs", "2")
    assert (code, found["run"], found["failed"]) == (0, 10, 0)
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


def test_nothing_is_run_twice(sweep, tmp_path):
    few = ("--backend", "sequential", "--out", tmp_path / "d", "--policy", "hot_cold")
    assert sweep(*few, "--policy", "hot_cold(min_gain=0.02)")[1]["points"] == 1
    assert sweep(*few, "--policy", "unsliced")[1]["run"] == 1
    assert sweep(*few)[1]["run"] == 0
    assert len(rows(tmp_path / "d")) == 2


def test_bad_policies_are_marked_and_the_rest_goes_on(sweep, tmp_path, monkeypatch):
    (tmp_path / "badly.py").write_text(BAD)
    monkeypatch.syspath_prepend(tmp_path)
    bad = "badly:Bad(how=raises|invalid|exits|allocates|hangs)"
    limits = ("--limit-s", "4", "--memory-gib", "0.25")
    given = ("--policy", bad, "--policy", "unsliced", *limits, "--backend", "sequential", "--out", tmp_path / "d")
    code, found = sweep(*given)
    assert (code, found["failed"]) == (3, 5)
    reasons = {json.loads(r["params"]).get("how"): r["reason"] for r in rows(tmp_path / "d") if r["reason"]}
    assert "no idea" in reasons["raises"]
    assert "return a Plan" in reasons["invalid"]
    assert reasons["exits"] == "its process died"
    assert reasons["allocates"] == "needed more than 0.25 GiB of memory"
    assert reasons["hangs"] == "took longer than 4 s"
    assert sweep(*given)[0] == 3
    again = sweep(*given[2:], "--policy", "badly:Bad(how=exits)", "--retry-failed")[1]
    assert (again["run"], again["failed"]) == (1, 1)


def test_after_kill_9_only_the_missing_points_are_run(start, sweep, trace_path, config_path, tmp_path):
    out = tmp_path / "d"
    gains = "|".join(f"0.{n:03d}" for n in range(1, 121))
    grid = ("--policy", f"hot_cold(min_gain={gains})", "--out", out, "--jobs", "2")
    process = start("sweep", "--trace", trace_path, "--model", config_path, *grid, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(out.glob("part-*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(rows(out))
    assert 0 < kept < 120
    code, found = sweep(*grid)
    assert (code, found["points"], found["run"]) == (0, 120, 120 - kept)
    assert len({row["point"] for row in rows(out)}) == len(rows(out)) == 120


@pytest.mark.benchmark
def test_a_thousand_points_of_the_bundled_trace_take_less_than_15_minutes(expertslice, tmp_path):
    gains = "|".join(f"{n / 1000:.3f}" for n in range(1, 126))
    half = f"(min_gain={gains}, plan_every=16|32)"
    factors = "|".join(f"{1 + n / 250:.3f}" for n in range(1, 501))
    begin = time.monotonic()
    grid = ("--policy", f"hot_cold{half}", "--policy", f"hot_cold(guarded=false, min_gain={gains}, plan_every=16|32)",
            "--policy", f"proportional(hot_factor={factors})")  # fmt: skip
    code, out, err = expertslice("sweep", *grid, "--jobs", "2", "--out", tmp_path / "d", "--json")
    assert code == 0, err
    assert json.loads(out)["run"] == 1000
    assert min(row["steps"] for row in pq.read_table(tmp_path / "d", columns=["steps"]).to_pylist()) >= 1000
    assert time.monotonic() - begin < 15 * 60
