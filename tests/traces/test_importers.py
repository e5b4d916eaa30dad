"""What all importers share: formats told by content, sentences for what is no trace, one exception for damage."""

import contextlib
import json
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertslice.traces.check import TraceError
from expertslice.traces.importers import FORMATS, detect, import_trace

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_placements_are_no_traces(tmp_path, save_pt):
    phy2log, log2phy, logcnt = np.zeros((2, 5), np.int64), np.zeros((2, 4, 2), np.int64), np.ones((2, 4), np.int64)
    (tmp_path / "init.json").write_text(json.dumps({"physical_to_logical_map": phy2log.tolist()}))
    save_pt({"physical_to_logical_map": phy2log}, tmp_path / "init.pt")
    save_pt((phy2log, log2phy, logcnt), tmp_path / "eplb.pt")
    save_pt({"phy2log": phy2log, "log2phy": log2phy, "logcnt": logcnt}, tmp_path / "named.pt")
    for name in ("init.json", "init.pt", "eplb.pt", "named.pt"):
        assert detect(tmp_path / name) == "expert-placement"
        with pytest.raises(TraceError, match=r"is an expert placement .* record with SGLang"):
            import_trace(tmp_path / name)


def test_logs_models_and_own_traces_are_named(tmp_path):
    (tmp_path / "log.csv").write_text("INFO EPLB step: avg_tokens=3.00, max_tokens=9, balancedness=0.3333\n")
    (tmp_path / "imatrix.dat").write_bytes(b"GGUF\x03\x00\x00\x00")
    (tmp_path / "t.npz").write_bytes(b"PAR1....PAR1")
    for name, kind, words in (
        ("log.csv", "eplb-log", "a series of balance figures without experts"),
        ("imatrix.dat", "imatrix", "counts experts without order"),
        ("t.npz", "parquet", "open it with open_trace"),
    ):
        assert detect(tmp_path / name) == kind
        with pytest.raises(TraceError, match=words):
            import_trace(tmp_path / name)


def test_unknown_content_and_names(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "x.txt").write_text("hello")
    np.save(tmp_path / "x.npy", np.ones(3))
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    for name in ("x.json", "x.txt", "x.npy", "x.npz"):
        with pytest.raises(TraceError, match="no routing records that are known here"):
            import_trace(tmp_path / name)
    with pytest.raises(TraceError, match="format 'nemo' is unknown; allowed are sglang-per-token"):
        import_trace(tmp_path / "x.txt", format="nemo")
    with pytest.raises(TraceError, match="is not JSON lines of vLLM routing loggers"):
        import_trace(tmp_path / "x.txt", format="vllm-log")
    with pytest.raises(TraceError, match="does not exist"):
        import_trace(tmp_path / "no.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TraceError, match="is an empty folder"):
        import_trace(tmp_path / "empty")


def test_a_folder_must_hold_one_format(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 2, 2), np.int32))
    np.save(tmp_path / "b.npy", np.ones((2, 2, 2), np.float32))
    with pytest.raises(TraceError, match="mixes arrays, moe-infinity"):
        import_trace(tmp_path)
    (tmp_path / "b.npy").unlink()
    (tmp_path / ".notes").write_text("hidden files are not looked at")
    assert detect(tmp_path) == "arrays"


def test_pickles_are_never_loaded(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"records": []}))
    with pytest.raises(TraceError, match=r"not in torch's zip format.*torch\.save"):
        import_trace(tmp_path / "x.pkl")
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object))
    with pytest.raises(TraceError, match=r"x\.npy is damaged"):
        import_trace(tmp_path / "x.npy")


def test_deep_nesting_does_no_harm(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100_000)
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02)" + b"\x85" * 100_000 + b".")
    for name in ("x.json", "x.pt"):
        with pytest.raises(TraceError):
            import_trace(tmp_path / name)


@pytest.mark.parametrize("name", FORMATS)
@QUICK
@given(
    content=st.binary(max_size=200),
    start=st.sampled_from([b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"{", b"\x80\x02"]),
)
def test_random_bytes_are_one_trace_error(tmp_path, name, content, start):
    (tmp_path / "x").write_bytes(start + content)
    with pytest.raises(TraceError, match="x"):
        import_trace(tmp_path / "x", format=name)


WORDS = st.sampled_from(
    [
        *("type", "meta", "route", "layer", "token_idx", "topk_ids", "topk_weights", "num_experts", "model_id"),
        *(
            "format",
            "moe-cache-lab.routing-jsonl",
            "format_version",
            "record_type",
            "phase",
            "prompt",
            "token_position",
        ),
        *(
            "selected_experts",
            "meta_info",
            "routed_experts",
            "choices",
            "sgl_ext",
            "prompt_tokens",
            "completion_tokens",
        ),
        *("iter", "block", "decoder", "tpe", "logical_count", "physical_to_logical_map", "AAAA", "usage"),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.integers() | st.floats() | WORDS,
    lambda item: st.lists(item, max_size=4) | st.dictionaries(WORDS, item, max_size=6),
    max_leaves=25,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(JSON, min_size=1, max_size=4), name=st.none() | st.sampled_from(sorted(FORMATS)))
def test_any_json_is_imported_or_one_trace_error(tmp_path, values, name):
    (tmp_path / "x.json").write_text("\n".join(map(json.dumps, values)))
    with contextlib.suppress(TraceError):
        import_trace(tmp_path / "x.json", format=name, top_k=1)


VALUES = st.one_of(
    st.none(),
    st.integers(-1, 5),
    st.lists(st.integers(-1, 5), max_size=3),
    st.sampled_from([np.zeros((2, 3), np.int32), np.ones((2, 1, 8), np.int32), np.ones((2, 2, 2), np.float32)]),
)
RECORD = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        ("forward_pass_id", "rank", "positions", "extend_seq_lens", "forward_mode", "topk_ids_of_layer"), VALUES
    )
    | {"global_physical_count": VALUES},
)
PACKS = st.one_of(
    st.fixed_dictionaries({"records": st.lists(RECORD, max_size=2) | VALUES, "last_physical_to_logical_map": VALUES}),
    st.fixed_dictionaries({"logical_count": VALUES}),
    st.fixed_dictionaries({"router_logits": VALUES}, optional={"attention_mask": VALUES}),
    st.tuples(VALUES, VALUES),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=PACKS)
def test_any_torch_data_is_imported_or_one_trace_error(tmp_path, save_by_hand, value):
    save_by_hand(value, tmp_path / "x.pt")
    with contextlib.suppress(TraceError):
        import_trace(tmp_path / "x.pt", top_k=1)
