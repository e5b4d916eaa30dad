"""Which rows run in which step, planned before the first one: it depends on lengths alone.

Two workloads over the same slots. *Wave*: as many requests as slots are prefilled in chunks, several
requests a step, and then all decode together. *Server*: requests of mixed length come and go, and
chunks of prompts run beside decode in one step (continuous batching).

Shape letters: T tokens of one step, C positions of one prompt.
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
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


@dataclass(slots=True, kw_only=True)
class Request:
    """One prompt, how many tokens to continue it by, and while planning its slot and how many positions have run."""

    request_id: int
    domain: int
    prompt: NDArray[np.int64]
    num_outputs: int
    slot: int = -1
    done: int = 0

    @property
    def is_filling(self) -> bool:
        return self.done < len(self.prompt)

    @property
    def is_finished(self) -> bool:
        return self.done == len(self.prompt) + self.num_outputs


class StepRows(NamedTuple):
    """The rows of one step: whole chunks of prompts first, then one row per decoding request."""

    request_T: NDArray[np.int64]
    slot_T: NDArray[np.int64]
    position_T: NDArray[np.int64]
    sampled: NDArray[np.int64]  # rows whose logits give a next token
    num_prefill: int
    chunk: int

    def key_lengths(self) -> list[int]:
        """Give how many cached positions prompt chunks and decoding rows read, in whole multiples of 64.

        What lies behind a row's own position is masked; few lengths keep the attention kernels few.
        """
        groups = (self.position_T[: self.num_prefill], self.position_T[self.num_prefill :])
        return [-(-(int(group.max(initial=-1)) + 1) // 64) * 64 for group in groups]


def step_rows(filling: list[Request], decoding: list[Request], chunk: int) -> StepRows:
    requests, widths = filling + decoding, [chunk] * len(filling) + [1] * len(decoding)
    columns = np.repeat([(r.request_id, r.slot, len(r.prompt) - 1) for r in requests], widths, axis=0).T
    position_T = np.concatenate([np.arange(r.done, r.done + w) for r, w in zip(requests, widths, strict=True)])
    return StepRows(*columns[:2], position_T, np.flatnonzero(position_T >= columns[2]), chunk * len(filling), chunk)


def schedule(
    requests: list[Request], num_slots: int, *, chunk: int, width: int, prefill_first: bool = False, most: int = -1
) -> list[StepRows]:
    """Plan `most` or all steps: up to `width` prompts a step, one chunk each, beside decode or before it.

    Prompt lengths are multiples of `chunk`. With `prefill_first` nothing decodes while prompts wait.
    """
    waiting, free = deque(requests), list(reversed(range(num_slots)))
    running: list[Request] = []
    steps: list[StepRows] = []
    while (waiting or running) and len(steps) != most:
        while waiting and free and sum(r.is_filling for r in running) < width:
            running.append(waiting.popleft())
            running[-1].slot = free.pop()
        filling = [r for r in running if r.is_filling]
        decoding = [] if prefill_first and filling else [r for r in running if not r.is_filling]
        steps.append(step_rows(filling, decoding, chunk))
        for r in filling + decoding:
            r.done += chunk if r.is_filling else 1
        free += [r.slot for r in running if r.is_finished]
        running = [r for r in running if not r.is_finished]
    return steps


def requests_of(prompts: list[NDArray[np.int64]], cfg: RecordConfig) -> list[Request]:
    """Make the wave's requests, one per slot, then more of mixed lengths than the server's steps can admit.

    Domains come equally often; prompts are [chunks, C] per domain, and each next request takes the next chunk.
    """
    rng, num_domains = np.random.default_rng([cfg.seed, 1]), len(prompts)
    requests: list[Request] = []

    def add(domain: int, turn: int, length: int, num_outputs: int) -> None:
        prompt = prompts[domain][turn % len(prompts[domain])][:length]
        requests.append(Request(request_id=len(requests), domain=domain, prompt=prompt, num_outputs=num_outputs))

    for r in range(cfg.num_slots):
        add(r % num_domains, r // num_domains, cfg.prompt_len, cfg.wave_outputs)
    first_turn = -(-cfg.num_slots // num_domains)
    for turn in range((cfg.num_slots + cfg.server_steps // 2) // num_domains + 1):
        for domain in rng.permutation(num_domains).tolist():
            length = cfg.server_chunk * int(rng.integers(1, cfg.prompt_len // cfg.server_chunk + 1))
            add(domain, first_turn + turn, length, int(rng.integers(cfg.prompt_len // 8, cfg.prompt_len + 1)))
    return requests


def plan(prompts: list[NDArray[np.int64]], cfg: RecordConfig) -> tuple[list[Request], list[StepRows]]:
    """Make the requests and steps of both workloads, one after the other."""
    requests, slots = requests_of(prompts, cfg), cfg.num_slots
    steps = schedule(requests[:slots], slots, chunk=cfg.wave_chunk, width=cfg.wave_width, prefill_first=True)
    server = schedule(requests[slots:], slots, chunk=cfg.server_chunk, width=cfg.server_width, most=cfg.server_steps)
    return requests, steps + server
