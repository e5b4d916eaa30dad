"""The recorder on tiny Hugging Face models and our own layers: what it records, and what it survives."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from expertslice.kernels.spec import RouterSpec
from expertslice.runtime.experts import LayerRunner
from expertslice.runtime.hf import experts_of, sliced
from expertslice.runtime.moe import MoeLayer
from expertslice.runtime.recorder import Recorder
from expertslice.runtime.ring import IdRing
from expertslice.runtime.rows import PassRows
from expertslice.traces.append import recover
from expertslice.traces.check import TraceError
from expertslice.traces.models import load_model
from expertslice.traces.schema import MoeSpec
from expertslice.traces.store import open_trace

SPEC = MoeSpec(name="own", num_layers=3, num_experts=8, top_k=2, d_model=16, d_ff=(8,), dtype="fp32")


class Own(nn.Module):
    """Layers of ours one after another."""

    def __init__(self, spec=SPEC, **options):
        super().__init__()
        torch.manual_seed(0)
        runner = LayerRunner("reference")
        self.layers = nn.ModuleList(
            MoeLayer(spec, layer=layer, runner=runner, **options) for layer in range(spec.num_layers)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def logits_of(model):
    """Keep what a model's routers say, layer by layer, pass by pass."""
    kept = []
    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            module.register_forward_hook(lambda _m, _a, out: kept.append(out[0].float()))
    return kept


def chosen(logits_TE, model, layer):
    """Return the experts by falling score that a model's config says these logits choose, tokens in order."""
    config, top_k = model.config, model.config.num_experts_per_tok
    if config.model_type != "deepseek_v3":
        return logits_TE.topk(top_k).indices
    gate = model.model.layers[layer + config.first_k_dense_replace].mlp.gate
    scores_TE = logits_TE.sigmoid()
    groups_TGE = (scores_TE + gate.e_score_correction_bias).unflatten(1, (config.n_group, -1))
    best_TG = groups_TGE.topk(2).values.sum(2).topk(config.topk_group).indices
    allowed = torch.zeros(groups_TGE.shape[:2], dtype=torch.bool).scatter_(1, best_TG, True)
    ids_TK = groups_TGE.masked_fill(~allowed[..., None], -torch.inf).flatten(1).topk(top_k).indices
    order_TK = scores_TE.gather(1, ids_TK).argsort(descending=True)
    return ids_TK.gather(1, order_TK)


def read(path):
    return open_trace(path).read()


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "Olmoe", "DeepseekV3", "GptOss"])
def test_what_is_recorded_is_what_the_routers_logits_choose(tiny_model, tmp_path, family):
    model = tiny_model(family)
    logits = logits_of(model)
    prompts = torch.randint(0, 40, (3, 6))
    mask = torch.ones_like(prompts)
    mask[1, :2] = 0
    with Recorder(tmp_path / "t.parquet", times=True) as recorder:
        recorder.attach(model)
        model.generate(
            prompts, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
        )
    trace = read(tmp_path / "t.parquet")
    num_layers = trace.num_layers
    assert trace.num_steps == 4
    assert [step.phase for step in trace.steps()] == ["prefill", "decode", "decode", "decode"]
    assert trace.request_id_T.tolist() == [0] * 6 + [1] * 4 + [2] * 6 + [0, 1, 2] * 3
    assert trace.position_T.tolist()[6:10] == [0, 1, 2, 3]
    assert trace.position_T.tolist()[16:] == [6, 4, 6, 7, 5, 7, 8, 6, 8]
    keep = mask.flatten().bool()
    for step in range(4):
        for layer in range(num_layers):
            ids_TK = chosen(logits[step * num_layers + layer], model, layer)
            ids_TK = ids_TK[keep] if step == 0 else ids_TK
            assert np.array_equal(trace.expert_ids_TLK[trace.step_T == step][:, layer], ids_TK.numpy())
    assert (trace.step_table.moe_ns_SL > 0).all()
    assert (trace.step_table.other_ns_SL > 0).all()
    spec = load_model(str(tmp_path / "t.config.json"))
    assert (spec.num_layers, spec.num_experts, spec.top_k) == (num_layers, trace.num_experts, trace.top_k)


def test_what_others_put_in_a_layers_place_stays_there(tiny_model, tmp_path):
    model, seen = tiny_model("Olmoe"), []
    first, *others = experts_of(model)
    own = first.forward

    def wrapped(*args, **kwargs):
        seen.append(len(args[0]))
        return own(*args, **kwargs)

    first.forward = wrapped
    with Recorder(tmp_path / "t.parquet") as recorder:
        recorder.attach(model)
        model(torch.randint(0, 40, (1, 7)))
    assert first.forward is wrapped
    assert all("forward" not in vars(module) for module in others)
    model(torch.randint(0, 40, (1, 3)))
    assert seen == [7, 3]
    assert read(tmp_path / "t.parquet").num_tokens == 7


