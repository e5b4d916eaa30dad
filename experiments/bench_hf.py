"""Hugging Face's own experts on our weights: random ones, used in place; torch and transformers inside functions alone.

The class is Qwen3-MoE's, whose weights lie as ours do; the other families of SwiGLU experts run the same code. Routing
is that block's, from logits on: softmax in float32, top-k, weights in the dtype of the tokens.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..traces.schema import MoeSpec
from .bench_arms import Batch

if TYPE_CHECKING:
    import torch

GATHERED_SHARE = 0.2
"""Of free memory that gathered weights may take: checking, warming up and both graphs of a capture each hold them."""


class AbsentError(Exception):
    """An arm has no such layer, or is not there; the message is one sentence."""


def hugging_face(batch: Batch, implementation: str) -> "Callable[[int], torch.Tensor]":
    """Return the call that runs the experts under an implementation on one weight set.

    Raises:
        AbsentError: transformers is missing, it has no such experts, or memory cannot hold what it gathers.
    """
    import torch

    spec = batch.spec
    if spec.kind != "swiglu":
        raise AbsentError(f"the experts compared are SwiGLU ones; Hugging Face has none of kind {spec.kind} like ours")
    if implementation == "batched_mm":
        _check_gathered(batch)
    experts = _experts(spec, implementation)
    experts_P = [copy.deepcopy(experts) for _ in batch.sets]
    for held, weights in zip(experts_P, batch.sets, strict=True):
        for name, product in zip(("gate_up_proj", "down_proj"), weights.products, strict=True):
            setattr(held, name, torch.nn.Parameter(product.weight, requires_grad=False))

    @torch.no_grad()
    def step(p: int) -> "torch.Tensor":
        weights_TE = torch.softmax(batch.logits_PTE[p].float(), dim=-1)
        weights_TK, ids_TK = torch.topk(weights_TE, spec.top_k, dim=-1)
        if spec.renormalise:
            weights_TK /= weights_TK.sum(dim=-1, keepdim=True)
        return experts_P[p](batch.x_TD, ids_TK, weights_TK.to(batch.x_TD.dtype))

    return step


def _experts(spec: MoeSpec, implementation: str) -> Any:
    """Return the experts of a model of one layer, without memory for weights."""
    import torch

    try:
        from transformers import Qwen3MoeConfig, Qwen3MoeModel
    except ImportError:
        raise AbsentError("transformers is not installed; install expertslice[hf]") from None
    config = Qwen3MoeConfig(
        vocab_size=8,
        hidden_size=spec.d_model,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=spec.num_experts,
        num_experts_per_tok=spec.top_k,
        moe_intermediate_size=spec.d_ff_of(0),
        norm_topk_prob=spec.renormalise,
    )
    with torch.device("meta"):
        model = Qwen3MoeModel(config)
    model.set_experts_implementation(implementation)
    return model.layers[0].mlp.experts


def _check_gathered(batch: Batch) -> None:
    import torch

    needed = len(batch.x_TD) * batch.spec.top_k * batch.spec.expert_bytes()
    free, _ = torch.cuda.mem_get_info()
    if needed > free * GATHERED_SHARE:
        raise AbsentError(
            f"batched_mm copies an expert for every row, {needed / 1e9:.1f} GB; {GATHERED_SHARE:.0%} of the "
            f"free {free / 1e9:.1f} GB is its limit"
        )
