"""Model shapes: presets by name, and any Hugging Face config.json of a MoE model.

Families spell the same number in many ways; the tables below list the spellings, most specific first, so that a family
nobody listed is read as well as long as it uses one of them. Attention is counted as in `models.toml`; linear attention
and state-space layers are counted as if they were attention of the same heads.
"""

import json
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .schema import Dtype, MoeSpec, nearest

Config = dict[str, Any]

CONFIG_SUFFIX = ".config.json"
"""Of the file beside a recorded trace that holds its model's config, in place of the trace's own suffix."""
NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config", "attn_config")
NUM_EXPERTS = ("n_routed_experts", "num_local_experts", "moe_num_experts", "num_moe_experts", "num_experts")
TOP_K = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts"),
    *("moe_topk", "moe_top_k", "moe_k", "num_selected_experts"),
)
WIDTH = ("hidden_size", "d_model", "n_embd")
DEPTH = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
EXPERT_WIDTH = (
    *("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size"),
    *("ffn_hidden_size", "intermediate_size", "d_ff"),
)
HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")
KV_HEADS = ("num_key_value_heads", "kv_n_heads")
NUM_SHARED = ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts")
SHARED_WIDTH = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")

SIGMOID_FAMILIES = frozenset({"deepseek_v3", "glm4_moe", "llama4", "llama4_text", "minimax_m2", "dots1"})
UNGATED_FAMILIES = frozenset({"switch_transformers", "nllb-moe", "nllb_moe", "nemotron_h"})
"""Experts of two products; in all others a gate doubles the first."""
DTYPES: dict[str, Dtype] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
MOST = {"experts": 65536, "experts per token": 65536, "layers": 10_000, "width": 1_000_000}
"""Above these a figure is a mistake rather than a model."""


def model_names() -> tuple[str, ...]:
    """Return the names of the presets."""
    return tuple(_presets())


@cache
def _presets() -> dict[str, dict[str, Any]]:
    return tomllib.loads(Path(__file__).with_name("models.toml").read_text(encoding="utf-8"))


def preset_config(name: str) -> Config:
    """Return the keys of a preset's published config.json.

    Raises:
        ValueError: there is no preset of that name with a config.
    """
    configs = {key: preset["config"] for key, preset in _presets().items() if "config" in preset}
    if name not in configs:
        raise ValueError(nearest("model", name, configs))
    return dict(configs[name])


def load_model(name_or_path: str) -> MoeSpec:
    """Return a preset by name, or the model of a config.json or of a folder that holds one.

    Raises:
        ValueError: the name is unknown, or the file is not a config of a MoE model with the figures needed.
    """
    presets = _presets()
    if preset := presets.get(name_or_path):
        if "config" in preset:
            return model_from_config(preset["config"], name=name_or_path, source=preset["source"])
        spec: dict[str, Any] = {**preset["spec"], "d_ff": tuple(preset["spec"]["d_ff"])}
        return MoeSpec(**spec, name=name_or_path, source=preset["source"])
    path = Path(name_or_path)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        if path.suffix == ".json":
            raise ValueError(f"model file {path} does not exist; give a config.json or one of {', '.join(presets)}")
        raise ValueError(nearest("model", name_or_path, presets) + ", or give a path to a config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model file {path} cannot be read as JSON ({error}); give a config.json") from None
    if type(config) is not dict:
        raise ValueError(f"model file {path} holds a {type(config).__name__}; give a config.json, which is an object")
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return model_from_config(config, name=name or "model", source=str(path))


def model_from_config(config: Config, *, name: str, source: str) -> MoeSpec:
    """Return the shape that a Hugging Face config describes.

    Raises:
        ValueError: the model is dense, or a figure is missing or absurd.
    """
    config = _flatten(config)
    num_experts = _figure(config, NUM_EXPERTS, name, "experts", default=0)
    if num_experts < 2:
        given = next((f"{key} {config[key]!r}" for key in NUM_EXPERTS if key in config), "no number of experts")
        raise ValueError(f"model {name!r} has {given}, so it is dense; give a config of a Mixture-of-Experts model")
    num_layers = _num_moe_layers(config, name, _figure(config, DEPTH, name, "layers"))
    if not num_layers:
        raise ValueError(f"model {name!r} makes none of its layers a MoE layer; check its keys on sparse layers")
    quantised, family = config.get("quantization_config"), config.get("model_type")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    by_family = "sigmoid" if family in SIGMOID_FAMILIES else "softmax"
    scored = config.get("scoring_func") or config.get("score_function") or by_family
    return MoeSpec(
        name=name,
        num_layers=num_layers,
        num_experts=num_experts,
        top_k=_figure(config, TOP_K, name, "experts per token"),
        d_model=_figure(config, WIDTH, name, "width"),
        d_ff=(_figure(config, EXPERT_WIDTH, name, "width"),),
        kind="gelu2" if family in UNGATED_FAMILIES else "swiglu",
        dtype=DTYPES.get(str(config.get("torch_dtype") or config.get("dtype")).removeprefix("torch."), "bf16"),
        score="sigmoid" if scored == "sigmoid" else "softmax",
        renormalise=bool(config.get("norm_topk_prob", True)),
        other_params_per_layer=_other_params(config, name, num_experts),
        source=source + (f"; its {method} weights are taken as bf16" if method else ""),
    )


