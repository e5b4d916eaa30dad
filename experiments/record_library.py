"""Records the small traces that ship beside the bundled one, with the recorder itself; needs torch and transformers.

    python -m expertslice.experiments.record_library --corpus corpus.tar.xz --out runs/library

Our own byte model at other batch sizes and domains and while it trains; and real architectures with random weights,
labelled so: their routing says what an untrained router does, not what theirs does. Each trace has a manifest.

Shape letters: B sequences, C positions.
"""

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..runtime.recorder import Recorder
from ..runtime.rows import PassRows
from ..traces.models import preset_config
from ..traces.store import open_trace
from .own_model.data import Corpus, Sampler, read_corpus
from .own_model.model import Decoder, ModelConfig, serving_copy
from .own_model.record import Server
from .own_model.schedule import RecordConfig, StepRows, requests_of, schedule
from .own_model.train import SPLIT, TrainConfig, Trainer
from .runs import provenance, sha256_of, to_json

RANDOM = {"olmoe-1b-7b": 16, "qwen3-30b-a3b": 8, "mixtral-8x7b": 4}
"""Architectures and how many of their layers are made."""
BATCHES = {8: 4, 192: 12}
"""Requests at once, and the number of domains that they come from."""
CHECKS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Of the training, where the model is looked at."""


class RecordedServer(Server):
    """Serves planned steps and tells a recorder of each."""

    def serve(self, steps: list[StepRows], recorder: Recorder) -> None:
        """Run the steps as recorded passes."""
        self._recorder, self._coming = recorder, iter(steps)
        self.run(steps)

    def _step(self, rows: StepRows, lengths: list[int]) -> torch.Tensor:
        known = next(self._coming)
        phase_T = (np.arange(len(known.slot_T)) >= known.num_prefill).astype(np.uint8)
        keep_T = np.ones(len(phase_T), dtype=bool)
        with self._recorder.step(
            PassRows(request_id_T=known.request_T, position_T=known.position_T, phase_T=phase_T, keep_T=keep_T)
        ):
            return super()._step(rows, lengths)


def record_batches(model: Decoder, corpus: Corpus, out: Path, batches: dict[int, int], cfg: RecordConfig) -> None:
    """Record our model serving batches of several sizes, each over domains of its own."""
    names, first = sorted(corpus), 0
    for size, num_domains in batches.items():
        chosen = [names[(first + i) % len(names)] for i in range(num_domains)]
        first += num_domains
        sized = replace(cfg, num_slots=size)
        requests = requests_of([SPLIT.chunks(corpus[name], sized.prompt_len) for name in chosen], sized)[:size]
        wave = schedule(requests, size, chunk=sized.wave_chunk, width=sized.wave_width, prefill_first=True)
        with Recorder(out / f"ours-batch{size}.parquet", name="ours-moe-32e4k") as recorder:
            recorder.attach(model)
            RecordedServer(model, requests, sized).serve(wave, recorder)
        manifest(out / f"ours-batch{size}.parquet", "our byte model, trained briefly", domains=chosen, batch_size=size)


def record_training(trainer: Trainer, corpus: Corpus, out: Path, checks: Iterable[float], length: int) -> None:
    """Train our model, and record how it routes the same held-out text at several moments: a segment each."""
    path = out / "ours-training.parquet"
    texts = {name: SPLIT.chunks(text_N, length)[:1] for name, text_N in sorted(corpus.items())}
    texts = {name: tokens_BC for name, tokens_BC in texts.items() if len(tokens_BC)}
    with Recorder(path, name="ours-moe-32e4k") as recorder:
        for progress in checks:
            trainer.train_until(progress)
            recorder.segment = f"step {trainer.step}"
            # One model is one attachment: hooks are there only while the model is looked at.
            with torch.no_grad(), recorder.attached(trainer.model):
                for request, (name, tokens_BC) in enumerate(texts.items()):
                    recorder.domain = name
                    recorder.describe(PassRows.of_one_request(request, tokens_BC.size))
                    trainer.model(torch.from_numpy(tokens_BC).to(trainer.device))
    manifest(path, "our byte model while it trains, held-out text", train=vars_of(trainer.cfg), steps=trainer.step)


def vars_of(config: Any) -> dict[str, Any]:
    """Return the fields of a slotted dataclass."""
    return {name: getattr(config, name) for name in config.__slots__}


def record_random(name: str, num_layers: int, out: Path, device: str, **sizes: int) -> None:
    """Record a real architecture with random weights over random prompts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    found = {**preset_config(name), "num_hidden_layers": num_layers, **sizes}
    config = AutoConfig.for_model(found.pop("model_type"), **found, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
        prompts = torch.randint(0, config.vocab_size, (16, 64))
    path = out / f"{name}-random.parquet"
    with Recorder(path, name=f"{name}, random weights") as recorder:
        recorder.attach(model)
        model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=48, do_sample=True, pad_token_id=0
        )
    manifest(path, f"{name} with random weights and {num_layers} layers, random prompts", batch_size=16)


def manifest(path: Path, what: str, **facts: Any) -> None:
    """Write what a trace is beside it."""
    trace = open_trace(path)
    shape = {name: getattr(trace, name) for name in ("num_steps", "num_tokens", "num_layers", "num_experts", "top_k")}
    about = {"what": what, "sha256": sha256_of(path), "bytes": path.stat().st_size, **shape, **facts}
    own = trace.provenance
    recorded = {"device": own.device, "versions": own.versions, "notes": own.notes}
    text = to_json({**about, "recorded": recorded, "software": provenance()})
    path.with_suffix(".manifest.json").write_text(text + "\n", encoding="utf-8")


def timed(names: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Run each and yield a line of what it took."""
    for name, act in names:
        begin = time.perf_counter()
        act()
        yield f"{name}: {time.perf_counter() - begin:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=75.0, help="of training")
    parser.add_argument("--small", action="store_true", help="a trial of seconds, on a machine without a GPU")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device, corpus = "cuda" if torch.cuda.is_available() else "cpu", read_corpus(args.corpus)
    tiny = {"num_layers": 2, "num_experts": 8, "d_model": 64, "d_ff": 32, "num_heads": 2} if args.small else {}
    cfg = TrainConfig(seconds=args.seconds, **({"steps": 10, "num_sequences": 2, "sequence_len": 64} if tiny else {}))
    torch.manual_seed(0)
    with torch.device(device):
        model = Decoder(ModelConfig(**tiny), dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    sampler = Sampler(corpus, SPLIT, length=cfg.sequence_len, power=cfg.domain_power, seed=cfg.seed)
    trainer = Trainer(model, sampler, cfg)
    serving = RecordConfig(prompt_len=128, wave_chunk=64, wave_outputs=8 if tiny else 128, hold_cycles=0)
    batches = {2: 2, 4: 3} if tiny else BATCHES
    sizes = {"hidden_size": 64, "intermediate_size": 32, "vocab_size": 128} if tiny else {}
    jobs: list[tuple[str, Any]] = [
        ("training", lambda: record_training(trainer, corpus, args.out, CHECKS, 32 if tiny else 256)),
        ("batches", lambda: record_batches(serving_copy(model), corpus, args.out, batches, serving)),
    ]
    for name, layers in RANDOM.items():
        jobs.append((name, lambda n=name, k=layers: record_random(n, 2 if tiny else k, args.out, device, **sizes)))
    for line in timed(jobs):
        print(line, flush=True)  # noqa: T201
    print(json.dumps({path.name: path.stat().st_size for path in sorted(args.out.iterdir())}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
