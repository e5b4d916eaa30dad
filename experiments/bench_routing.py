"""Routing alone, from logits to tile queues, in a graph.

`python -P -m expertslice.experiments.bench_routing --out FOLDER`
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..runtime.meter import EnergyMeter
from ..runtime.timer import capture, interleave
from ..traces.models import load_model
from .bench_arms import draw_logits
from .bench_rows import device_manifest, in_us, write_parquet
from .runs import to_json

TOKENS = (1, 8, 32, 64, 256, 2048, 8192)
MODELS = ("small", "medium", "large", "olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3")
ROUNDS = 8


def measure_routing(model: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Return the time of routing alone, for logits in float32."""
    import torch

    from ..kernels.launches import default_launch
    from ..kernels.routing import route
    from ..kernels.spec import RouterSpec
    from ..kernels.workspace import Workspace

    spec = replace(load_model(model), num_layers=1, d_model=64, d_ff=(64,), dtype="bf16")
    router, ws, launch = RouterSpec.of(spec), Workspace.allocate(spec, tokens, "cuda"), default_launch(spec, tokens)
    logits_TE = draw_logits(spec, tokens, 1, "uniform", tokens)[0]
    bias_E = torch.zeros(spec.num_experts, device="cuda") if router.score == "sigmoid" else None
    arm = capture(lambda _: route(logits_TE, router, launch, ws, bias_E=bias_E), 1)
    (samples,) = interleave([arm], rounds, "burst").samples_ns
    return {
        "model": model,
        "experts": spec.num_experts,
        "top_k": spec.top_k,
        "tokens": tokens,
        **in_us("route", samples),
    }


def main() -> None:
    """Measure every model's routing and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="of a checkout that has no history with it")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with EnergyMeter(0) as meter:
        manifest = device_manifest(meter, arguments.commit)
        rows = [measure_routing(model, tokens, ROUNDS) for model in MODELS for tokens in TOKENS]
    write_parquet(arguments.out / "routing.parquet", rows)
    manifest |= {"command": "python -P -m expertslice.experiments.bench_routing"}
    (arguments.out / "routing.manifest.json").write_text(to_json(manifest) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
