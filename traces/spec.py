"""A specification of synthetic routing in plain numbers, with its JSON form; `synth` draws requests from it.

Shape letters: L MoE layers, E experts, F factors of the tilt, D domains, Q lengths, H memories, B position bins.
"""

import base64
import json
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from .choice import MEMORY_H, NUM_BINS, LayerChoice, log_weight
from .schema import F32, F64, I64

FORMAT = 1
"""Version of the JSON form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthSpec:
    """A generator of routing; arrays are float32 in natural-log units unless named otherwise."""

    top_k: int
    layers: tuple[LayerChoice, ...]
    factor_FLE: F32
    """Tilt per unit of a request's hidden factors, standard normal: what moves together over experts and layers."""
    own_LE: F32
    """Standard deviation of the rest of the tilt, independent per expert."""
    domain_DLE: F32
    weight_D: F64
    domains: tuple[str, ...] = ()
    """Names of the domains; empty: one domain, unnamed."""
    prompt_tokens_Q: I64 = field(default_factory=lambda: np.array([0]))
    decode_tokens_Q: I64 = field(default_factory=lambda: np.array([256]))
    """Lengths of requests, in pairs with `prompt_tokens_Q`; each pair is as likely as the others."""
    drift_per_million: float = 0.0
    """Standard deviation over a million tokens of the random walk of each expert's log popularity."""
    burst_share: float = 0.0
    """Share of requests that come in bursts: together, on one topic."""
    burst_size: int = 1
    source: str = ""

    def __post_init__(self) -> None:
        shape = (self.num_layers, self.num_experts)
        if not self.layers or self.factor_FLE.shape[1:] != shape or self.own_LE.shape != shape:
            raise ValueError(f"tilt of shape {self.own_LE.shape} for {shape} layers and experts; give both the same")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k {self.top_k} of {self.num_experts} experts; give 1 to {self.num_experts}")
        if self.domain_DLE.shape != (len(self.weight_D), *shape) or len(self.domains) not in (0, len(self.weight_D)):
            raise ValueError(f"{len(self.domain_DLE)} domain tilts for {len(self.weight_D)} weights; give as many")
        if len(self.prompt_tokens_Q) != len(self.decode_tokens_Q) or (self.tokens < 1).any():
            raise ValueError("prompt and decode lengths must be of equal number, each pair of at least one token")
        if not 0 <= self.burst_share <= 1 or self.burst_size < 1 or self.drift_per_million < 0:
            raise ValueError(
                f"burst share {self.burst_share}, burst size {self.burst_size}, drift {self.drift_per_million}; "
                "give a share in 0..1, a size of at least 1 and a drift of at least 0"
            )

    def to_json(self) -> str:
        """Return the specification as JSON; arrays keep every bit."""
        content = {f.name: _encode(getattr(self, f.name)) for f in fields(self) if f.name != "layers"}
        layers = [{f.name: _encode(getattr(layer, f.name)) for f in fields(layer)} for layer in self.layers]
        return json.dumps({f"expertslice-synth-{FORMAT}": True, **content, "layers": layers})

    @staticmethod
    def from_json(text: str) -> "SynthSpec":
        """Read what `to_json` wrote."""
        try:
            content: dict[str, Any] = json.loads(text)
            content.pop(f"expertslice-synth-{FORMAT}")
            layers = tuple(LayerChoice(**_decode_all(layer)) for layer in content.pop("layers"))
            return SynthSpec(layers=layers, **_decode_all(content))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"not a synthesis specification of format {FORMAT} ({error}); write it with to_json"
            ) from error

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_experts(self) -> int:
        return self.own_LE.shape[1]

    @property
    def tokens(self) -> I64:
        return self.prompt_tokens_Q + self.decode_tokens_Q


def zipf_spec(
    num_layers: int,
    num_experts: int,
    top_k: int,
    *,
    zipf_s: float = 0.5,
    tilt: float = 0.4,
    memory: tuple[float, ...] = (0.8, 0.5, 0.5),
    cross: float = 1.0,
    prompt_tokens: int = 0,
    decode_tokens: int = 256,
    seed: int = 0,
) -> SynthSpec:
    """Return a specification from a few numbers: nominal values, which the interplay of mechanisms shifts somewhat.

    Args:
        num_layers: MoE layers.
        num_experts: Experts per layer.
        top_k: Experts per token.
        zipf_s: Slope of the load over ranks, before tilt and memory; popularity is permuted anew in each layer.
        tilt: Standard deviation of a request's log popularity.
        memory: Gain on having been chosen by the token before, the last 4 and the last 16.
        cross: Standard deviation of what the layer below's first choice adds.
        prompt_tokens: Prefill tokens of every request.
        decode_tokens: Decode tokens of every request.
        seed: Of the permutations and the matrices between layers.
    """
    rng = np.random.default_rng([seed, num_layers, num_experts])
    share_E = np.arange(1, num_experts + 1) ** -float(zipf_s)
    logit_E = logits_of_load(share_E / share_E.sum(), top_k)
    factors = rng.standard_normal((8, num_layers, num_experts)) * tilt / 4
    layers = tuple(
        replace(
            plain_layer(rng.permutation(logit_E)),
            memory_HE=np.repeat(np.asarray(memory, np.float32)[:, None], num_experts, axis=1),
            below_first_EE=(cross * bool(layer) * rng.standard_normal((num_experts,) * 2)).astype(np.float32),
        )
        for layer in range(num_layers)
    )
    return SynthSpec(
        top_k=top_k,
        layers=layers,
        factor_FLE=factors.astype(np.float32),
        own_LE=np.full((num_layers, num_experts), tilt * 0.5**0.5, np.float32),
        domain_DLE=np.zeros((1, num_layers, num_experts), np.float32),
        weight_D=np.ones(1),
        prompt_tokens_Q=np.array([prompt_tokens]),
        decode_tokens_Q=np.array([decode_tokens]),
        source=f"zipf_spec, seed {seed}",
    )


def plain_layer(logit_E: F32) -> LayerChoice:
    """Return a layer with popularity alone."""
    num_experts = len(logit_E)
    return LayerChoice(
        logit_E=logit_E,
        first_E=np.zeros(num_experts, np.float32),
        sharpness=1.0,
        profile_BE=np.zeros((NUM_BINS, num_experts), np.float32),
        memory_HE=np.zeros((len(MEMORY_H), num_experts), np.float32),
        below_first_EE=np.zeros((num_experts, num_experts), np.float32),
        below_rest_EE=np.zeros((num_experts, num_experts), np.float32),
        lead_EE=np.zeros((num_experts, num_experts), np.float32),
    )


def logits_of_load(share_E: F64, top_k: int) -> F32:
    """Return logits under which Gumbel top-k gives about these shares of load (summing to 1)."""
    return log_weight(share_E * top_k).astype(np.float32)


def _encode(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    data = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return {"dtype": data.dtype.str, "shape": data.shape, "base64": base64.b64encode(data.tobytes()).decode()}


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        data = np.frombuffer(base64.b64decode(value["base64"]), np.dtype(value["dtype"]))
        return data.reshape(value["shape"])
    return tuple(value) if isinstance(value, list) else value


def _decode_all(content: dict[str, Any]) -> dict[str, Any]:
    return {name: _decode(value) for name, value in content.items()}