def test_the_same_trace_comes_out_of_eager_and_out_of_our_experts(tiny_model, tmp_path):
    model, prompts = tiny_model("Qwen3Moe"), torch.randint(0, 40, (2, 5))
    for name in ("eager", "ours"):
        with Recorder(tmp_path / f"{name}.parquet") as recorder:
            recorder.attach(model)
            if name == "ours":
                with sliced(model, how="reference"):
                    model(prompts)
            else:
                model(prompts)
    eager, ours = read(tmp_path / "eager.parquet"), read(tmp_path / "ours.parquet")
    assert np.array_equal(eager.expert_ids_TLK, ours.expert_ids_TLK)


@pytest.mark.parametrize("bias", [False, True])
def test_our_own_layers_are_recorded_with_the_rows_given(tmp_path, bias):
    router = RouterSpec(num_experts=8, top_k=2, score="sigmoid", num_groups=2, top_groups=1)
    model, kept = Own(router=router, choosing_bias=bias), []
    if bias:
        model.layers[0].bias_E.copy_(torch.linspace(0, 1, 8))
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda m, a: kept.append((m, m.logits(a[0]))))
    with Recorder(tmp_path / "t.parquet", name="mine") as recorder:
        recorder.attach(model)
        rows = PassRows.of_one_request(7, 5)
        recorder.describe(replace(rows, phase_T=np.array([0, 0, 1, 1, 1], np.uint8)))
        recorder.domain, recorder.segment = "code", "early"
        model(torch.randn(5, 16))
        recorder.domain, recorder.segment = None, "late"
        model(torch.randn(1, 16))
    trace = read(tmp_path / "t.parquet")
    assert trace.request_id_T.tolist() == [7] * 5 + [0]
    assert [step.phase for step in trace.steps()] == ["mixed", "prefill"]
    assert (trace.domains, trace.step_table.segments) == (("code",), ("early", "late"))
    assert trace.domain_T.tolist() == [0] * 5 + [-1]
    assert "each pass stands as one request" in trace.provenance.notes
    from expertslice.kernels import reference

    for layer, (module, logits_TE) in enumerate(kept[:3]):
        ids_TK, _ = reference.route(logits_TE, router, bias_E=module.bias_E)
        assert np.array_equal(trace.expert_ids_TLK[:5, layer], ids_TK.numpy())
    assert load_model(str(tmp_path / "t.config.json")).d_model == 16
    assert all(layer.on_ids is None for layer in model.layers)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=12), num_rows=st.integers(14, 20))
def test_the_ring_gives_back_what_was_put_in_whatever_the_sizes(sizes, num_rows):
    ring, expected, got = IdRing(2, 3, num_rows=num_rows, device=torch.device("cpu")), [], []
    generator, pending = torch.Generator().manual_seed(0), 0
    for size in sizes:
        if pending + size > num_rows:
            got.append(ring.fetch(pending))
            pending = 0
        ids_TLK = torch.randint(0, 99, (size, 2, 3), generator=generator)
        ring.put(ids_TLK)
        expected.append(ids_TLK.numpy())
        pending += size
    got.append(ring.fetch(pending))
    assert np.array_equal(np.concatenate(got), np.concatenate(expected))


def test_replays_are_recorded_without_hooks(tmp_path):
    """What a replayed graph does on a device: its tensor operations run again, and no hook fires."""
    model = Own()
    with Recorder(tmp_path / "t.parquet", ring_rows=16) as recorder:
        recorder.attach(model)
        model(torch.randn(4, 16))
        expected = []
        for request in range(9):
            ids_TLK = torch.rand(4, 3, 8).topk(2).indices
            ids_TLK[3] = -1
            recorder._ring.put(ids_TLK)
            expected.append(ids_TLK[:3].numpy())
            recorder.replayed(replace(PassRows.of_one_request(request, 4), keep_T=np.array([1, 1, 1, 0], bool)))
    trace = read(tmp_path / "t.parquet")
    assert np.array_equal(trace.expert_ids_TLK[4:], np.concatenate(expected))
    assert trace.num_steps == 10


KILLED = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from test_recorder import Own
from expertslice.runtime.recorder import Recorder
model = Own()
with Recorder(sys.argv[2], flush_s=0.05) as recorder:
    recorder.attach(model)
    for step in range(10**6):
        model(torch.randn(4, 16))
        print(step, recorder._appender._parts, flush=True)
