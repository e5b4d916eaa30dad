"""Paired runs: both worlds agree where they must, differ where they do, and stop with what they have."""

import itertools
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertslice.experiments import pair as module
from expertslice.experiments.agreement import agree
from expertslice.experiments.errors import StoppedError
from expertslice.experiments.pair import PairOptions, pair
from expertslice.experiments.pair_report import verdict_of
from expertslice.experiments.records import read_records
from expertslice.policies.layouts import fallback_plan
from expertslice.runtime.host import HostExecutor


@pytest.fixture
def options(trace_path, config_path, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "NUM_DRAWS", 2)
    return PairOptions(
        trace=str(trace_path), model=str(config_path), policies=("static",), rounds=2, out=tmp_path, report=False
    )


class Slower(HostExecutor):
    """A host whose steps take a tenth longer than the cost model says."""

    def launch(self, step, plan, bucket):
        launched = super().launch(step, plan, bucket)
        ended = self._running[-1]
        end_ns = ended.end_ns + (ended.end_ns - ended.start_ns) // 10
        self._running[-1] = replace(ended, end_ns=end_ns)
        self._free_ns = self._ends_ns[-1] = end_ns
        return launched


@dataclass(frozen=True)
class Clocked:
    """Steals or not by what the last step took: other clocks, other plans."""

    foresees: ClassVar[bool] = False
    reads_clock: ClassVar[bool] = True

    def init(self, setup):
        return fallback_plan(setup)

    def layouts(self, setup):
        return ()

    def plan(self, obs, state):
        return replace(state, steal=obs.step_ns % 2 == 0), state


def test_on_a_host_both_worlds_agree_and_nothing_is_called_gpu_timing(options):
    summary, folder = pair(replace(options, report=True), say=lambda _: None)
    assert summary["label"].startswith("no GPU timing")
    for row in summary["rows"]:
        assert row["plans_differ_steps"] == row["plans_differ_between_rounds"] == 0
        assert row["closed_error_points"] == row["replayed_error_points"] == 0
    assert summary["ranking"]["closed"]["regret_percent"] == 0
    assert summary["noise_percent"] == 0
    assert json.loads((folder / "manifest.json").read_text())["status"] == "complete"
    assert pq.read_table(folder / "blocks.parquet")["policy"].to_pylist() == ["unsliced", "static"] * 2
    page = (folder / "report.html").read_text()
    assert "no GPU timing" in page
    assert page.count("<figure") == 2
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_policies_take_turns(options):
    said = []
    pair(options, say=said.append)
    turns = [line.split()[4] for line in said if line.startswith("round")]
    assert turns == ["unsliced", "static", "static", "unsliced"]


def test_an_error_of_the_cost_model_shows_in_times_and_layers(options, monkeypatch):
    monkeypatch.setattr("expertslice.runtime.host.HostExecutor", Slower)
    summary, _ = pair(options, say=lambda _: None)
    for row in summary["rows"]:
        assert 1.02 < row["backend_mean_ns"] / row["replayed_mean_ns"] < 1.11
    assert summary["residuals"]
    assert max(row["residual_percent"] for row in summary["residuals"]) > 2


def test_other_plans_are_counted_and_the_replay_takes_those_of_the_backend(options, monkeypatch):
    monkeypatch.setattr("expertslice.runtime.host.HostExecutor", Slower)
    monkeypatch.setattr("expertslice.policies.registry.POLICIES", {"unsliced": Clocked, "static": Clocked})
    summary, folder = pair(options, say=lambda _: None)
    assert summary["rows"][1]["plans_differ_steps"] > 0

    def ids(name):
        return [record.plan_id for record in read_records(folder / f"{name}.parquet")]

    assert ids("replayed-static") == ids("backend-static-0") != ids("simulator-static")


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_stopped_run_keeps_the_rounds_that_are_complete(options, monkeypatch, blocks):
    made = itertools.count()

    class Stopped(HostExecutor):
        def open(self, setup, layouts):
            if next(made) == blocks:
                raise KeyboardInterrupt
            super().open(setup, layouts)

    monkeypatch.setattr("expertslice.runtime.host.HostExecutor", Stopped)
    with pytest.raises(StoppedError, match="complete"):
        pair(options, say=lambda _: None)
    (folder,) = options.out.glob("*-pair")
    assert json.loads((folder / "manifest.json").read_text())["status"] == "partial"
    assert (folder / "summary.json").exists() == (blocks >= 2)
    if blocks >= 2:
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["rounds"] == 1
        assert summary["noise_percent"] is None
        assert "replayed" not in summary["ranking"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"policies": ()}, "name one or more"),
        ({"policies": ("oracle",)}, "only the simulator offers"),
        ({"steps": 4}, "needs 16 or more"),
    ],
)
def test_what_cannot_be_paired_is_one_sentence(options, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        pair(replace(options, **change), say=lambda _: None)
    assert not list(options.out.glob("*-pair*"))


def test_a_busy_gpu_is_refused_unless_told_otherwise(monkeypatch):
    from types import SimpleNamespace

    from expertslice.experiments import pair_gpu
    from expertslice.runtime.meter import Snapshot

    used = itertools.cycle([0, 37])

    class Meter:
        nvml = SimpleNamespace(nvmlDeviceGetUtilizationRates=lambda _: SimpleNamespace(gpu=next(used)))
        handle = None

        def __init__(self, device):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def snapshot(self):
            reasons = ("gpu_idle", "sw_power_cap")
            return Snapshot(power_w=99.0, limit_w=700.0, sm_clock_mhz=1980, temperature_c=50, throttle_reasons=reasons)

    monkeypatch.setattr(pair_gpu, "EnergyMeter", Meter)
    monkeypatch.setattr(pair_gpu, "PAUSE_S", 0.0)
    with pytest.raises(ValueError, match="37 % busy"), pair_gpu.sensor(busy_ok=False):
        pass
    with pair_gpu.sensor(busy_ok=True) as look:
        reading = look()
    assert reading["busy_before_percent"] == 37
    assert pair_gpu.slowed(reading) == {"sw_power_cap"}


times = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).uniform(1e5, 1e6, size=(3, 4, 24)).round()
)


