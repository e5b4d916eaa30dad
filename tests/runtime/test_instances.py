"""Workers that really exchange activations: the bits of one process, and what a dead worker leaves."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from expertslice.kernels import reference
from expertslice.kernels.spec import RouterSpec
from expertslice.runtime.instances import Instance, InstanceLayers, WorkerError, layer_weights
from expertslice.traces.schema import MoeSpec

SPEC = MoeSpec(name="tiny", num_layers=2, num_experts=8, top_k=3, d_model=16, d_ff=(24,), dtype="bf16")


def batch(num_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, 16, generator=generator).bfloat16()
    return x_TD, *reference.route(torch.randn(num_tokens, 8, generator=generator), RouterSpec.of(SPEC))


def test_rows_through_two_workers_have_the_bits_of_one_process_and_a_dead_worker_is_told():
    weights = layer_weights(SPEC, 2, "cpu", seed=5)
    with InstanceLayers(SPEC, [Instance()] * 3, max_tokens=12, seed=5, how="reference") as layers:
        assert len({process.pid for process, _, _ in layers._workers} | {os.getpid()}) == 3
        owners = [torch.arange(8) % 3, torch.full((8,), 2), torch.zeros(8, dtype=torch.int64)]
        moved = 0
        for seed, owner_E in enumerate(owners):
            for num_tokens in (12, 1):
                x_TD, ids_TK, weights_TK = batch(num_tokens, seed)
                out_TD = layers.run(seed % 2, x_TD, ids_TK, weights_TK, owner_E)
                assert torch.equal(out_TD, reference.experts(x_TD, ids_TK, weights_TK, weights[seed % 2]))
                moved += 2 * 2 * 16 * int((owner_E[ids_TK.long()] > 0).sum())
        assert layers.bytes_moved == moved
        with pytest.raises(ValueError, match="batch of 13 tokens; the instances hold 12"):
            layers.run(0, *batch(13, 0), owners[0])
        layers._workers[0][1].send((7, 1))
        with pytest.raises(WorkerError, match=r"the worker of instance 1 failed \(IndexError.*see whether"):
            layers._answer(1)
        os.kill(layers._workers[1][0].pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="the worker of instance 2 died with exit code -9; start again"):
            layers.run(0, *batch(2, 0), owners[1])
        names = [rows.memory.name for _, _, rows in layers._workers]
    assert not [name for name in names if os.path.exists(f"/dev/shm/{name}")]


@pytest.mark.slow
def test_a_worker_that_cannot_start_is_told():
    with pytest.raises(WorkerError, match="the worker of instance 1 died with exit code 1"):
        InstanceLayers(replace(SPEC, num_layers=1), [Instance(), Instance(device="nowhere")], max_tokens=2)
