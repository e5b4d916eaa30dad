"""The Parquet store: what is written is what is read, streamed or whole, and nothing broken passes."""

import errno
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertslice.traces import store
from expertslice.traces.check import TraceError
from expertslice.traces.header import KEY, parse_header
from expertslice.traces.schema import Provenance
from expertslice.traces.store import StoredLoad, StoredTrace, open_trace, write_trace
from expertslice.traces.trace import UNKNOWN, ExpertLoad, RoutingTrace, StepTable, concat, slice_steps

ARRAYS = ("request_id_T", "position_T", "phase_T", "step_T", "domain_T", "expert_ids_TLK", "gates_TLK")
STEP_ARRAYS = ("phase_S", "segment_S", "arrival_ns_S", "start_ns_S", "moe_ns_SL", "other_ns_SL")


def make_trace(
    tokens_of_step,
    *,
    layers=2,
    experts=8,
    top_k=2,
    seed=0,
    gates=False,
    times=False,
    segments=("all",),
    provenance=None,
):
    rng = np.random.default_rng(seed)
    steps, tokens = len(tokens_of_step), sum(tokens_of_step)
    ids = rng.random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k]

    def column(shape, low=UNKNOWN, high=2**40):
        return rng.integers(low, high, shape) if times else None

    return RoutingTrace(
        num_experts=experts,
        provenance=Provenance(source="test", seed=seed, versions={"numpy": "2"}),
        request_id_T=rng.integers(0, 2**40, tokens),
        position_T=rng.integers(0, 2**20, tokens).astype(np.int32),
        phase_T=rng.integers(0, 2, tokens).astype(np.uint8),
        step_T=np.repeat(np.arange(steps), tokens_of_step),
        domain_T=rng.integers(-1, 2, tokens).astype(np.int16),
        domains=("code", "prose"),
        expert_ids_TLK=ids.astype(np.uint8 if experts <= 256 else np.uint16),
        gates_TLK=rng.random((tokens, layers, top_k)).astype(np.float16) if gates else None,
        step_table=StepTable(
            phase_S=rng.integers(0, 3, steps).astype(np.uint8),
            segment_S=rng.integers(0, len(segments), steps).astype(np.uint8),
            segments=segments,
            arrival_ns_S=column(steps),
            start_ns_S=column(steps),
            moe_ns_SL=column((steps, layers)),
            other_ns_SL=column((steps, layers)),
        ),
    )


def same(left, right):
    """Assert equal traces; a step column of UNKNOWN alone equals a missing one."""
    left, right = concat([left]), concat([right])
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), name)
    for name in STEP_ARRAYS:
        np.testing.assert_array_equal(getattr(left.step_table, name), getattr(right.step_table, name), name)
    for name in ("num_experts", "provenance", "domains"):
        assert getattr(left, name) == getattr(right, name)
    assert left.step_table.segments == right.step_table.segments
    assert left.expert_ids_TLK.dtype == right.expert_ids_TLK.dtype


def same_steps(left, right):
    left, right = list(left), list(right)
    assert [(s.step, s.phase, s.arrival_ns, s.num_tokens) for s in left] == [
        (s.step, s.phase, s.arrival_ns, s.num_tokens) for s in right
    ]
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.counts_LE, b.counts_LE)


TRACES = st.builds(
    lambda sizes, layers, experts, share, seed, gates, times, segments: make_trace(
        sizes,
        layers=layers,
        experts=experts,
        top_k=max(1, int(experts * share)) if experts < 20 else 3,
        seed=seed,
        gates=gates,
        times=times,
        segments=segments,
    ),
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    st.integers(1, 4),
    st.sampled_from([1, 2, 7, 256, 257]),
    st.floats(0.1, 1),
    st.integers(0, 9),
    st.booleans(),
    st.booleans(),
    st.sampled_from([("all",), ("early", "late")]),
)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(trace=TRACES, group=st.integers(1, 6))
def test_round_trip_and_streaming(tmp_path, trace, group):
    path = tmp_path / "t.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "group_rows", lambda _: group)
        write_trace(trace, path)
    stored = open_trace(path)
    assert isinstance(stored, StoredTrace)
    assert (stored.num_steps, stored.num_tokens, stored.top_k) == (trace.num_steps, trace.num_tokens, trace.top_k)
    same(stored.read(), trace)
    same_steps(stored.steps(), trace.steps())


