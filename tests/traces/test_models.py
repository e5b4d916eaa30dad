"""Presets, and config.json files with the keys of the real ones."""

import json
from dataclasses import replace

import pytest

from expertslice.traces.models import load_model, model_names

QWEN2_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "scoring_func": "softmax",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
}
DEEPSEEK_V3 = {
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"},
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
}
DBRX = {
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "d_model": 6144,
    "ffn_config": {"ffn_hidden_size": 10752, "model_type": "", "moe_num_experts": 16, "moe_top_k": 4},
    "max_seq_len": 32768,
    "model_type": "dbrx",
    "n_heads": 48,
    "n_layers": 40,
    "torch_dtype": "bfloat16",
}
JETMOE = {
    "activation_function": "silu",
    "ffn_hidden_size": 5632,
    "hidden_size": 2048,
    "kv_channels": 128,
    "model_type": "jetmoe",
    "moe_num_experts": 8,
    "moe_top_k": 2,
    "num_layers": 24,
    "num_key_value_heads": 16,
}
LLAMA4 = {
    "model_type": "llama4",
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5120,
        "interleave_moe_layer_step": 2,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "model_type": "llama4_text",
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1408, "num_hidden_layers": 34},
}
JAMBA = {
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "model_type": "jamba",
    "num_attention_heads": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
}
ERNIE = {
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "model_type": "ernie4_5_moe",
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 1,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "num_attention_heads": 20,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
}
HUNYUAN = {
    "attention_head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 3072,
    "model_type": "hunyuan_v1_moe",
    "moe_intermediate_size": [3072, 3072],
    "moe_topk": [8, 8],
    "num_attention_heads": 32,
    "num_experts": 64,
    "num_hidden_layers": 2,
    "num_shared_expert": [1, 1],
}
GRANITE = {
    "hidden_size": 1024,
    "intermediate_size": 512,
    "model_type": "granitemoe",
    "num_attention_heads": 16,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "torch_dtype": "float16",
}
PHIMOE = {
    "hidden_size": 4096,
    "intermediate_size": 6400,
    "model_type": "phimoe",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
}
UNKNOWN_FAMILY = {"d_model": 64, "n_layers": 3, "num_moe_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}

# name: (config, layers, experts, top_k, d_model, d_ff)
CONFIGS = {
    "qwen2_moe": (QWEN2_MOE, 24, 60, 4, 2048, 1408),
    "deepseek_v2": (DEEPSEEK_V2_LITE, 26, 64, 6, 2048, 1408),
    "deepseek_v3": (DEEPSEEK_V3, 58, 256, 8, 7168, 2048),
    "dbrx": (DBRX, 40, 16, 4, 6144, 10752),
    "jetmoe": (JETMOE, 24, 8, 2, 2048, 5632),
    "llama4": (LLAMA4, 24, 128, 1, 5120, 8192),
    "jamba": (JAMBA, 16, 16, 2, 4096, 14336),
    "ernie": (ERNIE, 27, 64, 6, 2560, 1536),
    "hunyuan": (HUNYUAN, 2, 64, 8, 4096, 3072),
    "granitemoe": (GRANITE, 24, 32, 8, 1024, 512),
    "phimoe": (PHIMOE, 32, 16, 2, 4096, 6400),
    "unknown family": (UNKNOWN_FAMILY, 3, 4, 2, 64, 32),
}


def written(tmp_path, config):
    path = tmp_path / "my-model" / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(config))
    return path


def test_presets_load_and_name_their_source():
    assert len(model_names()) == 10
    for name in model_names():
        model = load_model(name)
        assert model.name == name
        assert model.source


@pytest.mark.parametrize(
    ("name", "total_params_e9"),
    [
        ("mixtral-8x7b", 46.4),
        ("qwen3-30b-a3b", 29.9),
        ("deepseek-v3", 667),
        ("gpt-oss-20b", 19.8),
        ("olmoe-1b-7b", 6.7),
    ],
)
def test_presets_hold_the_published_parameters_less_embeddings(name, total_params_e9):
    model = load_model(name)
    per_layer = model.num_experts * model.expert_bytes() // 2 + model.other_params_per_layer
    assert model.num_layers * per_layer / 1e9 == pytest.approx(total_params_e9, rel=0.01)