def _flatten(config: Config) -> Config:
    """Return the config with its nested language part lifted to the top."""
    flat = {key: value for key, value in config.items() if value is not None}
    for key in NESTED:
        inner: object = flat.pop(key, None)
        if isinstance(inner, dict):
            lifted = _flatten(inner)
            if key in ("ffn_config", "attn_config"):
                # These parts state a type of their own; the family is the outer one's.
                lifted.pop("model_type", None)
            flat |= lifted
    return flat


def _figure(config: Config, keys: Sequence[str], name: str, what: str, *, default: int | None = None) -> int:
    """Return the whole number under the first of the keys that is there."""
    key = next((key for key in keys if key in config), None)
    if key is None:
        if default is None:
            raise ValueError(f"model {name!r} lacks its {what}; give a config.json with one of {', '.join(keys)}")
        return default
    value, least, most = config[key], int(default is None), MOST[what]
    if isinstance(value, list) and value and all(one == value[0] for one in value):
        # Some families repeat a figure per layer.
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"model {name!r}: {key} is {value!r:.80}; give a whole number from {least} to {most}")
    return value


def _num_moe_layers(config: Config, name: str, depth: int) -> int:
    """Return how many layers route, by every rule that the config states."""
    types, listed = config.get("mlp_layer_types"), config.get("moe_layers")
    if isinstance(types, list):
        return sum(one == "sparse" for one in types[:depth])
    if isinstance(listed, list):
        return len(listed)

    def read(*keys: str, default: int) -> int:
        return _figure(config, keys, name, "layers", default=default)

    layer_L = np.arange(depth)
    step = max(read("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval", default=1), 1)
    period, offset = max(read("expert_layer_period", default=1), 1), read("expert_layer_offset", default=0)
    last = depth - 1 if config.get("moe_layer_end_index", -1) == -1 else read("moe_layer_end_index", default=0)
    routes_L = layer_L >= read("first_k_dense_replace", "num_dense_layers", default=0)
    routes_L &= ((layer_L + 1) % step == 0) & ((layer_L % period == offset) | (period == 1))
    routes_L &= (layer_L >= read("moe_layer_start_index", default=0)) & (layer_L <= last)
    routes_L &= ~np.isin(layer_L, config.get("mlp_only_layers") or ())
    freq = config.get("moe_layer_freq", 1)
    if isinstance(freq, list):
        flags = [bool(one) for one in freq[:depth]]
        routes_L &= np.array(flags + [False] * (depth - len(flags)))
    else:
        routes_L &= layer_L % max(read("moe_layer_freq", default=1), 1) == 0
    return int(routes_L.sum())


def _other_params(config: Config, name: str, num_experts: int) -> int:
    """Return the weights that every token passes in a layer beside its routed experts; 0 when heads are unknown."""

    def width(*keys: str, default: int | None = 0) -> int:
        return _figure(config, keys, name, "width", default=default)

    if not any(key in config for key in HEADS):
        return 0
    d_model, heads = width(*WIDTH, default=None), width(*HEADS, default=None)
    shared = width(*SHARED_WIDTH)
    if not shared:
        shared = _figure(config, NUM_SHARED, name, "experts", default=0) * width(*EXPERT_WIDTH, default=None)
    other = 3 * d_model * shared + d_model * num_experts + 2 * d_model
    if "kv_lora_rank" not in config:
        head_dim = width("head_dim", "kv_channels") or d_model // heads
        return other + d_model * head_dim * (2 * heads + 2 * (width(*KV_HEADS) or heads))
    kv_rank, q_rank, v_dim = width("kv_lora_rank"), width("q_lora_rank"), width("v_head_dim")
    nope, rope = width("qk_nope_head_dim"), width("qk_rope_head_dim")
    queries = d_model * q_rank + (q_rank or d_model) * heads * (nope + rope)
    return other + queries + d_model * (kv_rank + rope) + kv_rank * heads * (nope + v_dim) + heads * v_dim * d_model
