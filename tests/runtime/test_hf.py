"""Our experts inside tiny random Hugging Face models, against their own eager ones."""

import pytest
import torch

from expertslice.policies.contract import Control
from expertslice.policies.registry import make_policy
from expertslice.runtime.hf import register, sliced, spec_of

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
GROUPS = {"n_group": 2, "topk_group": 1, "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
FAMILIES = {
    "Mixtral": {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 16},
    "Olmoe": {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "DeepseekV3": {**GROUPS, **LATENT, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "intermediate_size": 48},
}
GPT_OSS = {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}


def build(family, options, dtype=torch.float32, **changes):
    """Return a model with weights large enough that experts matter."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **options, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.set_experts_implementation("eager")
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if weight.dim() > 1 or name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(weight, std=0.3)
    return model.to(dtype).requires_grad_(False)


def tokens(rows=2, columns=5):
    return torch.randint(0, 40, (rows, columns), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("how", ["reference", "kernels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_every_family_are_those_of_eager(family, how):
    model = build(family, FAMILIES[family])
    eager = model(tokens()).logits
    with sliced(model, how=how):
        ours = model(tokens()).logits
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
    assert model.config._experts_implementation == "eager"
    assert torch.equal(model(tokens()).logits, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_give_the_bits_of_their_definition_in_half_precision(dtype):
    model = build("Qwen3Moe", FAMILIES["Qwen3Moe"], dtype)
    logits = {}
    for how in ("reference", "kernels"):
        with sliced(model, how=how):
            logits[how] = model(tokens(1, 3)).logits
    assert torch.equal(logits["kernels"], logits["reference"])


def test_the_implementation_is_found_by_its_name_alone():
    model = build("Mixtral", FAMILIES["Mixtral"])
    eager = model(tokens()).logits
    register()
    model.set_experts_implementation("expertslice")
    torch.testing.assert_close(model(tokens()).logits, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["static", "hot_cold", "proportional", "dynamic"])
@pytest.mark.parametrize("control", [Control(), Control(delay_steps=0, every_steps=2)])
def test_a_policy_drives_generation_with_the_same_tokens_and_bits(policy, control):
    model, records = build("Qwen3Moe", FAMILIES["Qwen3Moe"]), []
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with sliced(model, how="reference"):
        plain = model.generate(tokens(), attention_mask=torch.ones(2, 5), **options)
    with sliced(model, make_policy(policy), how="reference", control=control, on_record=records.append) as runner:
        driven = model.generate(tokens(), attention_mask=torch.ones(2, 5), **options)
    assert runner.steering.policy_errors == 0
    assert torch.equal(driven.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(driven.logits, plain.logits, strict=True))
    assert [record.step for record in records] == list(range(5))
    assert [record.bucket for record in records] == [10, 2, 2, 2, 2]
    assert len({record.plan_id for record in records}) > 1 or control.delay_steps == 0
    expert_flops = 2 * 3 * 32 * 20
    assert [record.flops for record in records] == [n * 3 * 2 * expert_flops for n in (10, 2, 2, 2, 2)]
    assert all(record.busy_ns_LS.sum() > 0 and record.end_ns > record.start_ns for record in records)


def test_kernels_under_a_policy_give_the_bits_of_an_unsliced_launch():
    model, records = build("Mixtral", FAMILIES["Mixtral"], num_hidden_layers=1), []
    with sliced(model):
        plain = model(tokens(1, 4)).logits
    with sliced(model, make_policy("static"), on_record=records.append):
        driven = [model(tokens(1, 4)).logits for _ in range(2)]
    assert all(torch.equal(one, plain) for one in driven)
    assert records[1].busy_ns_LS.shape[1] > 1


class Breaking:
    foresees = reads_clock = False

    def init(self, setup):
        return None

    def layouts(self, setup):
        return ()

    def plan(self, obs, state):
        raise RuntimeError("no idea")


def test_a_policy_that_fails_leaves_the_model_running_unsliced():
    model, records = build("Mixtral", FAMILIES["Mixtral"]), []
    with pytest.warns(UserWarning, match="no idea; running unsliced"):
        with sliced(model, Breaking(), how="reference", on_record=records.append):
            for _ in range(3):
                model(tokens())
    assert len(records) == 3


def test_a_pass_that_breaks_off_is_a_step_and_the_next_one_begins_anew():
    model, records = build("Mixtral", FAMILIES["Mixtral"]), []
    broken = model.model.layers[1].mlp.gate
    with sliced(model, make_policy("hot_cold"), how="reference", on_record=records.append):
        model(tokens())
        hook = broken.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(tokens())
        hook.remove()
        model(tokens())
    assert [record.flops > 0 for record in records] == [True] * 3
    assert records[1].flops * 2 == records[0].flops


def test_experts_that_compute_something_else_are_refused():
    model = build("GptOss", GPT_OSS)
    with pytest.raises(ValueError, match=r"GptOssExperts cannot run .*has_bias, is_transposed.*use another"):
        with sliced(model):
            model(tokens())
    assert model.config._experts_implementation == "eager"
    gelu = build("Mixtral", FAMILIES["Mixtral"], hidden_act="gelu")
    with pytest.raises(ValueError, match="activation GELU"), sliced(gelu):
        pass


def test_models_that_cannot_run_say_why():
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, intermediate_size=16))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"), sliced(dense):
        pass
    model = build("Mixtral", FAMILIES["Mixtral"])
    with pytest.raises(ValueError, match="allowed are kernels and reference"), sliced(model, how="magic"):
        pass
    model.requires_grad_(True)
    with sliced(model), pytest.raises(ValueError, match="no gradients; run the model under"):
        model(tokens())
    model.model.layers[1].mlp.experts.to("meta")
    with pytest.raises(ValueError, match="has experts on cpu, meta; load it on one device"), sliced(model):
        pass


def test_foresight_and_counts_of_the_pass_itself_are_refused():
    model = build("Mixtral", FAMILIES["Mixtral"])
    with pytest.raises(ValueError, match="foresees"), sliced(model, make_policy("oracle")):
        pass
    with pytest.raises(ValueError, match="before it has run"):
        with sliced(model, make_policy("hot_cold"), control=Control(count_lag_steps=0)):
            pass


def test_the_shape_is_the_models():
    spec = spec_of(build("DeepseekV3", FAMILIES["DeepseekV3"], torch.bfloat16))
    assert (spec.num_layers, spec.num_experts, spec.top_k, spec.d_model, spec.d_ff) == (1, 8, 2, 32, (24,))
    assert (spec.dtype, spec.score) == ("bf16", "sigmoid")