@QUICK
@given(trace=TRACES)
def test_checksum_depends_on_rows_alone(tmp_path, trace):
    headers = []
    for group in (1, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "group_rows", lambda _, group=group: group)
            write_trace(trace, tmp_path / "t.parquet")
        headers.append(open_trace(tmp_path / "t.parquet").header)
    assert headers[0] == headers[1]


def test_loads_round_trip(tmp_path, monkeypatch):
    counts = np.random.default_rng(0).integers(0, 2**31 - 1, (7, 3, 5))
    for labels in ((), tuple("abcdefg")):
        load = ExpertLoad(top_k=2, provenance=Provenance(source="x"), counts_SLE=counts, phase="decode", labels=labels)
        monkeypatch.setattr(store, "GROUP_BYTES", 2 * counts[0].nbytes)
        write_trace(load, tmp_path / "l.parquet")
        stored = open_trace(tmp_path / "l.parquet")
        assert isinstance(stored, StoredLoad)
        assert pq.ParquetFile(tmp_path / "l.parquet").num_row_groups == 4
        back = stored.read()
        np.testing.assert_array_equal(back.counts_SLE, counts)
        assert (back.labels, back.phase, back.top_k, back.provenance) == (labels, "decode", 2, load.provenance)
        same_steps(stored.steps(), load.steps())


def test_steps_without_tokens_have_zero_counts(tmp_path):
    write_trace(make_trace([0, 2, 0, 0]), tmp_path / "t.parquet")
    steps = list(open_trace(tmp_path / "t.parquet").steps())
    assert [step.counts_LE.sum() for step in steps] == [0, 8, 0, 0]
    write_trace(make_trace([0, 0]), tmp_path / "none.parquet")
    assert open_trace(tmp_path / "none.parquet").read().num_tokens == 0


def test_selection_has_its_own_steps_and_clock(tmp_path, monkeypatch):
    trace = make_trace([2, 1, 0, 3, 1, 2], segments=("early", "late"), times=True)
    table = replace(
        trace.step_table,
        segment_S=np.array([0, 0, 1, 1, 0, 1], np.uint8),
        phase_S=np.array([0, 1, 1, 2, 1, 1], np.uint8),
        arrival_ns_S=np.array([0, 10, 20, UNKNOWN, 40, 50]),
        start_ns_S=np.array([1, 11, 21, 31, 41, 51]),
    )
    monkeypatch.setattr(store, "group_rows", lambda _: 3)
    write_trace(replace(trace, step_table=table), tmp_path / "t.parquet")
    late = open_trace(tmp_path / "t.parquet").select(segment="late")
    assert (late.num_steps, late.num_tokens) == (3, 5)
    assert [(step.step, step.phase, step.arrival_ns, step.num_tokens) for step in late.steps()] == [
        (0, "decode", 0, 0),
        (1, "mixed", None, 3),
        (2, "decode", 30, 2),
    ]
    assert late.read().step_table.start_ns_S.tolist() == [1, 11, 31]
    np.testing.assert_array_equal(late.read().expert_ids_TLK, trace.expert_ids_TLK[np.isin(trace.step_T, [2, 3, 5])])
    narrower = late.select(phase="decode")
    assert [step.arrival_ns for step in narrower.steps()] == [0, 30]
    with pytest.raises(TraceError, match="no segment 'noon'; it has early, late"):
        late.select(segment="noon")
    with pytest.raises(TraceError, match="select less"):
        late.select(phase="prefill")
    with pytest.raises(TraceError, match="allowed are prefill, decode, mixed"):
        late.select(phase="sleep")


