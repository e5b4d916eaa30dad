"""A decoder-only MoE language model over bytes: every layer routes, experts are SwiGLU.

Activations flow flattened, [T, D], so that a training batch and a serving step of any mix of prompts
and single tokens run the same layers; only attention knows which rows belong together. Weights are
fp32 masters cast to the activation dtype where they are used; the router computes in fp32.

Shape letters: B sequences, C positions, T = B*C tokens, R = T*K routed rows, E experts, K top-k,
L layers, D model, F expert width, H heads, W head width, V vocabulary.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from ...traces.schema import MoeSpec

BOS = 256
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of the model; the vocabulary is 256 bytes, BOS, and padding to a multiple of 8."""

    num_layers: int = 8
    num_experts: int = 32
    top_k: int = 4
    d_model: int = 768
    d_ff: int = 1024
    num_heads: int = 12
    vocab_size: int = 264
    rope_theta: float = 10_000.0
    init_std: float = 0.02

    @property
    def out_std(self) -> float:
        return self.init_std / (2 * self.num_layers) ** 0.5


class Routing(NamedTuple):
    """What one MoE layer decided."""

    ids_TK: Tensor  # int64, in falling weight order
    gates_TK: Tensor  # fp32, renormalised over the chosen k
    logits_TE: Tensor  # fp32
    ends_E: Tensor  # int32, running count of rows up to and with each expert


def grouped_product(x_RD: Tensor, w_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply each expert's rows by the transpose of its weight; on a CPU, one expert at a time."""
    w_EFD = w_EFD.to(x_RD.dtype)
    if x_RD.is_cuda:
        return fn.grouped_mm(x_RD, w_EFD.transpose(-2, -1), offs=ends_E)
    ends = ends_E.tolist()
    return torch.cat([fn.linear(x_RD[a:b], w_FD) for a, b, w_FD in zip([0, *ends], ends, w_EFD, strict=False)])


def rotate(x_THW: Tensor, turn_2TW: Tensor) -> Tensor:
    """Apply rotary position embedding; cosines and sines cover half of the head width."""
    a_THW, b_THW = x_THW.float().chunk(2, -1)
    cos_T1W, sin_T1W = turn_2TW[:, :, None]
    turned = (a_THW * cos_T1W - b_THW * sin_T1W, b_THW * cos_T1W + a_THW * sin_T1W)
    return torch.cat(turned, -1).to(x_THW.dtype)


def causal_attention(q_THW: Tensor, k_THW: Tensor, v_THW: Tensor, *, num_sequences: int) -> Tensor:
    """Attend within each of the equally long sequences that the rows hold one after another."""
    q, k, v = (x.unflatten(0, (num_sequences, -1)).transpose(1, 2) for x in (q_THW, k_THW, v_THW))
    return fn.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)


