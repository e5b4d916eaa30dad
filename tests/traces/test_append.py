"""Recording: any chunking gives the same trace, and a killed recorder leaves everything it flushed."""

import itertools
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertslice.traces.check import TraceError
from expertslice.traces.schema import Provenance
from expertslice.traces.store import open_trace, write_trace
from expertslice.traces.trace import RoutingTrace, StepTable, slice_steps

append = pytest.importorskip("expertslice.traces.append", reason="recording needs POSIX file locks")


def make_steps(sizes, *, seed=0, domains=("code",), experts=8):
    rng = np.random.default_rng(seed)
    tokens = sum(sizes)
    return RoutingTrace(
        num_experts=experts,
        provenance=Provenance(source="test"),
        request_id_T=rng.integers(0, 9, tokens),
        position_T=rng.integers(0, 9, tokens).astype(np.int32),
        phase_T=np.ones(tokens, np.uint8),
        step_T=np.repeat(np.arange(len(sizes)), sizes),
        domain_T=rng.integers(-1, len(domains), tokens).astype(np.int16),
        domains=domains,
        expert_ids_TLK=rng.random((tokens, 3, experts)).argsort(axis=2)[:, :, :2].astype(np.uint8),
        step_table=StepTable(
            phase_S=np.ones(len(sizes), np.uint8),
            segment_S=np.zeros(len(sizes), np.uint8),
            arrival_ns_S=rng.integers(-1, 99, len(sizes)),
        ),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 11), max_size=5),
    flushes=st.sets(st.integers(0, 5)),
)
def test_any_chunking_equals_writing_at_once(tmp_path, sizes, cuts, flushes):
    trace = make_steps(sizes)
    at_once, recorded = tmp_path / "at_once.parquet", tmp_path / "recorded.parquet"
    recorded.unlink(missing_ok=True)
    write_trace(trace, at_once)
    bounds = sorted({0, len(sizes), *(cut for cut in cuts if cut < len(sizes))})
    with append.TraceAppender(recorded) as recorder:
        for place, (first, last) in enumerate(itertools.pairwise(bounds)):
            recorder.append(slice_steps(trace, first, last))
            if place in flushes:
                recorder.flush()
    assert open_trace(recorded).header == open_trace(at_once).header
    np.testing.assert_array_equal(open_trace(recorded).read().expert_ids_TLK, trace.expert_ids_TLK)
    assert not (tmp_path / "recorded.parquet.parts").exists()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_append import make_steps, append
recorder = append.TraceAppender(sys.argv[2])
for step in range(40):
    recorder.append(make_steps([step % 3], seed=step))
    if step % 10 == 9:
        recorder.flush()
recorder.append(make_steps([5]))
print("flushed", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_everything_flushed_survives_a_kill(tmp_path):
    path = tmp_path / "t.parquet"
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "flushed\n"), done.stderr
    assert not path.exists()
    for name in (path, tmp_path / "t.parquet.parts"):
        partial = open_trace(name)
        assert [step.num_tokens for step in partial.steps()] == [step % 3 for step in range(40)]
        assert "partial" in partial.provenance.notes
        assert partial.read().num_steps == partial.num_steps == 40
    with pytest.raises(TraceError, match="unfinished recording; recover it"):
        append.TraceAppender(path)
    append.recover(path)
    assert open_trace(path).num_steps == 40
    assert "recovered" in open_trace(path).provenance.notes
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.parquet"]


def test_a_half_written_part_is_not_read(tmp_path):
    recorder = append.TraceAppender(tmp_path / "t.parquet")
    recorder.append(make_steps([1, 1]))
    recorder.flush()
    (tmp_path / "t.parquet.parts" / ".000001.parquet.77.tmp").write_bytes(b"PAR1 half")
    assert open_trace(tmp_path / "t.parquet").num_steps == 2
    recorder.close()


def test_two_recorders_on_one_path_are_refused(tmp_path):
    path = tmp_path / "t.parquet"
    with append.TraceAppender(path) as recorder:
        with pytest.raises(TraceError, match="another recorder is at work"):
            append.TraceAppender(path)
        with pytest.raises(TraceError, match="another recorder is at work"):
            append.recover(path)
        recorder.append(make_steps([1]))
    with pytest.raises(TraceError, match="exists already"):
        append.TraceAppender(path)
    with pytest.raises(TraceError, match="nothing to recover"):
        append.recover(path)


def test_a_broken_run_keeps_its_finished_steps(tmp_path):
    path = tmp_path / "t.parquet"

    def run():
        with append.TraceAppender(path) as recorder:
            recorder.append(make_steps([1, 2]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert open_trace(path).num_tokens == 3


def test_steps_must_stay_of_one_model(tmp_path):
    with append.TraceAppender(tmp_path / "t.parquet") as recorder:
        recorder.append(make_steps([1]))
        recorder.append(make_steps([2], domains=("code", "prose")))
        good = make_steps([1], domains=("code", "prose"))
        gates = np.ones(good.expert_ids_TLK.shape, np.float16)
        for bad, words in (
            (make_steps([1], experts=9), "num_experts 9 follow 8"),
            (replace(good, expert_ids_TLK=good.expert_ids_TLK[:, :2]), "num_layers 2 follow 3"),
            (replace(good, gates_TLK=gates), "give gates with every step or never"),
            (make_steps([1], domains=("prose",)), "only add names"),
            (replace(good, expert_ids_TLK=good.expert_ids_TLK + 9), "expert ids"),
        ):
            with pytest.raises(TraceError, match=words):
                recorder.append(bad)
        assert recorder.num_steps == 2
    assert open_trace(tmp_path / "t.parquet").domains == ("code", "prose")


def test_an_empty_recording_leaves_nothing(tmp_path):
    append.TraceAppender(tmp_path / "t.parquet").close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(TraceError, match=r"cannot record in .*choose another folder"):
        append.TraceAppender(tmp_path / "no" / "t.parquet")
    (tmp_path / "t.parquet.parts").mkdir()
    with pytest.raises(TraceError, match="holds no flushed part"):
        open_trace(tmp_path / "t.parquet")
