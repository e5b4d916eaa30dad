"""Train the model for a given time and record its routing early, midway and at the end.

    python -m expertslice.experiments.own_model.train --corpus corpus.tar.xz --out runs/own --seconds 390

Writes the trace, one segment per checkpoint, and beside it the facts of its training. Loss is in nats per byte.

Shape letters: B sequences, C positions, N bytes of one domain.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as fn
from numpy.typing import NDArray

from ...traces.schema import Provenance
from ...traces.store import write_trace
from ...traces.trace import UNKNOWN, RoutingTrace, concat
from .data import Corpus, Sampler, Split, read_corpus
from .model import Decoder, ModelConfig, router_losses, serving_copy
from .record import record
from .schedule import RecordConfig

NAME = "ours-moe-32e4k"
SEGMENTS = ("early", "middle", "final")
"""Training checkpoints, in order."""
NOTES = (
    "Byte-level MoE language model trained for this project on documentation, dictionaries and source code of Debian "
    "and Python packages; routing of held-out text at three checkpoints. Prefill and decode as recorded; decode is "
    "sampled at temperature 0.8. Times are of plain eager PyTorch under a queue that was kept full; steps bound by "
    "the host have null times. No text and no token ids."
)
SPLIT = Split()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Recipe; the length is `steps`, or where that is None the time `seconds` spent in steps."""

    seconds: float = 390.0
    steps: int | None = None
    num_sequences: int = 64
    sequence_len: int = 1024
    peak_lr: float = 1e-3
    warmup_steps: int = 100
    decay_from: float = 0.7
    final_lr: float = 5e-5
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    balance_coef: float = 1e-3
    z_coef: float = 1e-4
    domain_power: float = 0.7
    checkpoints: tuple[float, ...] = (0.05, 0.4, 1.0)
    eval_sequences: int = 16
    compile: bool = False
    seed: int = 0


