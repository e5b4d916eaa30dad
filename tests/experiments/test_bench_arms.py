"""The arms of benchmarks, as far as they need no device."""

from types import SimpleNamespace

import pytest

from expertslice.experiments import account
from expertslice.experiments.bench_arms import describe, draw_logits, num_sets, torch_grouped
from expertslice.experiments.tune import candidates
from expertslice.traces.schema import MoeSpec


@pytest.mark.parametrize("kind", ["swiglu", "relu3", "gelu2"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_the_control_computes_the_layer(kind, renormalise):
    from expertslice.kernels import reference
    from expertslice.kernels.spec import RouterSpec
    from expertslice.kernels.weights import random_weights

    spec = MoeSpec(
        name="t", num_layers=1, num_experts=8, top_k=2, d_model=64, d_ff=(32,), kind=kind, renormalise=renormalise
    )
    weights, logits_TE = random_weights(spec, "cpu"), draw_logits(spec, 33, 1, "zipf", 3, "cpu")[0]
    x_TD = draw_logits(spec, 33, 8, "uniform", 4, "cpu").movedim(0, 1).flatten(1).bfloat16()
    expected = reference.layer(x_TD, logits_TE, weights, RouterSpec.of(spec)).float()
    assert (torch_grouped(x_TD, logits_TE, weights).float() - expected).norm() < 1e-2 * expected.norm()


def test_zipf_logits_are_skewed_and_uniform_ones_are_not():
    spec = MoeSpec(name="t", num_layers=1, num_experts=16, top_k=2, d_model=8, d_ff=(8,))
    shares = {}
    for skew in ("uniform", "zipf"):
        ids = draw_logits(spec, 2000, 1, skew, 0, "cpu")[0].topk(2).indices
        shares[skew] = ids.flatten().bincount(minlength=16).max().item() / ids.numel()
    assert shares["uniform"] < 0.08
    assert shares["zipf"] > 0.2


def test_loads_cover_the_table_and_weights_are_cold(monkeypatch):
    torch = pytest.importorskip("torch")
    held = SimpleNamespace(L2_cache_size=50 * 2**20, total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: held)
    rows = account.loads()
    assert len(set(rows)) == len(rows) == 6 * 10 + 12
    for row in rows:
        spec = row.spec
        touched = num_sets(spec, row.tokens) * min(spec.num_experts, row.tokens * spec.top_k) * spec.expert_bytes()
        assert touched >= 4 * held.L2_cache_size
        launches = candidates(spec, row.tokens, 132)
        assert len({describe(launch) for launch in launches}) == len(launches) > 3
