"""Importers of token records, each on a file of the format's exact keys and dtypes, traps included."""

import base64
import io
import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from expertslice.traces.check import TraceError
from expertslice.traces.importers import content, detect, import_trace
from expertslice.traces.store import open_trace, write_trace
from expertslice.traces.trace import RoutingTrace

SHARED = Path(__file__).resolve().parents[3] / "shared" / "traces"


def trace_of(path, name, **options):
    assert detect(path) == name
    result = import_trace(path, **options)
    assert isinstance(result.trace, RoutingTrace)
    assert result.format == name
    return result.trace, " | ".join(result.notes)


def routing(tokens, layers=3, experts=8, top_k=2, seed=0):
    return np.random.default_rng(seed).random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k].astype(np.int32)


def phases(trace):
    return [(step.phase, step.num_tokens) for step in trace.steps()]


class TestSglangPerToken:
    """Physical ids, width 8 padded with -1, dense layers, idle and padded rows, ranks, requests by position."""

    MAP = np.array([[0] * 10, [0, 1, 2, 3, 4, 5, 6, 7, 0, 1], [7, 6, 5, 4, 3, 2, 1, 0, 7, 7]], np.int64)

    def record(self, number, positions, *, lengths=None, mode=2, rank=0, seed=None, padding=0):
        """Layer 0 is dense: never written, so -1."""
        tokens = len(positions)
        rng = np.random.default_rng(number if seed is None else seed)
        physical = np.full((3, tokens + padding, 8), -1, np.int32)
        logical = rng.random((tokens, 2, 8)).argsort(axis=2)[:, :, :2]
        for token, layer, k in np.ndindex(tokens, 2, 2):
            slots = np.flatnonzero(self.MAP[layer + 1] == logical[token, layer, k])
            physical[layer + 1, token, k] = rng.choice(slots)
        record = {
            "forward_pass_id": number,
            "rank": rank,
            "gatherer_key": "primary",
            "input_ids": [1] * (tokens + padding),
            "positions": [*positions, *[0] * padding],
            "extend_seq_lens": lengths,
            "forward_mode": mode,
            "topk_ids_of_layer": physical,
            "misc_objects": [],
            "global_physical_count": np.zeros((3, 10), np.int32),
        }
        return record, logical

    def save(self, save_pt, path, records, expert_map=None):
        save_pt(
            {"records": records, "last_physical_to_logical_map": self.MAP if expert_map is None else expert_map}, path
        )

    def test_requests_phases_and_logical_ids(self, tmp_path, save_pt):
        plan = [
            self.record(3, [0, 1, 2, 0, 1], lengths=[3, 2], mode=1),
            self.record(4, [3, 2], padding=2),
            self.record(5, [4, 0, 1, 2], lengths=[1, 3], mode=3),
            self.record(6, [], mode=4, padding=3),
            self.record(7, [5, 3]),
            self.record(8, [5, 5], lengths=[1, 1], mode=1),
        ]
        self.save(save_pt, tmp_path / "x_0.pt", [record for record, _ in plan])
        trace, notes = trace_of(tmp_path / "x_0.pt", "sglang-per-token")
        np.testing.assert_array_equal(trace.expert_ids_TLK, np.concatenate([logical for _, logical in plan]))
        assert phases(trace) == [("prefill", 5), ("decode", 2), ("mixed", 4), ("decode", 2), ("prefill", 2)]
        assert trace.request_id_T.tolist() == [0, 0, 0, 1, 1, 0, 1, 0, 2, 2, 2, 0, 2, 3, 4]
        assert trace.position_T.tolist() == [0, 1, 2, 0, 1, 3, 2, 4, 0, 1, 2, 5, 3, 5, 5]
        assert (trace.num_layers, trace.num_experts, trace.top_k) == (2, 8, 2)
        assert "5 rows without experts (padding, or never written) dropped" in notes
        assert "layers [0] hold no routing (dense layers)" in notes
        assert "num_experts" not in notes

    def test_padding_after_sequences_is_padding_whatever_its_ids(self, tmp_path, save_pt):
        record, _ = self.record(1, [0, 1], lengths=[2], mode=1, padding=2)
        record["topk_ids_of_layer"][1:, 2:, :2] = [0, 1]
        self.save(save_pt, tmp_path / "x.pt", [record])
        assert trace_of(tmp_path / "x.pt", "sglang-per-token")[0].num_tokens == 2

    def test_dummy_passes_are_dropped(self, tmp_path, save_pt):
        dummy, _ = self.record(1, [0] * 6, lengths=[1] * 6, mode=1)
        dummy["topk_ids_of_layer"][:] = dummy["topk_ids_of_layer"][:, :1]
        real, logical = self.record(2, [0, 1, 2, 3], lengths=[4], mode=1)
        self.save(save_pt, tmp_path / "x.pt", [dummy, real])
        trace, notes = trace_of(tmp_path / "x.pt", "sglang-per-token")
        np.testing.assert_array_equal(trace.expert_ids_TLK, logical)
        assert "1 constant steps (6 tokens: warm-up or graph capture) dropped" in notes
        self.save(save_pt, tmp_path / "x.pt", [dummy])
        with pytest.raises(TraceError, match="all its steps are constant"):
            import_trace(tmp_path / "x.pt")

    def test_ranks_join_their_passes(self, tmp_path, save_pt):
        ranks = {rank: [self.record(n, [n, n], rank=rank, seed=10 * rank + n) for n in (1, 2)] for rank in (0, 1)}
        for rank, plan in ranks.items():
            self.save(save_pt, tmp_path / f"x_{rank}.pt", [record for record, _ in plan])
        trace, notes = trace_of(tmp_path, "sglang-per-token")
        assert phases(trace) == [("decode", 4), ("decode", 4)]
        assert trace.request_id_T.tolist() == [0, 1, 2, 3] * 2
        assert "repeat" not in notes

    def test_ranks_with_the_same_tokens_count_once(self, tmp_path, save_pt):
        for rank in (0, 1):
            self.save(save_pt, tmp_path / f"x_{rank}.pt", [self.record(n, [n], rank=rank)[0] for n in (1, 2)])
        trace, notes = trace_of(tmp_path, "sglang-per-token")
        assert trace.num_tokens == 2
        assert "2 records that repeat another rank's tokens dropped" in notes

    def test_what_does_not_fit_is_refused(self, tmp_path, save_pt):
        record, _ = self.record(1, [0, 1], lengths=[2], mode=1)
        high = record | {"topk_ids_of_layer": record["topk_ids_of_layer"] + np.int32(9)}
        uneven = record | {"topk_ids_of_layer": np.where(np.arange(8) == 1, -1, record["topk_ids_of_layer"])}
        uneven["topk_ids_of_layer"][1, 0, 1] = 3
        for records, words in (
            ([record | {"positions": [0]}], "2 rows of ids for 1 positions"),
            ([record | {"extend_seq_lens": [3]}], "sequences of 3 tokens in 2 rows"),
            ([high], "physical ids span"),
            ([uneven], "fewer than 2 experts"),
            (
                [record | {"topk_ids_of_layer": record["topk_ids_of_layer"][:2]}],
                "2 layers do not fit an expert map of 3",
            ),
            ([record | {"topk_ids_of_layer": record["topk_ids_of_layer"][0]}], "must be integers with 3"),
            ([record, record], "forward pass 1 of rank 0 is here twice"),
            ([record | {"positions": None}], "positions"),
        ):
            self.save(save_pt, tmp_path / "x.pt", records)
            with pytest.raises(TraceError, match=words):
                import_trace(tmp_path / "x.pt")
        self.save(save_pt, tmp_path / "x.pt", [record])
        with pytest.raises(TraceError, match="2 experts, not the top_k 4"):
            import_trace(tmp_path / "x.pt", top_k=4)
        with pytest.raises(TraceError, match="expert ids spans"):
            import_trace(tmp_path / "x.pt", num_experts=2)


