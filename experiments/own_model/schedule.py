"""Which rows run in which step, planned before the first one.

Two workloads over the same slots. *Wave*: as many requests as slots are prefilled in chunks, several
requests a step, and then all decode together. *Server*: requests of mixed length come and go, and
chunks of prompts run beside decode in one step (continuous batching). Who runs when depends on lengths
alone, so nothing here waits for the device.

Shape letters: T tokens of one step, C positions of one prompt.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordConfig:
    """How much is recorded; `hold_cycles` is how long the device spins while a step is enqueued."""

    num_slots: int = 64
    prompt_len: int = 512
    wave_chunk: int = 256
    wave_width: int = 8
    wave_outputs: int = 512
    server_steps: int = 512
    server_chunk: int = 128
    server_width: int = 4
    temperature: float = 0.8
    seed: int = 0
    hold_cycles: int = 60_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how many tokens to continue it by."""

    request_id: int
    domain: int
    prompt: NDArray[np.int64]
    num_outputs: int


@dataclass(slots=True)
class Running:
    """A request in a slot, and how many of its positions have run."""

    request: Request
    slot: int
    done: int = 0

    @property
    def is_filling(self) -> bool:
        return self.done < len(self.request.prompt)

    @property
    def is_finished(self) -> bool:
        return self.done == len(self.request.prompt) + self.request.num_outputs


class StepRows(NamedTuple):
    """The rows of one step: whole chunks of prompts first, then one row per decoding request."""

    request_T: NDArray[np.int64]
    slot_T: NDArray[np.int64]
    position_T: NDArray[np.int64]
    num_prefill: int
    chunk: int
    sampled: NDArray[np.int64]  # rows whose logits give a next token


def step_rows(filling: list[Running], decoding: list[Running], chunk: int) -> StepRows:
    """Lay out one step."""
    pieces = [(r, chunk) for r in filling] + [(r, 1) for r in decoding]
    widths = [width for _, width in pieces]
    request_T = np.repeat([r.request.request_id for r, _ in pieces], widths)
    slot_T = np.repeat([r.slot for r, _ in pieces], widths)
    position_T = np.concatenate([np.arange(r.done, r.done + width) for r, width in pieces])
    last = np.repeat([len(r.request.prompt) for r, _ in pieces], widths) - 1
    sampled = np.flatnonzero(position_T >= last)
    return StepRows(request_T, slot_T, position_T, chunk * len(filling), chunk, sampled)


def schedule(
    requests: Sequence[Request],
    *,
    num_slots: int,
    chunk: int,
    width: int,
    prefill_first: bool,
    max_steps: int | None = None,
) -> list[StepRows]:
    """Plan all steps: up to `width` prompts a step, one chunk each, beside decode or before it.

    Prompt lengths are multiples of `chunk`. With `prefill_first` nothing decodes while prompts wait.
    """
    waiting, free = deque(requests), list(reversed(range(num_slots)))
    running: list[Running] = []
    steps: list[StepRows] = []
    while (waiting or running) and len(steps) != max_steps:
        num_filling = sum(r.is_filling for r in running)
        while waiting and free and num_filling < width:
            running.append(Running(waiting.popleft(), free.pop()))
            num_filling += 1
        filling = [r for r in running if r.is_filling]
        held = prefill_first and bool(filling)
        decoding = [] if held else [r for r in running if not r.is_filling]
        steps.append(step_rows(filling, decoding, chunk))
        for r in filling + decoding:
            r.done += chunk if r.is_filling else 1
        free += [r.slot for r in running if r.is_finished]
        running = [r for r in running if not r.is_finished]
    return steps


def wave_requests(prompts: list[NDArray[np.int64]], cfg: RecordConfig) -> list[Request]:
    """Make one request per slot, all domains in turn; prompts are [chunks, C] per domain."""
    return [
        Request(
            request_id=r,
            domain=r % len(prompts),
            prompt=prompts[r % len(prompts)][r // len(prompts) % len(prompts[r % len(prompts)])],
            num_outputs=cfg.wave_outputs,
        )
        for r in range(cfg.num_slots)
    ]


def server_requests(prompts: list[NDArray[np.int64]], cfg: RecordConfig) -> list[Request]:
    """Make more requests than the server's steps can admit, of mixed lengths, domains equally."""
    rng = np.random.default_rng([cfg.seed, 1])
    used = -(-cfg.num_slots // len(prompts))
    rounds = (cfg.num_slots + cfg.server_steps // 2) // len(prompts) + 1
    requests: list[Request] = []
    for turn in range(rounds):
        for domain in rng.permutation(len(prompts)):
            chunks = prompts[domain]
            length = cfg.server_chunk * int(rng.integers(1, cfg.prompt_len // cfg.server_chunk + 1))
            requests.append(
                Request(
                    request_id=cfg.num_slots + len(requests),
                    domain=int(domain),
                    prompt=chunks[(used + turn) % len(chunks)][:length],
                    num_outputs=int(rng.integers(cfg.prompt_len // 8, cfg.prompt_len + 1)),
                )
            )
    return requests


def key_lengths(rows: StepRows, *, multiple: int = 64) -> tuple[int, int]:
    """Give how many cached positions prompt chunks and decoding rows read, in whole multiples.

    What lies behind a row's own position is masked; few lengths keep the attention kernels few.
    """
    groups = (rows.position_T[: rows.num_prefill], rows.position_T[rows.num_prefill :])
    prefill, decode = (-(-(int(group.max(initial=-1)) + 1) // multiple) * multiple for group in groups)
    return prefill, decode


def plan(prompts: list[NDArray[np.int64]], cfg: RecordConfig) -> tuple[list[Request], list[StepRows]]:
    """Make the requests and steps of both workloads, one after the other."""
    wave, server = wave_requests(prompts, cfg), server_requests(prompts, cfg)
    steps = schedule(wave, num_slots=cfg.num_slots, chunk=cfg.wave_chunk, width=cfg.wave_width, prefill_first=True)
    steps += schedule(
        server,
        num_slots=cfg.num_slots,
        chunk=cfg.server_chunk,
        width=cfg.server_width,
        prefill_first=False,
        max_steps=cfg.server_steps,
    )
    return wave + server, steps