def test_streaming_memory_does_not_grow_with_the_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "group_rows", lambda _: 4000)
    peaks = []
    for repeats in (2, 20):
        piece = make_trace([100] * 100, layers=4, experts=64, top_k=4, times=True)
        write_trace(concat([piece] * repeats), tmp_path / "t.parquet")
        stored = open_trace(tmp_path / "t.parquet")
        tracemalloc.start()
        for _ in stored.steps():
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"expert_ids_TLK": lambda t: t.expert_ids_TLK + 7}, "expert ids spans .* allowed is 0 to 7"),
        ({"expert_ids_TLK": lambda t: np.zeros_like(t.expert_ids_TLK)}, "names an expert twice in layer 0"),
        ({"expert_ids_TLK": lambda t: t.expert_ids_TLK[:, :, 0]}, "are no .tokens, layers, top-k."),
        ({"expert_ids_TLK": lambda t: t.expert_ids_TLK[:2]}, "has shape .4,.; the trace needs .2,."),
        ({"num_experts": lambda _: 1}, "top-2 routing cannot come from 1 experts"),
        ({"gates_TLK": lambda t: np.full_like(t.gates_TLK, np.nan)}, "gates of token 0 in layer 0 are not finite"),
        ({"gates_TLK": lambda t: t.gates_TLK[:, :1]}, r"gates has shape .4, 1, 2.; the trace needs \(4, 2, 2\)"),
        ({"step_T": lambda t: t.step_T[::-1]}, "not sorted by step"),
        ({"step_T": lambda t: t.step_T + 9}, "step_T spans 9 to 11; allowed is 0 to 2"),
        ({"phase_T": lambda t: t.phase_T + 2}, "phase_T"),
        ({"domain_T": lambda t: t.domain_T + 3}, "domain_T"),
        ({"domains": lambda _: ("a", "a")}, "give each name once"),
        ({"position_T": lambda t: t.position_T - 2**30}, "position_T spans .* allowed is 0 to 2147483647"),
        (
            {"step_table": lambda t: replace(t.step_table, moe_ns_SL=np.zeros((3, 9), int))},
            r"moe_ns_SL has shape .*; the trace needs \(3, 2\)",
        ),
        ({"step_table": lambda t: replace(t.step_table, segment_S=t.step_table.segment_S + 1)}, "segment_S"),
        ({"step_table": lambda t: replace(t.step_table, phase_S=t.step_table.phase_S[:0])}, "step"),
    ],
)
def test_unsound_traces_are_refused_and_leave_nothing(tmp_path, change, words):
    trace = make_trace([1, 2, 1], gates=True)
    broken = replace(trace, **{name: make(trace) for name, make in change.items()})
    with pytest.raises(TraceError, match=words):
        write_trace(broken, tmp_path / "t.parquet")
    assert not list(tmp_path.iterdir())


def test_unsound_loads_are_refused(tmp_path):
    load = ExpertLoad(top_k=2, provenance=Provenance(source="x"), counts_SLE=np.ones((2, 3, 4), np.int64))
    for change, words in (
        ({"counts_SLE": -load.counts_SLE}, "allowed are 0 to"),
        ({"counts_SLE": load.counts_SLE << 31}, "allowed are 0 to"),
        ({"counts_SLE": load.counts_SLE[0]}, "give all three"),
        ({"top_k": 5}, "allowed are 1 to 4"),
        ({"labels": ("a",)}, "1 labels for 2 steps"),
        ({"phase": "sleep"}, "allowed are prefill"),
    ):
        with pytest.raises(TraceError, match=words):
            write_trace(replace(load, **change), tmp_path / "t.parquet")


def test_truncation_anywhere_is_one_trace_error(tmp_path):
    path = tmp_path / "t.parquet"
    write_trace(make_trace([2, 0, 1], gates=True, times=True), path)
    whole = path.read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 200)):
        path.write_bytes(whole[:size])
        with pytest.raises(TraceError, match=r"t\.parquet"):
            open_trace(path)


def test_flipped_bytes_never_pass_unnoticed(tmp_path):
    path, trace = tmp_path / "t.parquet", make_trace([3, 0, 2], gates=True, times=True)
    write_trace(trace, path)
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 250):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            back = open_trace(path).read()
        except TraceError:
            continue
        # What the checksum does not cover is provenance and what Parquet repeats of the columns.
        same(replace(back, provenance=trace.provenance), trace)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_random_bytes_are_one_trace_error(tmp_path, content):
    (tmp_path / "t.parquet").write_bytes(content + b"PAR1")
    with pytest.raises(TraceError):
        open_trace(tmp_path / "t.parquet")