@pytest.mark.parametrize("family", CONFIGS)
def test_config_of_family(family, tmp_path):
    config, *expected = CONFIGS[family]
    model = load_model(str(written(tmp_path, config)))
    assert [model.num_layers, model.num_experts, model.top_k, model.d_model, model.d_ff[0]] == expected
    assert model.name == "my-model"


def test_folder_holds_config(tmp_path):
    path = written(tmp_path, QWEN2_MOE)
    assert load_model(str(path.parent)) == replace(load_model(str(path)), source=str(path))


def test_a_file_and_its_preset_agree(tmp_path):
    from_file, preset = load_model(str(written(tmp_path, DEEPSEEK_V2_LITE))), load_model("deepseek-v2-lite")
    assert replace(from_file, name="", source="") == replace(preset, name="", source="")


def test_details_of_families(tmp_path):
    v3 = load_model(str(written(tmp_path, DEEPSEEK_V3)))
    assert (v3.score, v3.renormalise, v3.dtype) == ("sigmoid", True, "bf16")
    assert "fp8" in v3.source
    assert load_model(str(written(tmp_path, GRANITE))).dtype == "fp16"
    assert not load_model(str(written(tmp_path, QWEN2_MOE))).renormalise
    assert load_model(str(written(tmp_path, JETMOE))).other_params_per_layer == 0, "heads are not given"
    interleaved = {**QWEN2_MOE, "mlp_only_layers": [1, 3], "decoder_sparse_step": 2}
    assert load_model(str(written(tmp_path, interleaved))).num_layers == 10
    typed = {**QWEN2_MOE, "mlp_layer_types": ["dense"] * 4 + ["sparse"] * 20}
    assert load_model(str(written(tmp_path, typed))).num_layers == 20
    listed = {**DEEPSEEK_V2_LITE, "moe_layer_freq": [0] * 2 + [1] * 25}
    assert load_model(str(written(tmp_path, listed))).num_layers == 25


DENSE = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (DENSE, "dense"),
        ({**QWEN2_MOE, "num_experts": 1}, "num_experts 1, so it is dense"),
        ({**QWEN2_MOE, "num_experts": "sixty"}, "num_experts is 'sixty'"),
        ({**QWEN2_MOE, "num_experts": 10**9}, "from 0 to 65536"),
        ({**QWEN2_MOE, "num_experts_per_tok": 61}, "top_k 61 exceeds its 60 experts"),
        ({**QWEN2_MOE, "hidden_size": -1}, "hidden_size is -1"),
        ({**QWEN2_MOE, "hidden_size": True}, "hidden_size is True"),
        ({**QWEN2_MOE, "moe_intermediate_size": 1408.5}, "moe_intermediate_size is 1408.5"),
        ({**QWEN2_MOE, "decoder_sparse_step": "two"}, "decoder_sparse_step is 'two'"),
        ({**QWEN2_MOE, "mlp_layer_types": []}, "none of its layers"),
        ({**HUNYUAN, "moe_topk": [8, 4]}, r"moe_topk is \[8, 4\]"),
        ({k: v for k, v in QWEN2_MOE.items() if k != "num_experts_per_tok"}, "lacks its experts per token"),
        ({k: v for k, v in QWEN2_MOE.items() if k != "num_hidden_layers"}, "lacks its layers"),
        ([1, 2], "holds a list"),
    ],
)
def test_refuses(config, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        load_model(str(written(tmp_path, config)))


def test_refuses_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'mixtral-8x7b'"):
        load_model("mixtral")
    with pytest.raises(ValueError, match=r"does not exist; give a config\.json"):
        load_model(str(tmp_path / "nothing.json"))
    broken = tmp_path / "config.json"
    broken.write_text('{"hidden_size": ')
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        load_model(str(broken))
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        load_model(str(broken))
