"""The small model, its hold-out and its recorder, at sizes for a CPU.

Shape letters as in the modules under test.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from expertslice.traces.check import check_block
from expertslice.traces.schema import Provenance
from expertslice.traces.store import open_trace

torch = pytest.importorskip("torch")

from expertslice.experiments.own_model import train  # noqa: E402
from expertslice.experiments.own_model.data import Sampler, Split, read_corpus  # noqa: E402
from expertslice.experiments.own_model.model import (  # noqa: E402
    BOS,
    Decoder,
    ModelConfig,
    grouped_product,
    router_losses,
    serving_copy,
)
from expertslice.experiments.own_model.record import HostEvent, Server, record  # noqa: E402
from expertslice.experiments.own_model.schedule import RecordConfig, plan  # noqa: E402

CONFIG = ModelConfig(num_layers=2, num_experts=8, top_k=3, d_model=32, d_ff=24, num_heads=2)
RECORDING = RecordConfig(
    num_slots=4,
    prompt_len=32,
    wave_chunk=16,
    wave_width=2,
    wave_outputs=6,
    server_steps=20,
    server_chunk=8,
    server_width=2,
)
SPLIT = Split(window_bytes=256, every=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Decoder(replace(CONFIG, init_std=0.2))


@pytest.fixture
def corpus():
    rng = np.random.default_rng(0)
    letters = {"digits": b"0123456789", "vowels": b"aeiou ", "rest": b"bcdfgh "}
    return {n: np.frombuffer(c, np.uint8)[rng.integers(len(c), size=6000)] for n, c in letters.items()}


def write_tar(path, texts):
    with tarfile.open(path, "w:xz") as tar:
        for name, text in texts.items():
            info = tarfile.TarInfo(f"{name}.txt")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))


def test_the_corpus_is_read_by_short_name(tmp_path):
    path = tmp_path / "mix.tar.xz"
    write_tar(path, {"b": b"bbb", "a": b"aaa"})
    assert [(n, t.tobytes()) for n, t in read_corpus(path).items()] == [("a", b"aaa"), ("b", b"bbb")]


@pytest.mark.parametrize("num_bytes", [100, 700, 1024, 6000])
def test_training_spans_and_heldout_windows_cover_the_text_once(num_bytes):
    seen_N = np.zeros(num_bytes, int)
    for start, end in SPLIT.train_spans(num_bytes):
        seen_N[start:end] += 1
    for start in SPLIT.heldout_starts(num_bytes):
        seen_N[start : start + SPLIT.window_bytes] += 1
    assert (seen_N == 1).all()


def test_no_training_sequence_touches_heldout_text(corpus):
    length, texts = 50, list(corpus.values())
    sampler = Sampler(corpus, SPLIT, length=length, power=0.5, seed=1)
    for domain, text_N in enumerate(texts):
        held = SPLIT.heldout_starts(len(text_N))
        starts = sampler.starts[domain]
        apart = (starts[:, None] + length <= held) | (starts[:, None] >= held + SPLIT.window_bytes)
        assert apart.all()
        assert len(set(starts)) == len(starts)
        assert starts.max() == len(text_N) - length


def test_chunks_are_heldout_text_after_a_first_token(corpus):
    text_N = corpus["digits"]
    tokens_BC = SPLIT.chunks(text_N, 65)
    assert tokens_BC.shape == (4 * len(SPLIT.heldout_starts(len(text_N))), 65)
    assert (tokens_BC[:, 0] == BOS).all()
    first = SPLIT.heldout_starts(len(text_N))[0]
    np.testing.assert_array_equal(tokens_BC[1, 1:], text_N[first + 64 : first + 128])


def test_routing_is_the_top_k_of_the_logits_in_falling_order(model):
    routing, order_R = model.blocks[0].moe.route(torch.randn(40, CONFIG.d_model))
    ref_TK = routing.logits_TE.sort(descending=True, stable=True).indices[:, : CONFIG.top_k]
    torch.testing.assert_close(routing.ids_TK, ref_TK)
    torch.testing.assert_close(routing.gates_TK.sum(-1), torch.ones(40))
    counts_E = torch.bincount(routing.ids_TK.flatten(), minlength=CONFIG.num_experts)
    torch.testing.assert_close(routing.ends_E.long(), counts_E.cumsum(0))
    assert (routing.ids_TK.flatten()[order_R].diff() >= 0).all()


def test_moe_equals_a_loop_over_tokens_in_output_and_gradient(model):
    moe = model.blocks[0].moe
    x_TD = torch.randn(17, CONFIG.d_model, requires_grad=True)
    y_TD, routing = moe(x_TD)

    h_TD, rows = moe.norm(x_TD), []
    for h_D, ids_K, gates_K in zip(h_TD, routing.ids_TK, routing.gates_TK, strict=True):
        row_D = 0
        for e, gate in zip(ids_K, gates_K, strict=True):
            a_F, b_F = (moe.gate_up[e] @ h_D).chunk(2)
            row_D = row_D + gate * (moe.down[e] @ (torch.nn.functional.silu(a_F) * b_F))
        rows.append(row_D)
    ref_TD = torch.stack(rows)
    torch.testing.assert_close(y_TD, ref_TD, rtol=1e-5, atol=1e-6)
    inputs = [x_TD, moe.gate_up, moe.down, moe.router]
    grads = torch.autograd.grad(y_TD.square().sum(), inputs, retain_graph=True)
    refs = torch.autograd.grad(ref_TD.square().sum(), inputs)
    for grad, ref in zip(grads, refs, strict=True):
        torch.testing.assert_close(grad, ref, rtol=1e-4, atol=1e-5)


def test_balance_loss_is_one_when_even_and_e_over_k_like_when_one_expert_takes_all(model):
    _, routings = model(torch.randint(256, (2, 16)))
    even = [r._replace(logits_TE=torch.zeros_like(r.logits_TE)) for r in routings]
    assert router_losses(even)[0].item() == pytest.approx(len(routings))
    hot = torch.zeros_like(routings[0].logits_TE)
    hot[:, 0] = 50.0
    all_rows = torch.full_like(routings[0].ends_E, routings[0].ids_TK.numel())
    one = routings[0]._replace(logits_TE=hot, ends_E=all_rows)
    assert router_losses([one])[0].item() == pytest.approx(CONFIG.num_experts)


def test_training_lowers_the_loss_and_keeps_balance(model, corpus):
    sampler = Sampler(corpus, SPLIT, length=32, power=0.5, seed=1)
    cfg = train.TrainConfig(steps=60, num_sequences=8, sequence_len=32, warmup_steps=5, peak_lr=3e-3, balance_coef=1e-2)
    trainer = train.Trainer(model, sampler, cfg)
    trainer.train_until(1.0)
    assert trainer.step == 60
    assert trainer.rows[-1]["loss"] < 0.75 * trainer.rows[0]["loss"]
    assert trainer.rows[-1]["balance"] < min(1.2, trainer.rows[0]["balance"])
    for text_N in corpus.values():
        assert train.evaluate(model, SPLIT.chunks(text_N, 33)[:4]) < trainer.rows[0]["loss"]


def test_served_tokens_route_as_in_one_full_forward(model, corpus):
    prompts = [SPLIT.chunks(t, RECORDING.prompt_len) for t in corpus.values()]
    requests, steps = plan(prompts, RECORDING)
    server = Server(model, requests, RECORDING)
    ids = server.run(steps)
    request_T = np.concatenate([s.request_T for s in steps])
    position_T = np.concatenate([s.position_T for s in steps])
    for request in set(request_T):
        rows = np.flatnonzero(request_T == request)
        np.testing.assert_array_equal(position_T[rows], np.arange(len(rows)))
        _, routings = model(server.tokens[request : request + 1, : len(rows)])
        ref_TLK = torch.stack([r.ids_TK for r in routings], 1).to(torch.uint8)
        assert (ids[rows] == ref_TLK).float().mean() > 0.999


def test_sampling_at_low_temperature_is_greedy(model, corpus):
    cfg = replace(RECORDING, temperature=1e-4)
    requests, steps = plan([SPLIT.chunks(t, cfg.prompt_len) for t in corpus.values()], cfg)
    server = Server(model, requests, cfg)
    server.run(steps)
    end = cfg.prompt_len + cfg.wave_outputs
    logits, _ = model(server.tokens[:1, :end])
    ref = logits[0, cfg.prompt_len - 1 :, :256].argmax(-1)
    torch.testing.assert_close(server.tokens[0, cfg.prompt_len : end + 1], ref)


def test_record_holds_both_workloads_in_step_order(model, corpus, monkeypatch):
    # As if a device had waited until each step was in its queue.
    monkeypatch.setattr(HostEvent, "query", lambda event: False)
    prompts = {name: SPLIT.chunks(t, RECORDING.prompt_len) for name, t in corpus.items()}
    trace = record(serving_copy(model), prompts, RECORDING, Provenance(source="test"))
    check_block(trace)
    assert trace.expert_ids_TLK.shape == (trace.num_tokens, CONFIG.num_layers, CONFIG.top_k)
    assert (np.diff(trace.step_T) >= 0).all()
    assert trace.step_T[-1] == trace.num_steps - 1
    table = trace.step_table
    assert table.moe_ns_SL.shape == table.other_ns_SL.shape == (trace.num_steps, CONFIG.num_layers)
    assert (table.moe_ns_SL > 0).all()
    assert table.start_ns_S[0] == 0
    assert (np.diff(table.start_ns_S) >= (table.moe_ns_SL + table.other_ns_SL).sum(axis=1)[:-1]).all()
    phases = [set(trace.phase_T[trace.step_T == s]) for s in range(trace.num_steps)]
    assert phases[:4] == [{0}] * 4
    assert phases[4 : 4 + RECORDING.wave_outputs] == [{1}] * RECORDING.wave_outputs
    assert {0, 1} in phases[4 + RECORDING.wave_outputs :]
    wave = trace.request_id_T < RECORDING.num_slots
    np.testing.assert_array_equal(trace.domain_T[wave], trace.request_id_T[wave] % 3)
    pairs = np.stack([trace.request_id_T, trace.position_T])
    assert np.unique(pairs, axis=1).shape[1] == trace.num_tokens


@pytest.mark.slow
def test_the_entry_writes_three_recordings_and_a_report_without_text(tmp_path, corpus):
    out, texts = tmp_path / "out", {name: np.tile(corpus[name], 40) for name in sorted(corpus)}
    cfg = train.TrainConfig(steps=20, num_sequences=8, sequence_len=128, eval_sequences=2)
    train.run(texts, out, CONFIG, cfg, RECORDING, commit="unknown")
    report = json.loads((out / f"{train.NAME}.training.json").read_text())
    stored = open_trace(out / f"{train.NAME}.parquet")
    assert stored.segments == tuple(report["checkpoints"]) == train.SEGMENTS
    assert stored.domains == tuple(sorted(corpus))
    assert not {"tokens", "token_ids", "text"} & set(pq.read_schema(out / f"{train.NAME}.parquet").names)
    for name, at in report["checkpoints"].items():
        assert stored.select(segment=name).num_tokens == at["recorded_tokens"]
    trace = stored.read()
    pairs = np.stack([trace.request_id_T, trace.position_T])
    assert np.unique(pairs, axis=1).shape[1] == trace.num_tokens
    assert [at["step"] for at in report["checkpoints"].values()] == [10, 10, 20]
    assert report["curve"][-1]["step"] == 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the grouped product needs a GPU")
def test_grouped_product_on_a_gpu_matches_a_loop_in_output_and_gradient():
    torch.manual_seed(0)
    counts_E = torch.tensor([0, 700, 13, 1, 2048, 250, 0, 999])
    ends_E = counts_E.cumsum(0).int()
    x_RD = torch.randn(int(ends_E[-1]), 768, dtype=torch.bfloat16)
    w_EFD = torch.randn(8, 1024, 768) * 0.05
    seed_RF = torch.randn(len(x_RD), 1024)
    ref = gradients(x_RD.double(), w_EFD.bfloat16().double(), ends_E, seed_RF.double())
    out = gradients(x_RD.cuda(), w_EFD.cuda(), ends_E.cuda(), seed_RF.bfloat16().cuda())
    for ref_tensor, tensor in zip(ref, out, strict=True):
        error = (tensor.double().cpu() - ref_tensor).norm() / ref_tensor.norm()
        assert error < 1e-2


def gradients(x_RD, w_EFD, ends_E, seed_RF):
    """Give a grouped product with its gradients for input and weights."""
    x_RD, w_EFD = x_RD.requires_grad_(), w_EFD.requires_grad_()
    y_RF = grouped_product(x_RD, w_EFD, ends_E)
    return (y_RF, *torch.autograd.grad(y_RF, (x_RD, w_EFD), seed_RF))


@pytest.mark.slow
def test_the_library_is_recorded_with_manifests(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    import sys
    import tarfile

    from expertslice.experiments import record_library

    text = tmp_path / "a.txt"
    text.write_bytes(bytes(np.random.default_rng(0).integers(32, 127, 600_000, dtype=np.uint8)))
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        for name in ("a.txt", "b.txt"):
            archive.add(text, name)
    monkeypatch.setattr(record_library, "RANDOM", {"olmoe-1b-7b": 1})
    command = ["x", "--corpus", tmp_path / "c.tar", "--out", tmp_path / "out", "--small"]
    monkeypatch.setattr(sys, "argv", [str(one) for one in command])
    record_library.main()
    names = sorted(path.stem for path in (tmp_path / "out").glob("*.parquet"))
    assert names == ["olmoe-1b-7b-random", "ours-batch2", "ours-batch4", "ours-training"]
    for name in names:
        facts = json.loads((tmp_path / "out" / f"{name}.manifest.json").read_text())
        trace = open_trace(tmp_path / "out" / f"{name}.parquet")
        assert (facts["num_tokens"], facts["num_steps"]) == (trace.num_tokens, trace.num_steps)
        assert facts["what"]
    assert "random weights" in open_trace(tmp_path / "out" / "olmoe-1b-7b-random.parquet").provenance.model
    training = open_trace(tmp_path / "out" / "ours-training.parquet")
    assert training.segments == ("step 0", "step 10")
    assert training.domains == ("a", "b")
