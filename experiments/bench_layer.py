"""The layer benchmark: the whole layer, routing included, ours beside torch's grouped product, each in a CUDA graph.

`python -P -m expertslice.experiments.bench_layer --out FOLDER --seconds 400`. Rows are appended to rows.jsonl as they
finish; a call stops at its time limit, and `--resume FILE` skips the rows that the file already holds. Weights are
cold: sets in rotation that exceed the L2 cache four times. Correctness comes first: a row whose output is not that of
the sequential definition is reported and not timed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..policies.data import load_device
from ..runtime.meter import EnergyMeter
from ..runtime.timer import capture, interleave, paired_ratio
from ..traces.models import load_model
from .bench_arms import (
    Batch,
    agreement,
    clock_of,
    describe,
    draw_logits,
    our_step,
    torch_grouped,
)
from .bench_rows import (
    LONG_LAYER_US,
    Point,
    Work,
    cold_batches,
    device_manifest,
    in_us,
    write_parquet,
)
from .precompile import precompile
from .runs import to_json
from .tune import mean_ns, search

SWIGLU_MODELS = ("qwen3-30b-a3b", "mixtral-8x7b", "large", "olmoe-1b-7b", "medium", "small")
TOKENS = (1, 32, 256, 2048, 8192)
RELU_TOKENS = {"small": (1, 32, 256, 2048), "medium": (1, 32, 256, 2048), "large": (1, 32, 256, 2048)}
ROUTED_TOKENS = (1, 8, 32, 64, 256, 2048, 8192)
ROUTED_MODELS = ("small", "medium", "large", "olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3")
MOST_REL_DIFFERENCE = 2e-3
"""Of bf16 outputs whose bits differ where the matrix library does not walk K in order."""
TUNE_S = 12.0


def all_rows() -> list[Point]:
    """Return the rows: SwiGLU layers of the models compared, then the paper's three-layer ReLU layers."""
    rows = [
        Point(model=model, kind="swiglu", skew=skew, tokens=tokens)
        for model in SWIGLU_MODELS
        for tokens in TOKENS
        for skew in (("uniform",) if tokens == 1 else ("uniform", "zipf"))
    ]
    return rows + [
        Point(model=model, kind="relu3", skew="uniform", tokens=tokens)
        for model, token_counts in RELU_TOKENS.items()
        for tokens in token_counts
    ]


def measure(row: Point, batch: Batch, sm_count: int, rounds: int) -> dict[str, Any]:
    """Return one row: the check, the launch chosen, quantiles of each arm, their ratio and the floor."""
    end = time.monotonic() + TUNE_S
    clock, expired = clock_of({row.skew: batch}), lambda: time.monotonic() > end
    launch, times = search(row.spec, row.tokens, clock, sm_count=sm_count, expired=expired)
    tried = {
        describe(one): round(ns[row.skew] / 1000, 2) for one, ns in sorted(times.items(), key=lambda i: mean_ns(i[1]))
    }
    checked = agreement(batch, launch)
    found: dict[str, Any] = {**asdict(row), **checked, "launch": describe(launch), "tried_us": tried}
    if not checked["same_bits"] and not checked["rel_difference"] <= MOST_REL_DIFFERENCE:
        return found | {"status": "wrong"}
    floor = Work.of(batch).floor_us(load_device("h100-sxm5-80gb"))
    sets = 1 if floor > LONG_LAYER_US else len(batch.sets)
    arms = [
        capture(our_step(batch, launch), sets),
        capture(lambda p: torch_grouped(batch.x_TD, batch.logits_PTE[p], batch.sets[p]), sets),
    ]
    ours, theirs = interleave(arms, rounds, "burst").samples_ns
    ratio = paired_ratio(theirs, ours)
    return found | {
        "status": "ok",
        "weight_sets": sets,
        "rounds": rounds,
        "floor_us": floor,
        "of_floor": floor / statistics.median(ours) * 1000,
        **in_us("ours", ours),
        **in_us("torch", theirs),
        "speedup": ratio.median,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
    }


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