def sglang_response(ids, prompt, **more):
    rows = len(ids)
    packed = base64.b64encode(ids.astype("<i4").tobytes()).decode()
    meta = {"prompt_tokens": prompt, "completion_tokens": rows + 1 - prompt, "routed_experts": packed}
    return {"text": "", "meta_info": meta | more}


def npy_base64(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


class TestResponses:
    def test_sglang_flat_int32_with_dense_layers(self, tmp_path):
        ids = routing(7)
        ids[:, 0] = 0
        path = tmp_path / "responses.jsonl"
        records = [sglang_response(ids, 4), sglang_response(routing(3, seed=1) * [[[0]], [[1]], [[1]]], 2)]
        path.write_text("\n".join(map(json.dumps, records)))
        with pytest.raises(TraceError, match="pass top_k"):
            import_trace(path)
        records[1]["meta_info"]["routed_experts"] = sglang_response(
            np.where(np.arange(3)[:, None] == 0, 0, routing(3, seed=1)), 2
        )["meta_info"]["routed_experts"]
        path.write_text("\n".join(map(json.dumps, records)))
        trace, notes = trace_of(path, "responses", top_k=2, num_experts=8)
        np.testing.assert_array_equal(trace.expert_ids_TLK[:7], ids[:, 1:])
        assert phases(trace) == [("prefill", 4)] + [("decode", 1)] * 3 + [("prefill", 2), ("decode", 1)]
        assert trace.request_id_T.tolist() == [0] * 7 + [1] * 3
        assert trace.position_T.tolist() == [*range(7), *range(3)]
        assert "layers [0] hold no routing" in notes

    def test_sglang_prefix_cut_and_choices(self, tmp_path):
        ids = routing(6)
        record = sglang_response(ids[2:], 4, routed_experts_start_len=2, completion_tokens=3)
        packed = record["meta_info"]["routed_experts"]
        (tmp_path / "a.json").write_text(json.dumps(record))
        trace, _ = trace_of(tmp_path / "a.json", "responses", top_k=2)
        assert trace.position_T.tolist() == [2, 3, 4, 5]
        assert phases(trace) == [("prefill", 2), ("decode", 1), ("decode", 1)]
        openai = {"choices": [{"index": 0, "sgl_ext": {"routed_experts": packed}}], "usage": {"prompt_tokens": 4}}
        (tmp_path / "a.json").write_text(json.dumps(openai))
        with pytest.raises(TraceError, match="pass num_layers"):
            import_trace(tmp_path / "a.json", top_k=2)
        trace, _ = trace_of(tmp_path / "a.json", "responses", top_k=2, num_layers=3)
        np.testing.assert_array_equal(trace.expert_ids_TLK, ids[2:])
        (tmp_path / "a.json").write_text(json.dumps(record))
        with pytest.raises(TraceError, match="no whole number of layers for 4 tokens of top-5"):
            import_trace(tmp_path / "a.json", top_k=5)

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
    def test_vllm_npy_header_decides(self, tmp_path, dtype):
        prompt, outputs = routing(4).astype(dtype), [routing(3, seed=1).astype(dtype), routing(2, seed=2).astype(dtype)]
        record = {
            "prompt_routed_experts": prompt.tolist(),
            "choices": [{"index": i, "routed_experts": npy_base64(ids)} for i, ids in enumerate(outputs)],
            "usage": {"prompt_tokens": 4, "completion_tokens": 5},
        }
        (tmp_path / "r.json").write_text(json.dumps([record]))
        trace, _ = trace_of(tmp_path / "r.json", "responses")
        np.testing.assert_array_equal(trace.expert_ids_TLK, np.concatenate([prompt, outputs[0], prompt, outputs[1]]))
        assert phases(trace)[:5] == [("prefill", 4), ("decode", 1), ("decode", 1), ("decode", 1), ("prefill", 4)]

    def test_damage_is_one_sentence(self, tmp_path):
        path = tmp_path / "r.json"
        good = sglang_response(routing(3), 2)
        meta = good["meta_info"]
        for record, words in (
            ({"meta_info": meta | {"routed_experts": "%%%"}}, "damaged"),
            ({"meta_info": meta | {"routed_experts": meta["routed_experts"][:-3]}}, "damaged|no whole number"),
            ({"meta_info": meta | {"routed_experts_dtype": "object"}}, "allowed are int32"),
            ({"meta_info": meta | {"routed_experts": [[[1, 2]], [[1, 2], [3, 4]]]}}, "layers or top-k are mixed"),
            ({"meta_info": meta | {"routed_experts": [[[1, 1.5]]]}}, "must be integers"),
            ({"meta_info": {"prompt_tokens": 2}}, "no response in it has routed_experts"),
            ({"meta_info": []}, "no response"),
            ({"choices": 3}, "a int stands where a list belongs"),
        ):
            path.write_text(json.dumps(record))
            with pytest.raises(TraceError, match=words):
                import_trace(path, top_k=2)


class TestArrays:
    @pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.uint16])
    def test_vllm_output_array(self, tmp_path, dtype):
        ids = routing(5).astype(dtype)
        ids[:, 1] = 0
        np.save(tmp_path / "routed.npy", ids)
        trace, notes = trace_of(tmp_path / "routed.npy", "arrays")
        np.testing.assert_array_equal(trace.expert_ids_TLK, ids[:, [0, 2]])
        assert phases(trace) == [("decode", 1)] * 5
        assert "pass prompt_len" in notes
        assert "layers [1] hold no routing" in notes
        assert phases(import_trace(tmp_path / "routed.npy", prompt_len=3).trace)[0] == ("prefill", 3)

    def test_monolithic_kernels_are_recognised(self, tmp_path):
        np.save(tmp_path / "routed.npy", np.zeros((5, 3, 2), np.int32))
        with pytest.raises(TraceError, match="monolithic MoE kernels do not report them"):
            import_trace(tmp_path / "routed.npy")

    def test_unwritten_rows_are_dropped(self, tmp_path):
        ids = routing(5)
        ids[4] = 0
        np.save(tmp_path / "routed.npy", ids)
        trace, notes = trace_of(tmp_path / "routed.npy", "arrays")
        assert trace.num_tokens == 4
        assert "1 rows without experts (padding, or never written) dropped" in notes

    def test_requests_in_a_folder(self, tmp_path):
        for request, (prompt, rows) in enumerate([(3, 5), (2, 4)]):
            np.savez(
                tmp_path / f"{request}.npz",
                request_id=f"id-{request}",
                prompt_token_ids=np.arange(prompt),
                output_token_ids=np.arange(rows - prompt + request),
                routed_experts=routing(rows, seed=request),
            )
        trace, notes = trace_of(tmp_path, "arrays")
        assert trace.request_id_T.tolist() == [0] * 5 + [1] * 4
        assert phases(trace) == [
            ("prefill", 3),
            ("decode", 1),
            ("decode", 1),
            ("prefill", 2),
            ("decode", 1),
            ("decode", 1),
        ]
        assert "prompt_len" not in notes
        np.savez(tmp_path / "2.npz", prompt_token_ids=[1], output_token_ids=[1], routed_experts=routing(9))
        with pytest.raises(TraceError, match="ids of 9 tokens and a request of 2"):
            import_trace(tmp_path)
        np.save(tmp_path / "2.npy", routing(3, layers=4))
        (tmp_path / "2.npz").unlink()
        with pytest.raises(TraceError, match="import one model at a time"):
            import_trace(tmp_path)

    def test_object_arrays_are_never_unpickled(self, tmp_path):
        np.savez(tmp_path / "x.npz", routed_experts=np.array({"a": 1}, dtype=object))
        with pytest.raises(TraceError, match="damaged"):
            import_trace(tmp_path / "x.npz")


