"""A specification of synthetic routing in plain numbers, with its JSON form; `synth` draws requests from it.

Shape letters: L MoE layers, E experts, F factors of the tilt, D domains, Q lengths, H memories,
B position bins, R requests.
"""

import base64
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from .choice import MEMORY_H, NUM_BINS, LayerChoice, log_weight
from .schema import F32, F64, I64

FORMAT = "expertslice-synth-2"
"""Names and numbers the JSON form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tilt:
    """How log popularity varies between requests; float32, natural-log units."""

    factor_FLE: F32
    """Per unit of a request's hidden factors, standard normal: what moves together over experts and layers."""
    own_LE: F32
    """Standard deviation of the rest, independent per expert."""
    domain_DLE: F32

    def draw(self, domain_R: I64, rng: np.random.Generator) -> F32:
        """Draw the tilts of requests of these domains, float32 [R, L, E]."""
        factor_RF = rng.standard_normal((len(domain_R), len(self.factor_FLE)), np.float32)
        tilt_RLE = np.tensordot(factor_RF, self.factor_FLE, axes=1)
        tilt_RLE += self.own_LE * rng.standard_normal(tilt_RLE.shape, np.float32)
        return tilt_RLE + self.domain_DLE[domain_R]


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthSpec(Tilt):
    """A generator of routing."""

    top_k: int
    layers: tuple[LayerChoice, ...]
    weight_D: F64
    domains: tuple[str, ...] = ()
    """Names of the domains; empty: one domain, unnamed."""
    prompt_tokens_Q: I64 = field(default_factory=lambda: np.array([0]))
    decode_tokens_Q: I64 = field(default_factory=lambda: np.array([256]))
    """Lengths of requests, in pairs with `prompt_tokens_Q`; each pair is as likely as the others."""
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

    def to_json(self) -> str:
        """Return the specification as JSON; arrays keep every bit."""
        return json.dumps({FORMAT: True, **asdict(self)}, default=_plain)

    @staticmethod
    def from_json(text: str) -> "SynthSpec":
        try:
            content: dict[str, Any] = json.loads(text, object_hook=_array)
            content.pop(FORMAT)
            layers = tuple(LayerChoice(**layer) for layer in content.pop("layers"))
            return SynthSpec(layers=layers, domains=tuple(content.pop("domains")), **content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a synthesis specification {FORMAT} ({error}); write it with to_json") from error

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_experts(self) -> int:
        return self.own_LE.shape[1]

    @property
    def tokens(self) -> I64:
        return self.prompt_tokens_Q + self.decode_tokens_Q


def _plain(array: Any) -> dict[str, Any]:
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {"dtype": data.dtype.str, "shape": data.shape, "base64": base64.b64encode(data.tobytes()).decode()}


def _array(value: dict[str, Any]) -> Any:
    if "base64" not in value:
        return value
    return np.frombuffer(base64.b64decode(value["base64"]), np.dtype(value["dtype"])).reshape(value["shape"])


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

    `zipf_s` is the slope of the load over ranks, before tilt and memory; popularity is permuted anew in each layer.
    `tilt` and `cross` are standard deviations: of a request's log popularity, and of what the layer below's first
    choice adds. `memory` is the gain on having been chosen by the token before, the last 4 and the last 16.
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
    rows = {"profile_BE": NUM_BINS, "memory_HE": len(MEMORY_H)}
    rows |= dict.fromkeys(("below_first_EE", "below_rest_EE", "lead_EE"), num_experts)
    zeros = {name: np.zeros((num, num_experts), np.float32) for name, num in rows.items()}
    return LayerChoice(logit_E=logit_E, first_E=np.zeros(num_experts, np.float32), **zeros)


def logits_of_load(share_E: F64, top_k: int) -> F32:
    """Return logits under which Gumbel top-k gives about these shares of load (summing to 1)."""
    return log_weight(share_E * top_k).astype(np.float32)