def run_rows(rows: Sequence[Point], seconds: float, rounds: int, meter: Any) -> Iterator[dict[str, Any]]:
    """Yield measured rows until they are done or the time is up."""
    import torch

    sm_count = torch.cuda.get_device_properties(0).multi_processor_count
    for row, batch in cold_batches(rows, seconds):
        found = measure(row, batch, sm_count, rounds)
        yield found | {f"after_{name}": value for name, value in asdict(meter.snapshot()).items()}


def manifest(arguments: argparse.Namespace, meter: Any) -> dict[str, Any]:
    """Return what is needed to read the rows later."""
    return {
        **device_manifest(meter, arguments.commit),
        "command": f"python -P -m expertslice.experiments.bench_layer --seconds {arguments.seconds:.0f}",
        "regime": "burst: at most 20 ms busy, then at least 100 ms idle; graph replay; weights cold",
    }


def line(found: dict[str, Any]) -> str:
    """Return one row for the terminal."""
    head = f"{found['model']:14} {found['kind']:6} {found['skew']:7} {found['tokens']:5}"
    if found["status"] != "ok":
        return f"{head} {found['status']}: {found['rel_difference']:.2e}"
    times = f"floor {found['floor_us']:8.1f} ours {found['ours_us_q50']:8.1f} torch {found['torch_us_q50']:8.1f}"
    bits = "same" if found["same_bits"] else f"{found['differing_share']:.0e}"
    ratio = f"x{found['speedup']:.2f} [{found['speedup_low']:.2f}, {found['speedup_high']:.2f}]"
    rest = f"of floor {found['of_floor']:.2f} {bits} {found['launch']}"
    return f"{head} {times} {ratio} {rest}"


def main() -> None:
    """Measure the rows that are missing, within the time given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--resume", type=Path, help="rows.jsonl of an earlier call")
    parser.add_argument("--models", help="comma-separated; default all")
    parser.add_argument("--commit", help="of a checkout that has no history with it")
    arguments = parser.parse_args()
    started = time.monotonic()
    done = [json.loads(text) for text in arguments.resume.read_text().splitlines()] if arguments.resume else []
    names = {tuple(found[key] for key in ("model", "kind", "skew", "tokens")) for found in done}
    models = arguments.models.split(",") if arguments.models else None
    rows = [r for r in all_rows() if tuple(asdict(r).values()) not in names and (not models or r.model in models)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with EnergyMeter(0) as meter:
        (arguments.out / "manifest.json").write_text(to_json(manifest(arguments, meter)) + "\n")
        precompile([(row.spec, row.tokens) for row in rows])
        sys.stdout.write(f"compiled in {time.monotonic() - started:.0f} s\n")
        routed = [measure_routing(model, tokens, 20) for model in ROUTED_MODELS for tokens in ROUTED_TOKENS]
        write_parquet(arguments.out / "routing.parquet", routed)
        for found in routed:
            sys.stdout.write(f"route {found['model']:14} {found['tokens']:5} {found['route_us_q50']:6.2f} us\n")
        with (arguments.out / "rows.jsonl").open("w") as file:
            file.writelines(json.dumps(found) + "\n" for found in done)
            left_s = arguments.seconds - (time.monotonic() - started)
            for found in run_rows(rows, left_s, arguments.rounds, meter):
                file.write(json.dumps(found) + "\n")
                file.flush()
                sys.stdout.write(line(found) + "\n")
                sys.stdout.flush()
    measured = [json.loads(text) for text in (arguments.out / "rows.jsonl").read_text().splitlines()]
    write_parquet(arguments.out / "layers.parquet", [m | {"tried_us": json.dumps(m["tried_us"])} for m in measured])


if __name__ == "__main__":
    main()