class Norm(nn.Module):
    """RMSNorm over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return fn.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), eps=1e-6)


class Attention(nn.Module):
    """Self-attention with normalised queries and keys."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.norm = Norm(cfg.d_model)
        self.q_norm = Norm(cfg.d_model // cfg.num_heads)
        self.k_norm = Norm(cfg.d_model // cfg.num_heads)
        self.qkv = nn.Parameter(torch.randn(3 * cfg.d_model, cfg.d_model) * cfg.init_std)
        self.out = nn.Parameter(torch.randn(cfg.d_model, cfg.d_model) * cfg.out_std)

    def forward(self, x_TD: Tensor, turn_2TW: Tensor, attend: Attend) -> Tensor:
        qkv_TD = fn.linear(self.norm(x_TD), self.qkv.to(x_TD.dtype))
        q_THW, k_THW, v_THW = qkv_TD.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        q_THW, k_THW = self.q_norm(q_THW), self.k_norm(k_THW)
        y_THW = attend(rotate(q_THW, turn_2TW), rotate(k_THW, turn_2TW), v_THW)
        return fn.linear(y_THW.flatten(1), self.out.to(x_TD.dtype))


class Moe(nn.Module):
    """Softmax router with renormalised top-k weights over SwiGLU experts; no token is dropped."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        E, D, ffn = cfg.num_experts, cfg.d_model, cfg.d_ff
        self.top_k = cfg.top_k
        self.spec = MoeSpec(name="ours", num_layers=1, num_experts=E, top_k=cfg.top_k, d_model=D, d_ff=(ffn,))
        self.on_ids: Callable[[Tensor], None] | None = None
        """Is told which experts each token chose: how a recorder listens."""
        self.norm = Norm(D)
        self.router = nn.Parameter(torch.randn(E, D) * cfg.init_std)
        self.gate_up = nn.Parameter(torch.randn(E, 2 * ffn, D) * cfg.init_std)
        self.down = nn.Parameter(torch.randn(E, D, ffn) * cfg.out_std)

    def route(self, x_TD: Tensor) -> tuple[Routing, Tensor]:
        """Choose experts; return the choice and the order that sorts routed rows by expert."""
        logits_TE = fn.linear(x_TD.float(), self.router)
        gates_TK, ids_TK = logits_TE.softmax(-1).topk(self.top_k)
        sorted_R, order_R = ids_TK.flatten().sort(stable=True)
        experts_E = torch.arange(logits_TE.shape[1], device=x_TD.device)
        # The sorted ids hold the counts: no atomics and no copy to the host.
        ends_E = torch.searchsorted(sorted_R, experts_E, right=True, out_int32=True)
        gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
        return Routing(ids_TK, gates_TK, logits_TE, ends_E), order_R

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Routing]:
        h_TD = self.norm(x_TD)
        routing, order_R = self.route(h_TD)
        if self.on_ids is not None:
            self.on_ids(routing.ids_TK)
        rows_RD = h_TD[:, None].expand(-1, self.top_k, -1).flatten(0, 1).index_select(0, order_R)
        gate_RF, up_RF = grouped_product(rows_RD, self.gate_up, routing.ends_E).chunk(2, -1)
        weight_R = routing.gates_TK.flatten().gather(0, order_R).to(x_TD.dtype)
        act_RF = fn.silu(gate_RF) * up_RF * weight_R[:, None]
        y_RD = grouped_product(act_RF, self.down, routing.ends_E)
        return y_RD.index_select(0, order_R.argsort()).unflatten(0, (-1, self.top_k)).sum(1), routing


class Block(nn.Module):
    """Attention, then experts, each added to the residual stream."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(cfg)
        self.moe = Moe(cfg)

    def forward(self, x_TD: Tensor, turn_2TW: Tensor, num_sequences: int) -> tuple[Tensor, Routing]:
        attend = partial(causal_attention, num_sequences=num_sequences)
        x_TD = x_TD + self.attention(x_TD, turn_2TW, attend)
        y_TD, routing = self.moe(x_TD)
        return x_TD + y_TD, routing


class Decoder(nn.Module):
    """The whole model; `dtype` is that of activations."""

    def __init__(self, cfg: ModelConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        nn.init.normal_(self.embed.weight, std=cfg.init_std)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.norm = Norm(cfg.d_model)
        self.head = nn.Parameter(torch.randn(cfg.vocab_size, cfg.d_model) * cfg.init_std)

    def turns(self, position_T: Tensor) -> Tensor:
        """Give cosines and sines of the rotary angles, fp32 [2, T, W / 2], of integer positions."""
        half = self.cfg.d_model // self.cfg.num_heads // 2
        index_W = torch.arange(half, device=position_T.device)
        angle_TW = position_T[:, None].float() * self.cfg.rope_theta ** (-index_W.float() / half)
        return torch.stack((angle_TW.cos(), angle_TW.sin()))

    def logits(self, x_TD: Tensor) -> Tensor:
        """Read fp32 next-byte logits out of the residual stream."""
        return fn.linear(self.norm(x_TD), self.head.to(x_TD.dtype)).float()

    def forward(self, token_BC: Tensor) -> tuple[Tensor, list[Routing]]:
        """Run whole sequences; return logits [B, C, V] and each layer's routing."""
        B, C = token_BC.shape
        turn_2TW = self.turns(torch.arange(C, device=token_BC.device).repeat(B))
        x_TD = self.embed(token_BC.flatten()).to(self.dtype)
        routings = []
        for block in self.blocks:
            x_TD, routing = block(x_TD, turn_2TW, B)
            routings.append(routing)
        return self.logits(x_TD).unflatten(0, (B, C)), routings


def router_losses(routings: list[Routing]) -> tuple[Tensor, Tensor]:
    """Give the balance loss (1 when even) and the router z-loss, each summed over layers.

    The balance loss is E * sum(share_E * mean_probability_E), over all tokens of the global batch:
    balancing within a sequence instead would forbid experts that keep to one domain.
    """
    balance = z = torch.zeros((), device=routings[0].ids_TK.device)
    for r in routings:
        share_E = torch.diff(r.ends_E, prepend=r.ends_E.new_zeros(1)) / r.ids_TK.numel()
        balance = balance + len(share_E) * (share_E * r.logits_TE.softmax(-1).mean(0)).sum()
        z = z + r.logits_TE.logsumexp(-1).square().mean()
    return balance, z


def serving_copy(model: Decoder) -> Decoder:
    """Copy the model with weights already in the activation dtype, so that no step casts them."""
    served = copy.deepcopy(model).eval().requires_grad_(False)
    for name, parameter in served.named_parameters():
        if not name.endswith("router"):
            parameter.data = parameter.data.to(model.dtype)
    return served
