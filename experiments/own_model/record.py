"""Serve planned steps with a static key-value cache and record the routing of every token.

Shape letters: T tokens of one step, L layers, K top-k, G slots, B sequences, C positions, N cached
positions, H heads, W head width, D model, S steps, M marks of one step.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as fn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .schedule import RecordConfig, Request, StepRows, key_lengths, plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from .model import Decoder


class CudaClock:
    """Times steps by events on the device.

    An eager step is bound by its launches, so the device first spins until the whole step is in its
    queue: the times are then the device's own. `held` says per step whether it did wait; the gaps
    between steps are the spin and mean nothing.
    """

    def __init__(self, hold_cycles: int) -> None:
        self._hold_cycles = hold_cycles
        self._events: list[list[torch.cuda.Event]] = []
        self.held: list[bool] = []

    def begin(self) -> None:
        torch.cuda._sleep(self._hold_cycles)
        self._events.append([])

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events[-1].append(event)

    def end(self) -> None:
        self.held.append(not self._events[-1][0].query())

    def times_ns(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give each step's start since the first, [S], and its marks since its start, [S, M]."""
        torch.cuda.synchronize()
        first = self._events[0][0]
        start_ms = [first.elapsed_time(events[0]) for events in self._events]
        marks_ms = [[events[0].elapsed_time(e) for e in events] for events in self._events]
        return (np.array(start_ms) * 1e6).astype(np.int64), (np.array(marks_ms) * 1e6).astype(np.int64)