class Trainer:
    """Model, optimiser and the clock that the schedule follows."""

    def __init__(self, model: Decoder, sampler: Sampler, cfg: TrainConfig) -> None:
        self.model, self.sampler, self.cfg = model, sampler, cfg
        self.device = model.head.device
        matrices = {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": cfg.weight_decay}
        vectors = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW([matrices, vectors], lr=cfg.peak_lr, betas=(0.9, 0.95), fused=True)
        self.step, self.spent_s, self.rows = 0, 0.0, []
        if cfg.compile:
            for block in model.blocks:
                block.compile(dynamic=False)

    @property
    def progress(self) -> float:
        """Share of the training done."""
        return self.step / self.cfg.steps if self.cfg.steps else self.spent_s / self.cfg.seconds

    def lr(self) -> float:
        """Warm up, stay, then fall linearly."""
        cfg = self.cfg
        fall = min(max((self.progress - cfg.decay_from) / (1 - cfg.decay_from), 0.0), 1.0)
        return min(1.0, (self.step + 1) / cfg.warmup_steps) * (cfg.peak_lr + fall * (cfg.final_lr - cfg.peak_lr))

    def backward(self) -> torch.Tensor:
        """Accumulate gradients of one batch; return its loss, balance loss and z-loss."""
        cfg = self.cfg
        tokens = torch.from_numpy(self.sampler.batch(self.step, cfg.num_sequences))
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        logits, routings = self.model(tokens[:, :-1])
        loss = fn.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        balance, z = router_losses(routings)
        (loss + cfg.balance_coef * balance + cfg.z_coef * z).backward()
        return torch.stack([loss, balance / len(routings), z / len(routings)]).detach()

    def train_step(self) -> torch.Tensor:
        """Take one step; return loss, balance loss, z-loss and gradient norm."""
        losses = self.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return torch.cat([losses, norm[None]])

    def train_until(self, progress: float, *, log_every: int = 10) -> None:
        """Train up to a share of the whole, reading the clock and the losses every few steps."""
        while self.progress < progress:
            begin = time.perf_counter()
            losses = [self.train_step() for _ in range(log_every)]
            mean = torch.stack(losses).mean(0).tolist()  # waits for the device
            self.spent_s += time.perf_counter() - begin
            rate = log_every * self.cfg.num_sequences * self.cfg.sequence_len / (time.perf_counter() - begin)
            row = dict(zip(("loss", "balance", "z", "grad_norm"), mean, strict=True))
            self.rows.append(row | {"step": self.step, "seconds": self.spent_s, "lr": self.lr(), "tokens_per_s": rate})


@torch.no_grad()
def evaluate(model: Decoder, tokens_BC: NDArray[np.int64]) -> float:
    """Return the mean loss of predicting each token of held-out sequences from those before it."""
    with torch.compiler.set_stance("force_eager"):
        tokens = torch.from_numpy(tokens_BC).to(model.head.device)
        logits, _ = model(tokens[:, :-1])
        return fn.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


def facts(device: torch.device) -> dict[str, str]:
    """Name the software and, where there is one, the GPU and its driver."""
    named = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if device.type != "cuda":
        return named | {"device": platform.machine()}
    import pynvml

    pynvml.nvmlInit()
    named |= {"driver": pynvml.nvmlSystemGetDriverVersion(), "cuda": torch.version.cuda or ""}
    return named | {"device": torch.cuda.get_device_name(device)}


def checkpoint(
    trainer: Trainer, corpus: Corpus, cfg: RecordConfig, provenance: Provenance
) -> tuple[RoutingTrace, dict[str, Any]]:
    """Evaluate and record the model as it is now; return its routing and the report."""
    length, most = trainer.cfg.sequence_len + 1, trainer.cfg.eval_sequences
    losses = {name: evaluate(trainer.model, SPLIT.chunks(text_N, length)[:most]) for name, text_N in corpus.items()}
    prompts = {name: SPLIT.chunks(text_N, cfg.prompt_len) for name, text_N in corpus.items()}
    trace = record(serving_copy(trainer.model), prompts, cfg, provenance)
    return trace, {
        "step": trainer.step,
        "training_tokens": trainer.step * trainer.cfg.num_sequences * trainer.cfg.sequence_len,
        "training_seconds": trainer.spent_s,
        "heldout_loss": losses,
        "record": asdict(cfg),
        "recorded_tokens": trace.num_tokens,
        "recorded_steps": trace.num_steps,
        "steps_held": int((trace.step_table.moe_ns_SL[:, 0] != UNKNOWN).sum()),
    }


def run(
    corpus: Corpus, out: Path, model_cfg: ModelConfig, cfg: TrainConfig, recording: RecordConfig, commit: str
) -> None:
    """Train, evaluate and record; both files are complete after every checkpoint."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(cfg.seed)
    sampler = Sampler(corpus, SPLIT, length=cfg.sequence_len, power=cfg.domain_power, seed=cfg.seed)
    with device:
        model = Decoder(model_cfg, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    trainer = Trainer(model, sampler, cfg)
    # Compile and warm up before the clock starts.
    trainer.backward()
    trainer.optimizer.zero_grad()
    out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "expertslice.experiments.own_model.train", *sys.argv[1:]])
    named = facts(device)
    provenance = Provenance(
        source=f"recorded by {command} at commit {commit}",
        model=NAME,
        device=named["device"],
        driver=named.get("driver"),
        versions={name: version for name, version in named.items() if name not in ("device", "driver")},
        seed=cfg.seed,
        notes=NOTES,
    )
    report = {
        "command": command,
        "commit": commit,
        "facts": named,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "domain_bytes": {name: len(text_N) for name, text_N in corpus.items()},
        "domain_share": sampler.domain_share.tolist(),
        "model": asdict(model_cfg),
        "train": asdict(cfg),
        "split": asdict(SPLIT),
        "checkpoints": {},
        "curve": trainer.rows,
    }
    brief = replace(recording, wave_outputs=recording.wave_outputs // 4, server_steps=0)
    traces: list[RoutingTrace] = []
    for segment, progress in enumerate(cfg.checkpoints):
        trainer.train_until(progress)
        amount = recording if segment == len(SEGMENTS) - 1 else brief
        trace, report["checkpoints"][SEGMENTS[segment]] = checkpoint(trainer, corpus, amount, provenance)
        table = replace(trace.step_table, segments=SEGMENTS, segment_S=np.full(trace.num_steps, segment, np.uint8))
        first_request = int(traces[-1].request_id_T.max()) + 1 if traces else 0
        traces.append(replace(trace, step_table=table, request_id_T=trace.request_id_T + first_request))
        write_trace(concat(traces), out / f"{NAME}.parquet")
        (out / f"{NAME}.training.json").write_text(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=TrainConfig().seconds)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--balance-coef", type=float, default=TrainConfig().balance_coef)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--commit", default="unknown", help="written into training.json")
    args = vars(parser.parse_args())
    corpus, out, commit = read_corpus(args.pop("corpus")), args.pop("out"), args.pop("commit")
    run(corpus, out, ModelConfig(), TrainConfig(**args), RecordConfig(seed=args["seed"]), commit)


if __name__ == "__main__":
    main()
