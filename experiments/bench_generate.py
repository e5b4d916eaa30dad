"""Times generation of a Hugging Face model with random weights under each experts implementation; needs a GPU.

    python -m expertslice.experiments.bench_generate --model olmoe-1b-7b --layers 8 --batch 1 --batch 32 --out runs/gen

Arms take turns, round by round, on the same prompts: eager, batched_mm, grouped_mm, ours unsliced, ours under each
policy, and the model's own default with a recorder attached, which tells what recording costs. Greedy tokens are held
against eager's. Energy is of repeated generations between ticks of the counter.

Shape letters: B sequences, S positions.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..policies.registry import make_policy
from ..runtime.hf import sliced
from ..runtime.meter import EnergyMeter, MeterError
from ..runtime.recorder import Recorder
from ..runtime.timer import paired_ratio
from ..traces.models import preset_config
from .runs import RunFolder, provenance, to_json

Arm = Callable[[], AbstractContextManager[Any]]
PLAIN, RECORDED = "default", "default, recorded"
BLOCK_PASSES, LEAST_BLOCKS, WARM_UP = 3, 12, 4


def build(name: str, num_layers: int, device: str, **sizes: int) -> Any:
    """Return a preset's architecture with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    found = {**preset_config(name), "num_hidden_layers": num_layers, **sizes}
    config = AutoConfig.for_model(found.pop("model_type"), **found, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def arms_of(model: Any, policies: list[str], device: str, how: Any) -> dict[str, Arm]:
    """Return the ways to run a model by name; each holds inside its context."""

    @contextmanager
    def named(implementation: str) -> Iterator[None]:
        before = model.config._experts_implementation
        model.set_experts_implementation(implementation)
        try:
            yield
        finally:
            model.set_experts_implementation(before)

    @contextmanager
    def recorded() -> Iterator[None]:
        with tempfile.TemporaryDirectory() as folder, Recorder(Path(folder) / "t.parquet") as recorder:
            recorder.attach(model)
            yield

    arms: dict[str, Arm] = {name: lambda n=name: named(n) for name in ("eager", "batched_mm", "grouped_mm")}
    arms["expertslice"] = lambda: sliced(model, how=how)
    for policy in policies:
        arms[f"expertslice, {policy}"] = lambda p=policy: sliced(model, make_policy(p), how=how, device=device)
    return arms | {PLAIN: nullcontext, RECORDED: recorded}


def rounds(
    model: Any, arms: dict[str, Arm], prompts_BS: torch.Tensor, num_new: int, num_rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each arm: time of each generation, and which share of tokens is eager's."""
    options = {"max_new_tokens": num_new, "do_sample": False, "pad_token_id": 0}

    def generate() -> torch.Tensor:
        return model.generate(prompts_BS, attention_mask=torch.ones_like(prompts_BS), **options)

    tokens: dict[str, torch.Tensor] = {}
    took_ms: dict[str, list[float]] = {name: [] for name in arms}
    failed: dict[str, str] = {}
    for turn in range(num_rounds + 1):
        for name, arm in arms.items() if turn % 2 == 0 else reversed(arms.items()):
            if name in failed:
                continue
            try:
                with arm():
                    # The first round compiles and warms up; inside a context once more, for buffers made anew there.
                    generate()
                    began_ns = time.perf_counter_ns()
                    tokens[name] = generate().cpu()
                    if turn:
                        took_ms[name].append((time.perf_counter_ns() - began_ns) / 1e6)
            except (torch.OutOfMemoryError, ValueError, RuntimeError, ImportError) as error:
                failed[name] = str(error).splitlines()[0]
    rows = []
    for name in arms:
        alike = (
            float((tokens[name] == tokens["eager"]).float().mean()) if name in tokens and "eager" in tokens else None
        )
        row = {"arm": name, "batch": len(prompts_BS), "prompt": prompts_BS.shape[1], "new_tokens": num_new}
        row |= {"ms": took_ms[name], "ms_median": statistics.median(took_ms[name]) if took_ms[name] else None}
        rows.append({**row, "tokens_as_eager": alike, "failed": failed.get(name)})
    return rows


def recording_cost(model: Any, batch: int, blocks: int, path: Path) -> dict[str, Any]:
    """Return what recording adds to forward passes of one token a sequence: passes with and without it, in turn.

    Each block is three passes of either kind, after one more, and the ratio of their times is paired block by block, so
    that the host's slower spells fall on both. A pass waits for the device; its time covers hooks and the way to disk.
    Collecting the model's own objects is left out: it takes milliseconds and comes at random.
    """
    took_ms: dict[str, list[float]] = {PLAIN: [], RECORDED: []}
    tokens_BS = torch.randint(0, model.config.vocab_size, (batch, 1), device=model.device)
    gc.collect()
    gc.freeze()

    def timed() -> float:
        begin_ns = time.perf_counter_ns()
        model(input_ids=tokens_BS, use_cache=False)
        if tokens_BS.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter_ns() - begin_ns) / 1e6

    with torch.no_grad(), Recorder(path) as recorder:
        for block in range(-WARM_UP, blocks):
            for name in (PLAIN, RECORDED) if block % 2 == 0 else (RECORDED, PLAIN):
                with recorder.attached(model) if name == RECORDED else nullcontext():
                    _, *found_ms = [timed() for _ in range(1 + BLOCK_PASSES)]
                # The first blocks warm up.
                took_ms[name] += found_ms if block >= 0 else []
    blocks_ms = {name: np.reshape(ms, (blocks, BLOCK_PASSES)).sum(axis=1).tolist() for name, ms in took_ms.items()}
    row = {"arm": RECORDED, "batch": batch, "passes": blocks * BLOCK_PASSES}
    for name, ms in took_ms.items():
        row |= {f"{name} ms_median": statistics.median(ms), f"{name} ms_q95": float(np.quantile(ms, 0.95))}
    return row | {"over_default": asdict(paired_ratio(blocks_ms[RECORDED], blocks_ms[PLAIN]))}


def add_energy(model: Any, arms: dict[str, Arm], rows: list[dict[str, Any]], prompts_BS: torch.Tensor) -> None:
    """Add to each row the energy of a short generation of 8 tokens, repeated for seconds."""
    mask = torch.ones_like(prompts_BS)
    with EnergyMeter() as meter:
        idle = meter.idle()
        for row in rows:
            if row["failed"]:
                continue
            try:
                with arms[row["arm"]]():
                    found = meter.measure(
                        lambda: model.generate(prompts_BS, attention_mask=mask, max_new_tokens=8, pad_token_id=0),
                        idle=idle, warm_up_s=1, window_s=3, least_steps=5,
                    )  # fmt: skip
                row["energy_of_8_tokens"] = asdict(found)
            except MeterError as error:
                row["energy_of_8_tokens"] = str(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="olmoe-1b-7b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--policy", action="append")
    parser.add_argument("--device", default="h100-sxm5-80gb", help="what policies are told")
    parser.add_argument("--no-energy", action="store_true")
    parser.add_argument("--recording", type=int, default=0, help="only what recording costs, over so many even blocks")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    args = parser.parse_args()
    if args.recording and (args.recording < LEAST_BLOCKS or args.recording % 2):
        parser.error(f"--recording {args.recording}: give an even number of blocks, {LEAST_BLOCKS} or more")
    where, how, sizes = ("cuda", "kernels", {}) if torch.cuda.is_available() else ("cpu", "reference", {
        "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "vocab_size": 64})  # fmt: skip
    model = build(args.model, args.layers, where, **sizes)
    arms = arms_of(model, args.policy or ["static", "hot_cold"], args.device, how)
    named = torch.cuda.get_device_name() if where == "cuda" else "no GPU: a trial of the program, no measurement"
    folder = RunFolder(
        args.out, "generate", {**provenance(), "torch": torch.__version__, "device": named, "asked": vars(args)}
    )
    rows: list[dict[str, Any]] = []
    for batch in args.batch or [1, 32]:
        if args.recording:
            with tempfile.TemporaryDirectory() as held:
                rows.append(recording_cost(model, batch, args.recording, Path(held) / "t.parquet"))
            folder.write_text("rows.json", to_json(rows))
            sys.stdout.write(f"batch {batch:4} {rows[-1]['over_default']}\n")
            continue
        prompts_BS = torch.randint(0, model.config.vocab_size, (batch, args.prompt), device=where)
        found = rounds(model, arms, prompts_BS, args.new_tokens, args.rounds)
        if where == "cuda" and not args.no_energy:
            add_energy(model, arms, found, prompts_BS)
        rows += found
        folder.write_text("rows.json", to_json(rows))
        for row in found:
            sys.stdout.write(f"{row['arm']:28} batch {batch:4} {row['ms_median']} ms {row['failed'] or ''}\n")
    sys.stdout.write(f"rows: {folder.finish()}\n")


if __name__ == "__main__":
    main()