def test_request_archive(tmp_path, monkeypatch):
    ids = routing(9).astype(np.uint8)
    meta = [
        {"dataset": "d", "category": name, "finished": True, "n": 1, "first_pos": 1} for name in ("law", "art", "law")
    ]
    archive = {
        "experts": ids,
        "request_offsets": np.array([0, 4, 4, 9]),
        "prompt_len": np.array([10, 7, 20], np.int32),
        "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8),
    }
    path = tmp_path / "dev.npz"
    np.savez_compressed(path, **archive)
    trace, _ = trace_of(path, "request-archive")
    np.testing.assert_array_equal(trace.expert_ids_TLK, ids)
    assert trace.position_T.tolist() == [10, 11, 12, 13, 20, 21, 22, 23, 24]
    assert trace.request_id_T.tolist() == [0] * 4 + [2] * 5
    assert [trace.domains[domain] for domain in trace.domain_T] == ["law"] * 9
    assert phases(trace) == [("decode", 1)] * 9
    np.savez(path, **archive | {"request_offsets": np.array([0, 4, 4, 8])})
    with pytest.raises(TraceError, match="do not part 9 tokens"):
        import_trace(path)
    monkeypatch.setattr(content, "FREE_BYTES", 0)
    np.savez_compressed(path, **archive | {"padding": np.zeros(10**6, np.uint8)})
    with pytest.raises(TraceError, match="would inflate"):
        import_trace(path)


