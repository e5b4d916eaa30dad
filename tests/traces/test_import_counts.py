"""Importers of counts, each on a file of the format's exact keys and dtypes."""

import json
from pathlib import Path

import numpy as np
import pytest

from expertslice.traces.check import TraceError
from expertslice.traces.importers import detect, import_trace
from expertslice.traces.trace import ExpertLoad

SHARED = Path(__file__).resolve().parents[3] / "shared" / "traces"


def load_of(path, name, **options):
    assert detect(path) == name
    result = import_trace(path, **options)
    assert isinstance(result.trace, ExpertLoad)
    assert result.format == name
    return result.trace, " | ".join(result.notes)


def stat(steps=6, layers=5, experts=8, dense=2, seed=0):
    counts = np.random.default_rng(seed).integers(0, 9, (steps, layers, experts)).astype(np.int32)
    counts[:, :dense] = 0
    return counts


def test_sglang_stat_drops_unused_rows_and_dense_layers(tmp_path, save_pt):
    counts = stat()
    counts[4:] = 0
    path = tmp_path / "expert_distribution_recorder_1700000000.0.pt"
    save_pt({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, path)
    load, notes = load_of(path, "sglang-stat", top_k=2)
    np.testing.assert_array_equal(load.counts_SLE, counts[:4, 2:])
    assert load.top_k == 2
    assert "2 buffer rows without a count" in notes
    assert "layers [0, 1] count nothing (dense layers) and are dropped" in notes
    assert "rotated" not in notes


def test_sglang_stat_full_ring_buffer_has_an_unknown_start(tmp_path, save_pt):
    counts = np.roll(stat(), 2, axis=0)
    save_pt({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": 0.5}, tmp_path / "x.pt")
    load, notes = load_of(tmp_path / "x.pt", "sglang-stat", top_k=2)
    assert load.num_steps == 6
    assert "its first step is unknown and the order is rotated" in notes


def test_sglang_stat_drops_dummy_steps(tmp_path, save_pt):
    counts = stat(dense=0)
    counts[:2] = 0
    counts[0, :, :2] = 16
    counts[1, :, 3:5] = 4096
    save_pt({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, tmp_path / "x.pt")
    load, notes = load_of(tmp_path / "x.pt", "sglang-stat", top_k=2)
    np.testing.assert_array_equal(load.counts_SLE, counts[2:])
    assert "2 constant steps (warm-up or graph capture) dropped" in notes


def test_counts_ask_for_top_k_and_refuse_emptiness(tmp_path, save_pt):
    path = tmp_path / "x.pt"
    save_pt({"rank": 0, "logical_count": stat(), "average_utilization_rate_over_window": None}, path)
    with pytest.raises(TraceError, match="pass top_k"):
        import_trace(path)
    with pytest.raises(TraceError, match="allowed are 1 to 8"):
        import_trace(path, top_k=9)
    with pytest.raises(TraceError, match="more than the num_experts 4"):
        import_trace(path, top_k=2, num_experts=4)
    assert import_trace(path, top_k=2, num_experts=10).trace.num_experts == 10
    for counts, words in (
        (stat() * 0, "all its counts are zero"),
        (-stat(), "allowed are 0 to"),
        (stat()[..., 0, 0], "3"),
    ):
        save_pt({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, path)
        with pytest.raises(TraceError, match=words):
            import_trace(path, top_k=2)


def test_sglang_per_pass_sums_ranks_and_copies(tmp_path, save_pt):
    physical_to_logical = np.array([[0, 1, 2, 3, 0, 2], [3, 2, 1, 0, 3, 3]], np.int32)
    rng = np.random.default_rng(0)
    counts = {rank: rng.integers(0, 9, (3, 2, 6)).astype(np.int32) for rank in (0, 1)}
    for rank in (0, 1):
        records = [
            {"forward_pass_id": 7 - place, "rank": rank, "gatherer_key": "primary", "global_physical_count": count}
            for place, count in enumerate(counts[rank])
        ]
        pack = {"records": records, "last_physical_to_logical_map": physical_to_logical}
        save_pt(pack, tmp_path / f"expert_distribution_recorder_1700000000.0_{rank}.pt")
    load, notes = load_of(tmp_path, "sglang-per-pass", top_k=2)
    expected = np.zeros((3, 2, 4), np.int64)
    for step, layer, slot in np.ndindex(3, 2, 6):
        expected[2 - step, layer, physical_to_logical[layer, slot]] += sum(
            c[step, layer, slot] for c in counts.values()
        )
    np.testing.assert_array_equal(load.counts_SLE, expected)
    assert "6 records of 2 ranks" in notes
    save_pt({"records": [], "last_physical_to_logical_map": physical_to_logical}, tmp_path / "z.pt")
    with pytest.raises(TraceError, match="has no records"):
        import_trace(tmp_path / "z.pt", top_k=2)


def test_sglang_per_pass_refuses_what_does_not_fit(tmp_path, save_pt):
    record = {
        "forward_pass_id": 1,
        "rank": 0,
        "gatherer_key": "primary",
        "global_physical_count": np.ones((2, 3), np.int32),
    }
    pack = {"records": [record], "last_physical_to_logical_map": np.zeros((2, 4), np.int32)}
    save_pt(pack, tmp_path / "a.pt")
    with pytest.raises(TraceError, match="do not fit the expert map"):
        import_trace(tmp_path / "a.pt", top_k=1)
    override = np.arange(6).reshape(2, 3) % 3
    np.testing.assert_array_equal(
        import_trace(tmp_path / "a.pt", top_k=1, physical_to_logical=override).trace.counts_SLE, np.ones((1, 2, 3))
    )
    save_pt(pack, tmp_path / "b.pt")
    with pytest.raises(TraceError, match="forward pass 1 of rank 0 is here twice"):
        import_trace(tmp_path, top_k=1, physical_to_logical=override)


@pytest.mark.parametrize("nested", [False, True])
def test_logical_count_of_an_expert_location(tmp_path, nested):
    counts = stat(dense=0)
    value = counts if nested else counts.sum(axis=0)
    (tmp_path / "init.json").write_text(json.dumps({"logical_count": value.tolist()}))
    load, _ = load_of(tmp_path / "init.json", "sglang-stat", top_k=2)
    np.testing.assert_array_equal(load.counts_SLE, value if nested else value[None])


def test_moe_infinity_sequences_become_steps(tmp_path):
    counts = stat(dense=0).astype(np.float32)
    np.save(tmp_path / "trace.npy", counts)
    load, _ = load_of(tmp_path / "trace.npy", "moe-infinity", top_k=2)
    np.testing.assert_array_equal(load.counts_SLE, counts)
    assert load.labels[:2] == ("sequence 0", "sequence 1")
    for bad, words in (
        (counts + 0.5, "no whole counts"),
        (counts * np.nan, "NaN or infinity at"),
        (counts * 1e12, "whole"),
    ):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(TraceError, match=words):
            import_trace(tmp_path / "bad.npy", top_k=2)


def test_count_archive(tmp_path):
    arrays = {}
    for model, experts in (("small", 4), ("large", 8)):
        for domain in ("c4", "wiki"):
            top1 = np.random.default_rng(1).integers(1, 9, (3, experts))
            arrays[f"{model}__expert_counts__{domain}"] = top1 * 2
            arrays[f"{model}__expert_counts_top1__{domain}"] = top1
            arrays[f"{model}__expert_counts_crosslayer__{domain}"] = np.ones((2, experts, experts), np.int64)
    np.savez(tmp_path / "counts.npz", **arrays)
    load, _ = load_of(tmp_path / "counts.npz", "count-archive", member="small")
    np.testing.assert_array_equal(load.counts_SLE[1], arrays["small__expert_counts__wiki"])
    assert (load.labels, load.top_k, load.provenance.model) == (("c4", "wiki"), 2, "small")
    with pytest.raises(TraceError, match="pass one of the models in the file: large, small"):
        import_trace(tmp_path / "counts.npz")


def test_shared_count_archive():
    path = SHARED / "olmoe_mixtral_counts" / "counts.npz"
    if not path.exists():
        pytest.skip("the OLMoE counts are not on this machine")
    load, _ = load_of(path, "count-archive", member="olmoe")
    assert (load.num_layers, load.num_experts, load.top_k) == (3, 64, 8)
    assert "github" in load.labels