@settings(max_examples=15, deadline=None)
@given(times, st.floats(0.2, 5.0))
def test_a_simulator_off_by_one_factor_has_no_error_on_differences(backend_RPN, factor):
    closed_PN = factor * np.median(backend_RPN, axis=0)
    found = agree(list("abcd"), backend_RPN, closed_PN, None, np.zeros((2, 4)), seed=0)
    assert all(abs(row["closed_error_points"]) < 1e-9 for row in found["rows"])
    assert all(verdict_of(row).startswith("holds") for row in found["rows"])
    assert found["ranking"]["closed"]["tau_b"] == pytest.approx(1)
    assert found["ranking"]["closed"]["regret_percent"] == pytest.approx(0)


@settings(max_examples=15, deadline=None)
@given(times)
def test_a_reversed_ranking_is_seen_and_costs_its_regret(backend_RPN):
    backend_PN = np.median(backend_RPN, axis=0)
    closed_PN = 2e6 - backend_PN
    found = agree(list("abcd"), backend_RPN, closed_PN, closed_PN, np.zeros((0, 4)), seed=0)["ranking"]
    mean_P = backend_PN.mean(axis=1)
    assert found["closed"]["tau_b"] == pytest.approx(-1)
    assert found["closed"]["regret_percent"] == pytest.approx(100 * (mean_P.max() / mean_P.min() - 1))
    assert found["closed"] == found["replayed"]


def test_the_timeline_decodes_to_paired_spans_of_both_worlds(options, expertslice):
    pytest.importorskip("perfetto")
    from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as pb

    _, folder = pair(options, say=lambda _: None)
    code, out, _ = expertslice("timeline", folder, "--steps", 20)
    assert code == 0
    trace = pb.Trace()
    trace.ParseFromString((folder / "timeline.pftrace").read_bytes())
    assert out.strip() == str(folder / "timeline.pftrace")
    tracks = {p.track_descriptor.uuid: p.track_descriptor for p in trace.packet if p.HasField("track_descriptor")}
    processes = {t.name for t in tracks.values() if t.HasField("process")}
    assert {"backend-static-0", "simulator-static", "replayed-static"} <= processes
    assert {"host", "stream", "slice 0", "slice 1"} <= {t.name for t in tracks.values()}
    last_ns, open_at = defaultdict(int), {}
    for packet in trace.packet:
        if not packet.HasField("track_event"):
            continue
        event, ns = packet.track_event, packet.timestamp
        assert ns >= last_ns[event.track_uuid]
        last_ns[event.track_uuid] = ns
        begins = event.type == pb.TrackEvent.TYPE_SLICE_BEGIN
        assert begins == (event.track_uuid not in open_at)
        if begins:
            open_at[event.track_uuid] = ns
        else:
            assert ns >= open_at.pop(event.track_uuid)
    assert not open_at
    steps = [record for record in read_records(folder / "backend-static-0.parquet") if record.step < 20]
    named = {p.track_event.name.split(",")[0] for p in trace.packet if p.HasField("track_event")}
    assert {f"step {record.step}" for record in steps} <= named


def test_a_folder_without_records_is_one_sentence(expertslice, tmp_path):
    code, _, err = expertslice("timeline", tmp_path)
    assert code == 2
    assert "holds no records" in err


def test_pair_on_a_gpu_needs_one(expertslice, trace_path, config_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, _, err = expertslice("pair", trace_path, "--model", config_path, "--policy", "static", "--on", "gpu")
    assert code == 2
    assert "CUDA" in err