def test_shared_request_archive_round_trips(tmp_path):
    path = SHARED / "gptoss20b" / "dev.npz"
    if not path.exists():
        pytest.skip("the gpt-oss-20b trace is not on this machine")
    trace, _ = trace_of(path, "request-archive")
    assert (trace.num_tokens, trace.num_layers, trace.num_experts, trace.top_k) == (110603, 24, 32, 4)
    write_trace(trace, tmp_path / "t.parquet")
    np.testing.assert_array_equal(open_trace(tmp_path / "t.parquet").read().expert_ids_TLK, trace.expert_ids_TLK)
    assert (tmp_path / "t.parquet").stat().st_size / trace.num_tokens < 20 * 24 / 8


class TestRouterLogits:
    def logits(self, tokens=6, layers=2, experts=8, seed=0):
        return [
            np.random.default_rng(seed + n).normal(size=(tokens, experts)).astype(np.float32) for n in range(layers)
        ]

    def test_top_k_and_attention_mask(self, tmp_path, save_pt):
        logits = self.logits()
        mask = np.array([[0, 1, 1], [1, 1, 1]], np.int64)
        save_pt({"router_logits": tuple(logits), "attention_mask": mask}, tmp_path / "x.pt")
        trace, notes = trace_of(tmp_path / "x.pt", "router-logits", top_k=3)
        best = np.stack([np.argsort(-layer, axis=1)[:, :3] for layer in logits], axis=1)
        np.testing.assert_array_equal(trace.expert_ids_TLK, best[1:])
        assert trace.request_id_T.tolist() == [0, 0, 1, 1, 1]
        assert trace.position_T.tolist() == [0, 1, 0, 1, 2]
        assert (phases(trace), trace.num_experts) == ([("prefill", 5)], 8)
        assert "1 rows without experts (padding, or never written) dropped" in notes
        with pytest.raises(TraceError, match="need one of 1 to 8"):
            import_trace(tmp_path / "x.pt")

    def test_bare_tuple_and_npz(self, tmp_path, save_pt):
        logits = self.logits()
        save_pt(tuple(logits), tmp_path / "x.pt")
        np.savez(tmp_path / "x.npz", router_logits=np.stack(logits))
        both = [trace_of(tmp_path / name, "router-logits", top_k=2) for name in ("x.pt", "x.npz")]
        np.testing.assert_array_equal(both[0][0].expert_ids_TLK, both[1][0].expert_ids_TLK)
        assert "no attention_mask" in both[0][1]

    def test_switch_pairs_without_dense_layers(self, tmp_path, save_pt):
        logits = self.logits()
        pairs = tuple((layer[None], np.zeros((1, 6), np.int64)) for layer in logits)
        save_pt((None, pairs[0], None, pairs[1]), tmp_path / "x.pt")
        trace, _ = trace_of(tmp_path / "x.pt", "router-logits", top_k=1)
        np.testing.assert_array_equal(trace.expert_ids_TLK[:, :, 0].T, np.argmax(logits, axis=2))

    def test_sigmoid_bias_and_groups(self, tmp_path, save_pt):
        logits = [np.array([[4, -9, 1, 1.5, -9, -9, 3, 3]], np.float32)]
        bias = np.array([[0, 0, 0.9, 0, 0, 0, 0, 0]], np.float32)
        save_pt({"router_logits": logits, "e_score_correction_bias": bias}, tmp_path / "x.pt")
        options = {"top_k": 2, "score": "sigmoid"}
        assert import_trace(tmp_path / "x.pt", **options).trace.expert_ids_TLK.tolist() == [[[2, 0]]]
        flat = import_trace(tmp_path / "x.pt", **options, bias_LE=bias * 0).trace
        assert flat.expert_ids_TLK.tolist() == [[[0, 6]]]
        grouped = import_trace(tmp_path / "x.pt", **options, bias_LE=bias * 0, num_groups=4, top_groups=1).trace
        assert grouped.expert_ids_TLK.tolist() == [[[6, 7]]]
        with pytest.raises(TraceError, match="groups must part the experts evenly"):
            import_trace(tmp_path / "x.pt", **options, num_groups=3)
        with pytest.raises(TraceError, match="bias_LE has shape"):
            import_trace(tmp_path / "x.pt", **options, bias_LE=bias[:, :3])

    def test_unsound_logits(self, tmp_path, save_pt):
        good = self.logits()
        for logits, words in (
            ([good[0], good[1] * np.float32(np.nan)], "logits of layer 1 holds NaN or infinity"),
            ([good[0], good[1][:, :4]], "every layer needs the same"),
            ([good[0], good[1][:3]], "every layer needs the same"),
        ):
            save_pt({"router_logits": logits}, tmp_path / "x.pt")
            with pytest.raises(TraceError, match=words):
                import_trace(tmp_path / "x.pt", top_k=2)
        save_pt({"router_logits": good, "attention_mask": np.ones((2, 2), np.int64)}, tmp_path / "x.pt")
        with pytest.raises(TraceError, match="does not cover the 6 rows"):
            import_trace(tmp_path / "x.pt", top_k=2)

    def test_far_logits_do_not_overflow(self, tmp_path, save_pt):
        save_pt([np.array([[-1000, 1000, 0, -5]], np.float32)], tmp_path / "x.pt")
        for score in ("softmax", "sigmoid"):
            assert import_trace(tmp_path / "x.pt", top_k=2, score=score).trace.expert_ids_TLK.tolist() == [[[1, 2]]]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class TestCacheLab:
    META: ClassVar = {
        "record_type": "metadata",
        "format": "moe-cache-lab.routing-jsonl",
        "format_version": 1,
        "model_id": "tiny",
        "num_experts": 9,
        "experts_per_token": 2,
    }

    def event(self, phase, position, layer, ids):
        return {
            "record_type": "routing_selection",
            "phase": phase,
            "token_position": position,
            "layer": layer,
            "selected_experts": ids.tolist(),
            "selected_probabilities": [0.75, 0.125],
            "token_id": 5,
        }

    def events(self, ids, prompt):
        """Prompt records are layer-major, generated ones token-major."""
        yield from (self.event("prompt", t, 4 + n, ids[t, n]) for n in range(2) for t in range(prompt))
        yield from (self.event("generated", t, 4 + n, ids[t, n]) for t in range(prompt, len(ids)) for n in range(2))

    def test_prompt_and_generated(self, tmp_path):
        ids = routing(5, layers=2)
        path = write_lines(tmp_path / "t.jsonl", [self.META, *self.events(ids, 3), *self.events(ids[::-1], 4)])
        trace, notes = trace_of(path, "moe-cache-lab")
        np.testing.assert_array_equal(trace.expert_ids_TLK, np.concatenate([ids, ids[::-1]]))
        assert phases(trace) == [("prefill", 3), ("decode", 1), ("decode", 1), ("prefill", 4), ("decode", 1)]
        assert trace.request_id_T.tolist() == [0] * 5 + [1] * 5
        assert (trace.num_experts, trace.provenance.model, notes) == (9, "tiny", "")
        assert trace.provenance.source == "imported from t.jsonl (moe-cache-lab)"
        assert trace.gates_TLK[0, 0].tolist() == [0.75, 0.125]

    def test_damage(self, tmp_path):
        events = list(self.events(routing(3, layers=2), 2))
        nan = events[0] | {"selected_probabilities": [float("nan"), 0.1]}
        for records, words in (
            ([self.META | {"format_version": 2}, *events], "allowed is 1"),
            ([self.META, *events[:-1]], "1 of 3 tokens lack some of layers"),
            ([self.META], "0 of 0 tokens"),
            ([self.META, *(event | {"token_position": 2**40} for event in events[-2:])], "position_T spans"),
            ([self.META, nan, *events[1:]], "routing weights holds NaN"),
            ([self.META, events[0] | {"selected_experts": [1]}, *events[1:]], "layers or top-k are mixed"),
            ([self.META, events[0] | {"selected_experts": [1, 9]}, *events[1:]], "allowed is 0 to 8"),
            ([self.META, events[0] | {"selected_experts": [1, 1]}, *events[1:]], "names an expert twice"),
            ([self.META, {"record_type": "routing_selection"}], "layer"),
        ):
            with pytest.raises(TraceError, match=words):
                import_trace(write_lines(tmp_path / "t.jsonl", records))