def test_foreign_newer_and_altered_files(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(TraceError, match="not written by expertslice"):
        open_trace(path)
    write_trace(make_trace([1, 2]), path)
    table = pq.read_table(path)
    header = pq.ParquetFile(path).metadata.metadata[KEY]

    def rewritten(table, header):
        pq.write_table(table.replace_schema_metadata({KEY: header}), path)
        return open_trace(path).read()

    same(rewritten(table, header), make_trace([1, 2]))
    for old, new, words in (
        (b'"schema_version": 1', b'"schema_version": 2', "schema 2 and this expertslice reads up to 1; upgrade"),
        (b'"num_layers": 2', b'"num_layers": 3', "lacks .*experts_2"),
        (b'"top_k": 2', b'"top_k": 1', "layer 0 is stored as"),
        (b'"num_experts": 8', b'"num_experts": 5', "expert ids spans"),
        (b'"num_experts": 8', b'"num_experts": 9', "checksum"),
        (b'"num_steps": 2, ', b"", "damaged"),
    ):
        assert old in header
        with pytest.raises(TraceError, match=words):
            rewritten(table, header.replace(old, new))
    with pytest.raises(TraceError, match=r"lacks .*position"):
        rewritten(table.drop(["position"]), header)
    for column, words in (("position", "checksum"), ("step", "follows step")):
        place = table.column_names.index(column)
        moved = table.set_column(place, column, pa.array(table[column].to_numpy() + 1))
        with pytest.raises(TraceError, match=words):
            rewritten(moved, header)
    place = table.column_names.index("segment")
    for gaps in (pa.nulls(len(table), pa.uint8()), pa.array([0.5] * len(table))):
        with pytest.raises(TraceError, match="column segment has gaps or is no integer"):
            rewritten(table.set_column(place, "segment", gaps), header)
    with pytest.raises(TraceError, match="skip a step"):
        rewritten(table.take(pa.array([2, 1, 0])), header)


def test_missing_files_and_folders(tmp_path):
    for path, words in ((tmp_path / "no.parquet", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(TraceError, match=words):
            open_trace(path)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "no" / "t.parquet", tmp_path / "file" / "t.parquet"):
        with pytest.raises(TraceError, match=r"cannot write .* choose another folder"):
            write_trace(make_trace([1]), path)


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path, old = tmp_path / "t.parquet", make_trace([1])
    write_trace(old, path)

    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(TraceError, match="No space left on device; free space there"):
        write_trace(make_trace([2]), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.parquet"]
    same(open_trace(path).read(), old)


def test_file_size_limit_is_one_sentence(tmp_path):
    pytest.importorskip("resource")
    program = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
from test_store import make_trace
from expertslice.traces.store import write_trace
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trace = make_trace([4000])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_trace(trace, sys.argv[2])
except ValueError as error:
    sys.stdout.write(str(error))
"""
    target = tmp_path / "t.parquet"
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert not list(tmp_path.iterdir())


def test_ids_are_narrow_and_header_is_json(tmp_path):
    for experts, width in ((256, 2), (257, 4)):
        write_trace(make_trace([3], experts=experts), tmp_path / "t.parquet")
        file = pq.ParquetFile(tmp_path / "t.parquet")
        assert file.schema_arrow.field("experts_0").type == pa.binary(width)
        assert parse_header(file.metadata.metadata).num_experts == experts


def test_real_trace_stays_near_its_entropy(tmp_path):
    source = Path(__file__).resolve().parents[3] / "shared" / "traces" / "gptoss20b" / "dev.npz"
    if not source.exists():
        pytest.skip("the gpt-oss-20b trace is not on this machine")
    ids = np.load(source)["experts"][:20000]
    tokens = len(ids)
    trace = slice_steps(make_trace([1] * tokens, layers=1, experts=32, top_k=4), 0, tokens)
    write_trace(replace(trace, expert_ids_TLK=ids), tmp_path / "t.parquet")
    columns = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(0)
    sizes = [columns.column(i) for i in range(columns.num_columns)]
    ids_bytes = sum(c.total_compressed_size for c in sizes if c.path_in_schema.startswith("experts"))
    assert ids_bytes / tokens < 2.2 * 24
