"""Our experts inside tiny random Hugging Face models, against their own eager ones."""

import pytest
import torch

from expertslice.policies.contract import Control
from expertslice.policies.registry import make_policy
from expertslice.runtime.hf import register, sliced, spec_of

pytest.importorskip("transformers")
FAMILIES = ("Mixtral", "Qwen3Moe", "Olmoe", "DeepseekV3", "GptOss")


def tokens(rows=2, columns=5):
    return torch.randint(0, 40, (rows, columns), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("family", "how"),
    [
        *((family, "reference") for family in FAMILIES),
        *((family, "kernels") for family in ("Mixtral", "GptOss")),
        *(pytest.param(family, "kernels", marks=pytest.mark.slow) for family in ("Qwen3Moe", "Olmoe", "DeepseekV3")),
    ],
)
def test_experts_of_every_family_are_those_of_eager(tiny_model, family, how):
    model = tiny_model(family)
    eager = model(tokens()).logits
    with sliced(model, how=how):
        ours = model(tokens()).logits
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
    assert model.config._experts_implementation == "eager"
    assert torch.equal(model(tokens()).logits, eager)


@pytest.mark.parametrize(("family", "dtype"), [("Qwen3Moe", torch.bfloat16), ("GptOss", torch.float16)])
def test_kernels_give_the_bits_of_their_definition_in_half_precision(tiny_model, family, dtype):
    model = tiny_model(family, dtype)
    logits = {}
    for how in ("reference", "kernels"):
        with sliced(model, how=how):
            logits[how] = model(tokens(1, 3)).logits
    assert torch.equal(logits["kernels"], logits["reference"])
    assert logits["kernels"].isfinite().all()


def test_weights_that_change_are_seen(tiny_model):
    model = tiny_model("GptOss")
    with sliced(model, how="reference"):
        first = model(tokens()).logits
        model.model.layers[0].mlp.experts.down_proj.mul_(2)
        changed = model(tokens()).logits
    torch.testing.assert_close(changed, model(tokens()).logits, rtol=1e-5, atol=1e-5)
    assert not torch.equal(changed, first)


def test_a_model_made_for_inference_alone_runs(tiny_model):
    with torch.inference_mode():
        model = tiny_model("Qwen3Moe")
        tokens = torch.randint(0, 40, (2, 5))
        eager = model(tokens).logits
        with sliced(model, how="reference"):
            ours = model(tokens).logits
    torch.testing.assert_close(ours, eager)


def test_the_implementation_is_found_by_its_name_alone(tiny_model):
    model = tiny_model("Mixtral")
    eager = model(tokens()).logits
    register()
    model.set_experts_implementation("expertslice")
    torch.testing.assert_close(model(tokens()).logits, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "control"),
    [
        ("static", Control()),
        ("hot_cold", Control(delay_steps=0, every_steps=2)),
        *(pytest.param(name, Control(), marks=pytest.mark.slow) for name in ("hot_cold", "proportional", "dynamic")),
    ],
)
def test_a_policy_drives_generation_with_the_same_tokens_and_bits(tiny_model, policy, control):
    model, records = tiny_model("Qwen3Moe"), []
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


def test_kernels_under_a_policy_give_the_bits_of_an_unsliced_launch(tiny_model):
    model, records = tiny_model("Mixtral", num_hidden_layers=1), []
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


def test_a_policy_that_fails_leaves_the_model_running_unsliced(tiny_model):
    model, records = tiny_model("Mixtral"), []
    with sliced(model, Breaking(), how="reference", on_record=records.append):
        with pytest.warns(UserWarning, match="no idea; running unsliced"):
            model(tokens())
        model(tokens())
    assert len(records) == 2


def test_a_pass_that_breaks_off_is_a_step_and_the_next_one_begins_anew(tiny_model):
    model, records = tiny_model("Mixtral"), []
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


def test_experts_that_compute_something_else_are_refused(tiny_model):
    model = tiny_model("GptOss", swiglu_alpha=1.5)
    said = r"GptOssExperts cannot run .*has_bias, is_transposed.*use another"
    with pytest.raises(ValueError, match=said), sliced(model):
        pass
    assert model.config._experts_implementation == "eager"
    gelu = tiny_model("Mixtral", hidden_act="gelu")
    with pytest.raises(ValueError, match="activation GELU"), sliced(gelu):
        pass


def test_models_that_cannot_run_say_why(tiny_model):
    with pytest.raises(ValueError, match="Linear has no experts"), sliced(torch.nn.Linear(2, 2)):
        pass
    model = tiny_model("Mixtral")
    with pytest.raises(ValueError, match="allowed are kernels and reference"), sliced(model, how="magic"):
        pass
    model.requires_grad_(True)
    with sliced(model), pytest.raises(ValueError, match="no gradients; run the model under"):
        model(tokens())
    model.model.layers[1].mlp.experts.to("meta")
    with pytest.raises(ValueError, match="has experts on cpu, meta; load it on one device"), sliced(model):
        pass


def test_foresight_and_counts_of_the_pass_itself_are_refused(tiny_model):
    model = tiny_model("Mixtral")
    with pytest.raises(ValueError, match="foresees"), sliced(model, make_policy("oracle")):
        pass
    late = Control(count_lag_steps=0)
    with pytest.raises(ValueError, match="before it has run"), sliced(model, make_policy("hot_cold"), control=late):
        pass


def test_the_shape_is_the_models(tiny_model):
    spec = spec_of(tiny_model("DeepseekV3", torch.bfloat16))
    assert (spec.num_layers, spec.num_experts, spec.top_k, spec.d_model, spec.d_ff) == (2, 8, 3, 32, (24,))
    assert (spec.dtype, spec.score) == ("bf16", "sigmoid")