class TestVllmLog:
    META: ClassVar = {
        "type": "meta",
        "model_id": "q",
        "vllm_version": "0",
        "layers_logged": [0, 5],
        "top_k": 2,
        "num_experts": 8,
    }

    def forward(self, ids, *, by_token=False):
        grid = (
            [(t, n) for t in range(len(ids)) for n in range(2)]
            if by_token
            else [(t, n) for n in range(2) for t in range(len(ids))]
        )
        for t, n in grid:
            route = {
                "type": "route",
                "req_id": "r0",
                "token_idx": t,
                "layer": [0, 5][n],
                "topk_ids": ids[t, n].tolist(),
            }
            yield route | {"topk_weights": [0.5, 0.25]}

    @pytest.mark.parametrize("by_token", [False, True])
    def test_passes_become_steps(self, tmp_path, by_token):
        profile = np.broadcast_to(routing(1, layers=2), (16, 2, 2))
        sizes = [3, 1, 1, 2, 1]
        parts = [routing(size, layers=2, seed=9 + place) for place, size in enumerate(sizes)]
        lines = [line for ids in (profile, *parts) for line in self.forward(ids, by_token=by_token)]
        trace, notes = trace_of(write_lines(tmp_path / "moe_routes.jsonl", [self.META, *lines]), "vllm-log")
        np.testing.assert_array_equal(trace.expert_ids_TLK, np.concatenate(parts))
        assert phases(trace) == [("prefill", 3), ("decode", 1), ("decode", 1), ("prefill", 2), ("decode", 1)]
        assert trace.position_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
        assert len(set(trace.request_id_T[:5])) == len(set(trace.request_id_T[5:])) == 1
        assert "1 constant steps (16 tokens: warm-up or graph capture) dropped" in notes
        assert "requests are not named" in notes
        assert trace.gates_TLK[0, 0].tolist() == [0.5, 0.25]

    def test_damage(self, tmp_path):
        lines = list(self.forward(routing(2, layers=2)))
        for records, words in (
            ([self.META, *lines[:-1]], "1 of 2 tokens lack some of layers"),
            ([self.META, lines[0], lines[1], lines[1]], "token 1 appears twice in layer 0"),
            ([self.META | {"top_k": 4}, *lines], "not the top_k 4"),
            ([self.META], "0 of 0 tokens"),
        ):
            with pytest.raises(TraceError, match=words):
                import_trace(write_lines(tmp_path / "t.jsonl", records))
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, [self.META, *lines]))[:-9])
        with pytest.raises(TraceError, match="damaged"):
            import_trace(tmp_path / "t.jsonl")
