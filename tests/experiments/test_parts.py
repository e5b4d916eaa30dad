"""The parts below a comparison: records, run folders, sums, samples, reasons."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from expertslice.experiments import runs, workload
from expertslice.experiments.records import read_records, writing
from expertslice.experiments.simulate import World, layer_bounds, simulate
from expertslice.experiments.terms import layer_terms
from expertslice.experiments.why import layer_words
from expertslice.policies.contract import StepRecord
from expertslice.policies.data import load_device
from expertslice.policies.layouts import fallback_plan
from expertslice.policies.registry import make_policy
from expertslice.traces.schema import MoeSpec, Provenance
from expertslice.traces.trace import ExpertLoad

MODEL = MoeSpec(name="m", num_layers=2, num_experts=8, top_k=2, d_model=2048, d_ff=(4096,))


@pytest.fixture(scope="module")
def world():
    return World(device=load_device("h100-sxm5-80gb"), model=MODEL)


def load(counts_SLE):
    return ExpertLoad(top_k=2, provenance=Provenance(source="test"), counts_SLE=np.asarray(counts_SLE))


def record(step, slices):
    start_LS = np.arange(2 * slices).reshape(2, slices) * 100 + 1000 * step + 50
    return StepRecord(
        step=step,
        plan_id="p",
        bucket=8,
        submit_ns=1000 * step,
        start_ns=1000 * step,
        end_ns=1000 * step + 900,
        start_ns_LS=start_LS,
        busy_ns_LS=np.full((2, slices), 40 + step),
        reconfigure_ns=0,
        capture_ns=0,
        control_stall_ns=0,
        hbm_bytes=7,
        flops=9,
        fallback=None if step else "start",
    )


def test_records_come_back_as_they_were(tmp_path):
    path = tmp_path / "r.parquet"
    written = [record(step, 1 + step % 3) for step in range(1100)]
    with writing(path) as write:
        for one in written:
            write(one)
        assert not path.exists()
    found = list(read_records(path))
    assert len(found) == 1100
    for a, b in zip(written, found, strict=True):
        np.testing.assert_array_equal(a.busy_ns_LS, b.busy_ns_LS)
        np.testing.assert_array_equal(a.start_ns_LS, b.start_ns_LS)
        assert (a.step, a.fallback, a.end_ns) == (b.step, b.fallback, b.end_ns)
    assert [one.step for one in read_records(path, 600, 602)] == [600, 601, 602]


def test_abandoned_records_leave_nothing(tmp_path):
    def stopped():
        with writing(tmp_path / "r.parquet") as write:
            write(record(0, 1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert list(tmp_path.iterdir()) == []


def test_run_folders_of_one_second_differ_and_are_complete_or_absent(tmp_path):
    folders = [runs.RunFolder(tmp_path, "whatif", {}) for _ in range(3)]
    assert all(folder.path.name.endswith(".partial") for folder in folders)
    assert len({folder.finish() for folder in folders}) == 3
    empty = runs.RunFolder(tmp_path, "whatif", {})
    assert empty.keep_partial("why") is None
    assert not list(tmp_path.glob("*.partial"))


def test_a_stopped_run_keeps_what_was_complete(tmp_path):
    folder = runs.RunFolder(tmp_path, "whatif", {"seed": 1})
    (folder.path / "steps-a.parquet").write_bytes(b"PAR1")
    (folder.path / "steps-b.parquet.part").write_bytes(b"PA")
    kept = folder.keep_partial("stopped")
    manifest = json.loads((kept / "manifest.json").read_text())
    assert manifest["status"] == "partial"
    assert manifest["finished_files"] == ["steps-a.parquet"]
    assert sorted(p.name for p in kept.iterdir()) == ["manifest.json", "steps-a.parquet"]


def test_json_is_valid_whatever_is_in_it():
    text = runs.to_json({"a": float("nan"), "b": np.arange(2), "c": np.float32(1.5), "d": float("inf"), "e": (1, {2})})
    assert json.loads(text) == {"a": None, "b": [0, 1], "c": 1.5, "d": None, "e": [1, [2]]}


def test_layers_fill_the_step(world):
    bounds = layer_bounds(record(3, 2))
    assert bounds.tolist() == [3000, 3200, 3900]
    outcome = simulate(make_policy("unsliced"), load([[[64] * 8] * 2] * 20).steps(), world)
    assert outcome.layer_ns_L.sum() == pytest.approx(outcome.makespan_ns, rel=0.05)
    assert outcome.layer_ns_L[0] == pytest.approx(outcome.layer_ns_L[1], rel=0.02)


def test_step_times_add_up_to_the_makespan(world):
    outcome = simulate(make_policy("static"), load([[[64] * 8] * 2] * 20).steps(), world)
    assert sum(outcome.step_ns) == outcome.makespan_ns
    assert outcome.tokens == 20 * 256
    assert outcome.unsliced_share() == pytest.approx(1 - outcome.sliced().sum() / 20)


def test_waiting_for_work_is_not_step_time(world):
    from dataclasses import replace

    steps = [replace(s, arrival_ns=s.step * 50_000_000) for s in load([[[64] * 8] * 2] * 4).steps()]
    outcome = simulate(make_policy("unsliced"), steps, world)
    assert max(outcome.step_ns) < 5_000_000
    assert outcome.makespan_ns > 150_000_000


def test_one_draw_of_the_model_is_the_same_for_every_policy_and_differs_from_the_next(world):
    a, b, c = (world.truth(draw).device for draw in (5, 5, 6))
    assert a == b
    assert a != c
    assert world.setup().belief.detail == "roofline"
    assert world.setup().belief.device == world.device


def test_survey_counts_everything_and_keeps_windows():
    counts = np.arange(100 * 2 * 8).reshape(100, 2, 8)
    found = workload.survey(load(counts), num_windows=3, window_steps=4)
    assert found.num_steps == 100
    np.testing.assert_allclose(found.mean_LE, counts.mean(axis=0))
    kept = [14, 15, 16, 17, 48, 49, 50, 51, 81, 82, 83, 84]
    assert [step.counts_LE[0, 0] for step in found.windows.steps()] == [16 * step for step in kept]


def test_a_trace_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no token"):
        workload.survey(load(np.zeros((3, 2, 8), int)), num_windows=1, window_steps=2)


def test_rebatched_requests_are_the_same_requests_in_other_steps(trace_path):
    from expertslice.traces.store import open_trace

    trace = open_trace(trace_path).read()
    like = workload.composition_like(trace)
    assert like.batch_size <= 16
    a, b, again = (workload.rebatched(trace, like, num_steps=20, seed=seed) for seed in (1, 2, 1))
    assert a.num_steps == b.num_steps == 20
    counts, others, repeated = (np.stack([s.counts_LE for s in one.steps()]) for one in (a, b, again))
    assert not np.array_equal(counts, others)
    np.testing.assert_array_equal(counts, repeated)


@pytest.mark.parametrize(("counts_E", "bound"), [([4, 4, 4, 4, 4, 4, 4, 4], "memory"), ([4000] * 8, "arithmetic")])
def test_what_binds_a_layer_follows_physics(world, counts_E, bound):
    truth = world.truth()
    plan = fallback_plan(world.setup())
    terms = layer_terms(truth, plan, load([[counts_E] * 2]).steps())
    assert [t.bound for t in terms] == [bound] * 2
    for t in terms:
        assert t.cold_share + t.hot_share + t.waste_share + t.launch_share + t.other_share == pytest.approx(1, abs=0.01)
        assert 0 < t.floor_share <= 1


def test_hot_beside_cold_leaves_room_to_overlap(world):
    truth = world.truth()
    plan = fallback_plan(world.setup())
    (mixed, _) = layer_terms(truth, plan, load([[[3000, 8, 8, 8, 8, 8, 8, 8]] * 2]).steps())
    assert mixed.bound == "memory beside arithmetic"
    assert mixed.overlap_share > 0.1
    assert (mixed.hot_experts, mixed.cold_experts) == (1, 7)


def test_layers_are_named_as_ranges():
    assert layer_words([0, 1, 2, 5]) == "layers 0–2 and 5"
    assert layer_words([3]) == "layer 3"
    assert layer_words([7, 1, 3]) == "layers 1, 3 and 7"


def test_losing_without_a_disk_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.RunFolder, "write_json", SimpleNamespace)
    with pytest.raises(TypeError):
        runs.RunFolder(tmp_path, "whatif", {})
