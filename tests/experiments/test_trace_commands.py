"""`trace info | import | compose | synth`, and routing made for another model."""

import json
from dataclasses import replace

import numpy as np
import pytest

from expertslice.experiments import fitted
from expertslice.experiments.inputs import library_paths
from expertslice.experiments.runs import sha256_of
from expertslice.traces.schema import MoeSpec
from expertslice.traces.spec import zipf_spec
from expertslice.traces.statistics import gini
from expertslice.traces.store import open_trace, write_trace
from expertslice.traces.synth import synthesise


def test_info_shows_statistics_and_writes_figures(expertslice, trace_path, tmp_path):
    code, out, err = expertslice("trace", "info", trace_path, "--figures", "figs", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["trace"]["num_steps"] == 48
    assert len(found["statistics"]["gini_L"]) == 3
    assert len(found["trace"]["figures"]) == 5
    assert all((tmp_path / path).stat().st_size > 1000 for path in found["trace"]["figures"])
    code, out, _ = expertslice("trace", "info", trace_path)
    assert code == 0
    assert "Gini" in out


def test_compose_writes_other_batches(expertslice, trace_path, tmp_path):
    code, out, err = expertslice(
        "trace", "compose", trace_path, "--out", "o.parquet", "--batch-size", 4, "--steps", 9, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["num_steps"] == 9
    assert open_trace(tmp_path / "o.parquet").num_steps == 9


def test_synth_makes_routing_for_a_model(expertslice, tmp_path):
    written = []
    for name in ("a", "b"):
        code, _, err = expertslice(
            "trace", "synth", "--out", f"{name}.parquet", "--model", "mixtral-8x7b", "--requests", 2
        )
        assert code == 0, err
        written.append((tmp_path / f"{name}.parquet").read_bytes())
    trace = open_trace(tmp_path / "a.parquet")
    assert (trace.num_layers, trace.num_experts, trace.top_k) == (32, 8, 2)
    assert trace.provenance.model == "mixtral-8x7b"
    assert written[0] == written[1]


def test_import_reads_other_formats(expertslice, tmp_path):
    ids = np.random.default_rng(0).random((40, 3, 8)).argsort(axis=2)[:, :, :2].astype(np.uint8)
    np.save(tmp_path / "routed.npy", ids)
    code, out, err = expertslice("trace", "import", "routed.npy", "--out", "o.parquet", "--num-experts", 8, "--json")
    assert code == 0, err
    assert json.loads(out)["num_experts"] == 8
    np.testing.assert_array_equal(open_trace(tmp_path / "o.parquet").read().expert_ids_TLK, ids)
    code, out, err = expertslice("trace", "info", "routed.npy", "--json")
    assert code == 0, err
    assert any("imported" in note for note in json.loads(out)["trace"]["notes"])


def test_what_import_cannot_read_is_one_sentence(expertslice, tmp_path):
    (tmp_path / "foreign.txt").write_text("dear diary")
    for extra in ((), ("--format", "sglang-per-tken")):
        code, _, err = expertslice("trace", "import", "foreign.txt", "--out", "o.parquet", *extra)
        assert code == 2
        assert len(err.strip().splitlines()) == 1
        assert not (tmp_path / "o.parquet").exists()
    assert "did you mean 'sglang-per-token'" in err


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_damaged_files_are_one_sentence(expertslice, trace_path, tmp_path, damage):
    whole = trace_path.read_bytes()
    content = {"truncated": whole[: len(whole) // 2], "foreign": b"not a trace" * 20, "empty": b""}[damage]
    (tmp_path / "bad.parquet").write_bytes(content)
    for command in (("trace", "info"), ("whatif",)):
        code, out, err = expertslice(*command, "bad.parquet")
        assert code == 2
        assert out == ""
        assert len(err.strip().splitlines()) == 1


def test_gates_that_are_no_numbers_are_refused(expertslice, trace_path, tmp_path):
    trace = open_trace(trace_path).read()
    gates = np.full(trace.expert_ids_TLK.shape, 0.5, np.float16)
    write_trace(replace(trace, gates_TLK=gates), tmp_path / "gates.parquet")
    assert expertslice("trace", "info", "gates.parquet", "--json")[0] == 0
    gates[3] = np.nan
    from expertslice.traces import store

    with pytest.MonkeyPatch.context() as patch:
        # A file of another writer: ours would not write such gates.
        patch.setattr(store, "check_block", lambda block: None)
        write_trace(replace(trace, gates_TLK=gates), tmp_path / "nan.parquet")
    code, _, err = expertslice("trace", "info", "nan.parquet")
    assert code == 2
    assert "gates" in err


@pytest.mark.parametrize("shape", [(5, 8, 2), (3, 20, 2), (3, 8, 4), (2, 5, 2), (7, 64, 8)])
def test_resized_routing_keeps_its_skew(shape):
    spec = zipf_spec(3, 8, 2, zipf_s=1.0, decode_tokens=64)
    model = MoeSpec(name="m", num_layers=shape[0], num_experts=shape[1], top_k=shape[2], d_model=64, d_ff=(64,))
    trace = synthesise(fitted.resized(spec, model), 16, 0)
    assert (trace.num_layers, trace.num_experts, trace.top_k) == shape
    before = synthesise(spec, 16, 0)

    def skew(one):
        loads = [
            np.bincount(one.expert_ids_TLK[:, layer].ravel(), minlength=one.num_experts)
            for layer in range(one.num_layers)
        ]
        return np.median([gini(load_E) for load_E in loads])

    assert skew(trace) == pytest.approx(skew(before), abs=0.2)


def test_the_same_shape_is_left_alone():
    spec = zipf_spec(3, 8, 2)
    model = MoeSpec(name="m", num_layers=3, num_experts=8, top_k=2, d_model=64, d_ff=(64,))
    assert fitted.resized(spec, model) is spec


def test_a_model_of_ones_own_is_asked_about_with_fitted_routing(
    expertslice, trace_path, config_path, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fitted, "fit", lambda source: zipf_spec(3, 8, 2, prompt_tokens=8, decode_tokens=24))
    quick = ("--policy", "static", "--steps", 24, "--batch-size", 8, "--jobs", 1, "--no-report", "--json")
    code, out, err = expertslice("whatif", "--model", config_path, "--fit-routing", trace_path, *quick)
    assert code == 0, err
    summary = json.loads(out)
    assert any("synthetic" in note for note in summary["notes"])
    assert summary["workload"]["num_steps"] == 24
    assert list((tmp_path / "cache" / "expertslice").iterdir())
    monkeypatch.setattr(fitted, "fit", lambda source: pytest.fail("the fit was not remembered"))
    assert expertslice("whatif", "--model", config_path, "--fit-routing", trace_path, *quick)[0] == 0


def test_the_traces_that_ship_are_what_their_manifests_say(expertslice):
    code, out, err = expertslice("trace", "list", "--json")
    assert code == 0, err
    listed, paths = {row["trace"]: row for row in json.loads(out)}, library_paths()
    assert set(listed) == set(paths)
    assert len(paths) >= 5
    assert sum(path.stat().st_size for path in next(iter(paths.values())).parent.iterdir()) <= 12e6
    manifests = {name: path.with_suffix(".manifest.json") for name, path in paths.items()}
    told = {name: json.loads(path.read_text()) for name, path in manifests.items() if path.exists()}
    assert set(paths) - set(told) == {"ours-moe-32e4k"}
    for name, facts in told.items():
        trace = open_trace(paths[name])
        for field in ("num_steps", "num_tokens", "num_layers", "num_experts", "top_k"):
            assert facts[field] == getattr(trace, field), (name, field)
        assert facts["sha256"] == sha256_of(paths[name])
        assert facts["recorded"]["device"].startswith("NVIDIA")
        assert ("random weights" in trace.provenance.model) == name.endswith("-random")
        assert listed[name]["tokens"] == trace.num_tokens
