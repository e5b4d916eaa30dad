"""A small trace and a small model, so that whole runs take a second."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from expertslice.traces.compose import Composition, compose
from expertslice.traces.spec import zipf_spec
from expertslice.traces.store import write_trace
from expertslice.traces.synth import synthesise

CONFIG = {
    "model_type": "mixtral",
    "num_hidden_layers": 3,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}


def batches(num_steps):
    """Return a trace of 16 requests at once."""
    requests = synthesise(zipf_spec(3, 8, 2, zipf_s=1.2, prompt_tokens=24, decode_tokens=24), 40, 0)
    composition = Composition(batch_size=16, num_steps=num_steps, max_tokens_per_step=96, prefill_chunk_tokens=64)
    return compose(requests, composition)


@pytest.fixture(scope="session")
def write_batches():
    """Write a trace of that many steps to a path."""
    return lambda path, num_steps: write_trace(batches(num_steps), path)


@pytest.fixture(scope="session")
def trace_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "small.parquet"
    write_trace(batches(48), path)
    return path


@pytest.fixture(scope="session")
def config_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    return path


def simulate_little(patch):
    """Make comparisons cheap: fewer draws, batches and sampled steps."""
    from expertslice.experiments import case, whatif

    patch.setattr(whatif, "NUM_DRAWS", 2)
    patch.setattr(whatif, "NUM_COMPOSITIONS", 2)
    patch.setattr(whatif, "COMPOSITION_LAYERS", 48)
    patch.setattr(case, "NUM_WINDOWS", 2)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, trace_path, config_path):
    """Return what was compared, the summary and the folder of one run with every policy and its report."""
    from expertslice.experiments.case import Options
    from expertslice.experiments.whatif import what_if

    with pytest.MonkeyPatch.context() as patch:
        simulate_little(patch)
        out = tmp_path_factory.mktemp("runs")
        return what_if(Options(trace=str(trace_path), model=str(config_path), out=out, jobs=1))


@pytest.fixture
def expertslice(tmp_path, capsys, monkeypatch):
    """Run the command line in this process; return (exit code, stdout, stderr)."""
    from expertslice.experiments import cli

    simulate_little(monkeypatch)
    before = Path.cwd()
    os.chdir(tmp_path)

    def run(*arguments):
        code = cli.run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    yield run
    os.chdir(before)


@pytest.fixture
def start(tmp_path):
    """Start the command line as a process of its own, in an empty folder."""

    def popen(*arguments, **options):
        code = "from expertslice.experiments.cli import main; main()"
        command = [sys.executable, "-c", code, *(str(a) for a in arguments)]
        return subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )

    return popen
