"""From a model of the user's own to a report, by the commands of the README; and programs that go wrong."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from expertslice.experiments.inputs import open_source

pytest.importorskip("transformers")
README = Path(__file__).parents[2] / "README.md"

SCRIPT = """
import sys, torch
from transformers import {family}Config, {family}ForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2)
model = {family}ForCausalLM({family}Config(**sizes, **{options}, eos_token_id=None)).eval()
prompts = torch.randint(0, 64, (4, 12))
model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=20, do_sample=True)
"""
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
OPTIONS = {
    "Mixtral": {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32},
    "Olmoe": {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
    "DeepseekV3": {
        **LATENT, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "intermediate_size": 64, "first_k_dense_replace": 1,
    },
    "GptOss": {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
}  # fmt: skip


def readme_commands():
    """Return the five commands that the README promises, without their comments."""
    block = README.read_text().split("<!-- five commands -->")[1].split("```")[1]
    return [shlex.split(line, comments=True) for line in block.strip().splitlines()]


def write_script(folder, family):
    path = folder / "my_script.py"
    path.write_text(SCRIPT.format(family=family, options=OPTIONS[family]))
    return path


@pytest.mark.parametrize(
    "family", ["Olmoe", *(pytest.param(f, marks=pytest.mark.slow) for f in OPTIONS if f != "Olmoe")]
)
def test_the_five_commands_of_the_readme_end_in_a_report(expertslice, tmp_path, family):
    write_script(tmp_path, family)
    install, *commands = readme_commands()
    assert install[:2] == ["pip", "install"]
    assert len(commands) == 4
    said = []
    for program, *arguments in commands:
        assert program == "expertslice"
        code, out, err = expertslice(*arguments)
        assert code == 0, err
        said.append(out)
    assert re.search(r"20 steps of ", said[0])
    assert "decode" in said[1]
    report = re.search(r"report +(\S+)", said[2])
    assert (tmp_path / report[1]).stat().st_size > 10_000
    assert "no GPU timing" in said[3]
    assert len(list(tmp_path.glob("runs/*-run/*.parquet"))) == 2


def test_a_program_that_fails_half_way_leaves_a_partial_trace(expertslice, tmp_path):
    script = write_script(tmp_path, "Olmoe")
    script.write_text(script.read_text() + "raise RuntimeError('out of luck')\n")
    code, _, err = expertslice("record", "--out", "t.parquet", "--", "python", script)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert "the program failed (RuntimeError: out of luck); the 20 steps until then are kept in t.parquet" in last
    assert "my_script.py" in err
    code, out, _ = expertslice("trace", "info", "t.parquet", "--json")
    assert json.loads(out)["trace"]["notes"] == ["partial: the program broke off (RuntimeError)"]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["sh", "-c", "true"], "record cannot run 'sh -c true'; write -- python script.py"),
        (["python", "-c", "1"], "cannot run"),
        (["python", "-m"], "names no module"),
        (["python", "no.py"], "script no.py does not exist"),
        (["python", "dense.py"], "no model with experts ran in python dense.py; nothing was written"),
        (["python", "exits.py"], r"the program failed \(SystemExit: 3\); nothing was recorded"),
    ],
)
def test_programs_that_cannot_be_recorded(expertslice, tmp_path, command, says):
    (tmp_path / "dense.py").write_text("import torch; torch.nn.Linear(2, 2)(torch.ones(1, 2))")
    (tmp_path / "exits.py").write_text("import sys; sys.exit(3)")
    code, _, err = expertslice("record", "--", *command)
    assert code == 2
    assert re.search(says, err)
    assert not list(tmp_path.glob("routing*"))


def test_a_trace_that_stands_there_is_not_overwritten(expertslice, tmp_path):
    (tmp_path / "routing.parquet").write_text("mine")
    code, _, err = expertslice("record", "--", "python", write_script(tmp_path, "Olmoe"))
    assert code == 2
    assert "routing.parquet exists already" in err


def test_the_library_is_listed_and_its_traces_go_by_name(expertslice):
    code, out, _ = expertslice("trace", "list", "--json")
    assert code == 0
    names = [one["trace"] for one in json.loads(out)]
    assert "ours-moe-32e4k" in names
    for name in names:
        assert open_source(name).source.num_steps > 0


def test_without_torch_the_command_says_what_to_install(expertslice, monkeypatch):
    monkeypatch.setitem(sys.modules, "expertslice.experiments.record_program", None)
    code, _, err = expertslice("record", "--", "python", "x.py")
    assert code == 2
    assert err.strip().endswith("install expertslice[gpu,hf]")