"""


def test_kill_9_costs_at_most_what_was_not_flushed(tmp_path):
    path, least = tmp_path / "t.parquet", 0
    command = [sys.executable, "-c", KILLED, os.path.dirname(__file__), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            step, parts = map(int, line.split())
            least = step if parts < 2 else least
            if parts >= 3:
                break
        run.send_signal(signal.SIGKILL)
    kept = open_trace(path)
    # The third flush began when the second was done, which the pass after `least` saw first.
    assert kept.num_steps > least + 1
    assert "partial" in kept.provenance.notes
    recover(path)
    assert read(path).num_steps == kept.num_steps


def test_a_run_that_breaks_off_keeps_a_trace_that_says_so(tmp_path):
    model = Own()

    def run():
        with Recorder(tmp_path / "t.parquet") as recorder:
            recorder.attach(model)
            model(torch.randn(4, 16))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    trace = read(tmp_path / "t.parquet")
    assert trace.num_steps == 1
    assert "partial: the run broke off (ZeroDivisionError)" in trace.provenance.notes


def test_a_full_disk_stops_the_recording_and_not_the_model(tmp_path, monkeypatch):
    from expertslice.traces import append

    def full(*_):
        raise TraceError("cannot write t.parquet: No space left on device; free space there or choose another folder")

    model, path = Own(), tmp_path / "t.parquet"
    recorder = Recorder(path, flush_s=0)
    recorder.attach(model)
    model(torch.randn(4, 16))
    recorder.flush()
    assert open_trace(path).num_steps == 1
    with monkeypatch.context() as patch:
        patch.setattr(append, "write_blocks", full)
        model(torch.randn(4, 16))
        with pytest.warns(UserWarning, match="recording stopped after 2 steps: cannot write"):
            recorder.flush()
        assert model(torch.randn(4, 16)).shape == (4, 16)
        with pytest.raises(TraceError, match=r"recording stopped: .*No space left.*; .*parquet.parts keeps the rest"):
            recorder.close()
    assert open_trace(path).num_steps == 1


def test_a_disk_that_fills_while_the_last_passes_are_written_loses_none_of_those_before(tmp_path, monkeypatch):
    from expertslice.traces import append

    def full(*_):
        raise OSError(28, "No space left on device")

    model, path = Own(), tmp_path / "t.parquet"
    recorder = Recorder(path)
    recorder.attach(model)
    model(torch.randn(4, 16))
    recorder.flush()
    model(torch.randn(4, 16))
    monkeypatch.setattr(append, "check_trace", full)
    with pytest.raises(TraceError, match=r"recording stopped: .*No space left on device.*; .*t.parquet keeps the rest"):
        recorder.close()
    assert open_trace(path).num_steps == 1
    assert "partial" in read(path).provenance.notes


class Changing(nn.Module):
    """Experts that are called otherwise from the second pass on: the first layer, or another."""

    def __init__(self, layer):
        super().__init__()
        self.layers = nn.ModuleList([TinyExperts() for _ in range(2)])
        self.layer, self.passes = layer, 0

    def forward(self, x_TD):
        self.passes += 1
        ids_TK = torch.zeros(len(x_TD), 1, dtype=torch.long)
        for layer, experts in enumerate(self.layers):
            x_TD = experts(x_TD, *((ids_TK,) if self.passes > 1 and layer == self.layer else (ids_TK, ids_TK * 1.0)))
        return x_TD


class TinyExperts(nn.Module):
    num_experts = 4

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x_TD, ids_TK, weights_TK=None):
        return x_TD


@pytest.mark.parametrize("layer", [0, 1])
def test_a_model_that_changes_how_it_calls_its_experts_stops_the_recording_and_not_the_model(tmp_path, layer):
    model = Changing(layer)
    recorder = Recorder(tmp_path / "t.parquet")
    recorder.attach(model)
    model(torch.randn(4, 16))
    recorder.flush()

    def go_on():
        model(torch.randn(4, 16))
        recorder.flush()

    with pytest.warns(UserWarning, match=r"recording stopped after 1 steps: TinyExperts is not called with expert ids"):
        go_on()
    assert model(torch.randn(4, 16)).shape == (4, 16)
    with pytest.raises(TraceError, match="recording stopped"):
        recorder.close()
    assert open_trace(tmp_path / "t.parquet").num_steps == 1


def test_two_recorders_two_models_and_models_without_experts_are_refused(tmp_path):
    path = tmp_path / "t.parquet"
    with Recorder(path) as recorder:
        with pytest.raises(TraceError, match="another recorder is at work"):
            Recorder(path)
        with pytest.raises(ValueError, match="Linear has no experts"):
            recorder.attach(nn.Linear(2, 2))
        recorder.attach(Own())
        with pytest.raises(ValueError, match="takes one model"):
            recorder.attach(Own())


def test_memory_is_bounded_by_the_ring(tmp_path):
    model = Own()
    with Recorder(tmp_path / "t.parquet", ring_rows=32) as recorder:
        recorder.attach(model)
        for _ in range(40):
            model(torch.randn(4, 16))
            assert recorder._pending <= 16
            assert len(recorder._passes) <= 4
    assert read(tmp_path / "t.parquet").num_tokens == 160


def test_a_layer_that_does_not_run_stops_the_recording(tmp_path):
    model = Own()
    recorder = Recorder(tmp_path / "t.parquet")
    recorder.attach(model)
    model.layers[2].forward = lambda x: x
    with pytest.warns(UserWarning, match="recording stopped"):
        model(torch.randn(4, 16))
    with pytest.raises(TraceError, match=r"layers \[2\] did not run"):
        recorder.close()
