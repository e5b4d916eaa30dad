"""Models on a GPU: the hook against eager, plans that keep every bit, and recording in eager and in replayed graphs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from expertslice.policies.registry import make_policy
from expertslice.runtime.experts import LayerRunner
from expertslice.runtime.hf import sliced
from expertslice.runtime.moe import MoeLayer
from expertslice.runtime.recorder import Recorder
from expertslice.runtime.rows import PassRows
from expertslice.traces.schema import MoeSpec
from expertslice.traces.store import open_trace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SPEC = MoeSpec(name="own", num_layers=3, num_experts=8, top_k=2, d_model=64, d_ff=(64,), dtype="bf16")
WIDE = {"hidden_size": 64, "num_hidden_layers": 2}


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        runner = LayerRunner()
        self.layers = nn.ModuleList(MoeLayer(SPEC, layer=i, runner=runner, device="cuda") for i in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def tokens(batch=4, length=9):
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(1)).cuda()


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "Olmoe", "DeepseekV3", "GptOss"])
def test_experts_of_every_family_are_those_of_eager_on_a_gpu(tiny_model, family):
    model = tiny_model(family, torch.bfloat16, **(WIDE if family != "DeepseekV3" else {"hidden_size": 64})).cuda()
    eager = model(tokens()).logits
    with sliced(model):
        ours = model(tokens()).logits
    with sliced(model, how="reference"):
        plain = model(tokens()).logits
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    torch.testing.assert_close(ours, eager, rtol=5e-2, atol=5e-2 * float(eager.abs().max()))


@pytest.mark.parametrize("policy", ["static", "hot_cold", "proportional", "dynamic"])
def test_a_policy_drives_generation_with_the_same_bits_on_a_gpu(tiny_model, policy):
    model, records = tiny_model("Qwen3Moe", torch.bfloat16, **WIDE).cuda(), []
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    mask = torch.ones_like(tokens())
    with sliced(model):
        plain = model.generate(tokens(), attention_mask=mask, **options)
    with sliced(model, make_policy(policy), on_record=records.append) as runner:
        driven = model.generate(tokens(), attention_mask=mask, **options)
    assert runner.steering.policy_errors == 0
    assert torch.equal(driven.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(driven.logits, plain.logits, strict=True))
    assert [record.step for record in records] == list(range(12))
    assert all(record.flops > 0 and record.end_ns > record.start_ns for record in records)
    assert all((record.busy_ns_LS >= 0).all() and record.busy_ns_LS.sum() > 0 for record in records)


def test_replayed_graphs_are_recorded_as_eager_passes_are(tmp_path):
    model, batches = Own(), [torch.randn(16, 64, device="cuda").bfloat16() for _ in range(20)]
    with Recorder(tmp_path / "eager.parquet") as recorder:
        recorder.attach(model)
        for x in batches:
            model(x)
    held = batches[0].clone()
    with Recorder(tmp_path / "graph.parquet", ring_rows=64) as recorder:
        recorder.attach(model)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(held)
        for request, x in enumerate(batches):
            held.copy_(x)
            graph.replay()
            recorder.replayed(replace(PassRows.of_one_request(request, 16), phase_T=np.ones(16, np.uint8)))
    eager, graphed = (open_trace(tmp_path / f"{name}.parquet").read() for name in ("eager", "graph"))
    assert graphed.num_steps == 21
    assert np.array_equal(graphed.expert_ids_TLK[16:], eager.expert_ids_TLK)


def test_the_same_trace_comes_out_of_eager_and_the_hook_on_a_gpu(tiny_model, tmp_path):
    model = tiny_model("Olmoe", torch.bfloat16, **WIDE, num_experts_per_tok=4).cuda()
    with Recorder(tmp_path / "eager.parquet", times=True) as recorder:
        recorder.attach(model)
        model(tokens())
    with Recorder(tmp_path / "ours.parquet") as recorder, sliced(model, how="reference"):
        recorder.attach(model)
        model(tokens())
    eager, ours = (open_trace(tmp_path / f"{name}.parquet").read() for name in ("eager", "ours"))
    # The first layer's router sees the same activations whatever computes the experts.
    assert np.array_equal(eager.expert_ids_TLK[:, 0], ours.expert_ids_TLK[:, 0])
    assert (eager.step_table.moe_ns_SL > 0).all()