class HostClock:
    """Times steps where there is no device."""

    def __init__(self) -> None:
        self._marks: list[list[int]] = []
        self.held: list[bool] = []

    def begin(self) -> None:
        self._marks.append([])

    def mark(self) -> None:
        self._marks[-1].append(time.perf_counter_ns())

    def end(self) -> None:
        self.held.append(False)

    def times_ns(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give what `CudaClock.times_ns` gives."""
        marks_SM = np.array(self._marks)
        return marks_SM[:, 0] - marks_SM[0, 0], marks_SM - marks_SM[:, :1]


class Server:
    """Runs steps of a model over a static key-value cache, one slot per running request."""

    def __init__(self, model: Decoder, requests: Sequence[Request], cfg: RecordConfig) -> None:
        self.model, self.cfg = model, cfg
        self.device = model.head.device
        max_len = max(len(r.prompt) + r.num_outputs for r in requests)
        width = model.cfg.d_model // model.cfg.num_heads
        shape = (model.cfg.num_layers, cfg.num_slots, max_len, model.cfg.num_heads, width)
        self._keys = torch.zeros(shape, dtype=model.dtype, device=self.device)
        self._values = torch.zeros_like(self._keys)
        tokens = np.zeros((requests[-1].request_id + 1, max_len + 1), np.int64)
        for r in requests:
            tokens[r.request_id, : len(r.prompt)] = r.prompt
        self.tokens = torch.from_numpy(tokens).to(self.device)
        self._random = torch.Generator(self.device).manual_seed(cfg.seed)
        self.clock = CudaClock(cfg.hold_cycles) if self.device.type == "cuda" else HostClock()

    @torch.no_grad()
    def run(self, steps: Sequence[StepRows]) -> tuple[list[Tensor], list[Tensor]]:
        """Run steps in order; return expert ids and gates of each, uint8 and fp16 [T, L, K]."""
        # One upload for all steps: a copy per step from pageable memory would stall the host.
        columns = [
            torch.from_numpy(np.concatenate([getattr(s, name) for s in steps])).to(self.device)
            for name in ("request_T", "slot_T", "position_T", "sampled")
        ]
        sizes = [len(s.slot_T) for s in steps]
        cut = [c.split(sizes) for c in columns[:3]]
        cut.append(columns[3].split([len(s.sampled) for s in steps]))
        ids, gates = [], []
        # cuDNN's attention would plan anew, on the host, for every cache length.
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            for rows, *uploaded in zip(steps, *cut, strict=True):
                on_device = StepRows(*uploaded[:3], rows.num_prefill, rows.chunk, uploaded[3])
                self.clock.begin()
                ids_TLK, gates_TLK = self.step(on_device, key_lengths(rows))
                self.clock.end()
                ids.append(ids_TLK)
                gates.append(gates_TLK)
        return ids, gates

    def step(self, rows: StepRows, lengths: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Run one step (rows on the device): marks before and after each layer's two parts."""
        self.clock.mark()
        turn_2TW = self.model.turns(rows.position_T)
        x_TD = self.model.embed(self.tokens[rows.request_T, rows.position_T]).to(self.model.dtype)
        ids, gates = [], []
        for layer, block in enumerate(self.model.blocks):
            attend = partial(self._attend, layer=layer, rows=rows, lengths=lengths)
            x_TD = x_TD + block.attention(x_TD, turn_2TW, attend)
            self.clock.mark()
            y_TD, routing = block.moe(x_TD)
            x_TD = x_TD + y_TD
            self.clock.mark()
            ids.append(routing.ids_TK)
            gates.append(routing.gates_TK)
        self._sample(x_TD, rows)
        self.clock.mark()
        return torch.stack(ids, 1).to(torch.uint8), torch.stack(gates, 1).half()

    def _sample(self, x_TD: Tensor, rows: StepRows) -> None:
        logits = self.model.logits(x_TD[rows.sampled])[:, :256] / self.cfg.temperature
        noise = torch.empty_like(logits).exponential_(generator=self._random)
        # The largest of p / Exp(1) is a draw from p, and needs no check on the host.
        token = (logits.softmax(-1) / noise).argmax(-1)
        self.tokens[rows.request_T[rows.sampled], rows.position_T[rows.sampled] + 1] = token

    def _attend(
        self, q_THW: Tensor, k_THW: Tensor, v_THW: Tensor, *, layer: int, rows: StepRows, lengths: tuple[int, int]
    ) -> Tensor:
        keys, values = self._keys[layer], self._values[layer]
        keys[rows.slot_T, rows.position_T] = k_THW
        values[rows.slot_T, rows.position_T] = v_THW
        n, parts = rows.num_prefill, []
        if n:
            slot_B = rows.slot_T[: n : rows.chunk]
            q, position = (x[:n].unflatten(0, (len(slot_B), -1)) for x in (q_THW, rows.position_T))
            cached = (c[slot_B, : lengths[0]] for c in (keys, values))
            parts.append(masked_attention(q, *cached, position).flatten(0, 1))
        if n < len(q_THW):
            # Idle slots attend to their first key, unread: cheaper than gathering the busy ones' cache.
            slot_B = rows.slot_T[n:]
            q = q_THW.new_zeros(len(keys), 1, *q_THW.shape[1:])
            q[slot_B, 0] = q_THW[n:]
            position = rows.position_T.new_zeros(len(keys), 1)
            position[slot_B, 0] = rows.position_T[n:]
            cached = (c[:, : lengths[1]] for c in (keys, values))
            parts.append(masked_attention(q, *cached, position)[slot_B, 0])
        return torch.cat(parts)


def masked_attention(q_BCHW: Tensor, k_BNHW: Tensor, v_BNHW: Tensor, position_BC: Tensor) -> Tensor:
    """Attend from queries at given positions to cached keys at or before them."""
    seen_BCN = torch.arange(k_BNHW.shape[1], device=q_BCHW.device) <= position_BC[..., None]
    q, k, v = (x.transpose(1, 2) for x in (q_BCHW, k_BNHW, v_BNHW))
    return fn.scaled_dot_product_attention(q, k, v, attn_mask=seen_BCN[:, None]).transpose(1, 2)


def record(model: Decoder, prompts: list[NDArray[np.int64]], cfg: RecordConfig) -> dict[str, NDArray]:
    """Serve both workloads; return columns per token [T...] and times per step [S...], ordered by step."""
    requests, steps = plan(prompts, cfg)
    Server(model, requests, cfg).run(steps[:20])  # warms allocator and kernel choice; a trial, not recorded
    server = Server(model, requests, cfg)
    ids, gates = server.run(steps)
    start_ns, marks_SM = server.clock.times_ns()
    spans_SM = np.diff(marks_SM, axis=1)
    request_T = np.concatenate([s.request_T for s in steps])
    domain_of_request = np.array([r.domain for r in requests], np.uint8)
    is_decode = [np.arange(len(s.slot_T)) >= s.num_prefill for s in steps]
    return {
        "request_id": request_T.astype(np.int32),
        "position": np.concatenate([s.position_T for s in steps]).astype(np.int32),
        "phase": np.concatenate(is_decode).astype(np.uint8),
        "step": np.repeat(np.arange(len(steps)), [len(s.slot_T) for s in steps]).astype(np.int32),
        "domain": domain_of_request[request_T],
        "expert_ids": torch.cat(ids).cpu().numpy(),
        "gates": torch.cat(gates).cpu().numpy(),
        "step_start_ns": start_ns,
        "other_ns": spans_SM[:, 0:-1:2],
        "moe_ns": spans_SM[:, 1:-1:2],
        "head_ns": spans_SM[:, -1],
        "held": np.array(server.clock.held),
    }
