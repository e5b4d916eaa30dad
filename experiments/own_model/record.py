"""Serve planned steps with a static key-value cache and record the routing of every token.

Shape letters: T tokens of one step, L layers, K top-k, G slots, B sequences, C positions, N cached
positions, H heads, W head width, D model, S steps, M marks of one step.
"""

import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as fn
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .model import Decoder
from .schedule import RecordConfig, Request, StepRows, plan


class HostEvent:
    """Stands in for a CUDA event where there is no device."""

    def record(self) -> None:
        self.ns = time.perf_counter_ns()

    def elapsed_time(self, end: "HostEvent") -> float:
        return (end.ns - self.ns) / 1e6

    def query(self) -> bool:
        return True


class Server:
    """Runs steps of a model over a static key-value cache, one slot per running request.

    An eager step is bound by its launches, so the device first spins until the whole step is in its
    queue: the times between its events are then the device's own. `held` says per step whether it did
    wait; the gaps between steps are the spin and mean nothing.
    """

    def __init__(self, model: Decoder, requests: list[Request], cfg: RecordConfig) -> None:
        self.model, self.cfg, self.device = model, cfg, model.head.device
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
        self._events: list[list[torch.cuda.Event | HostEvent]] = []
        self.held: list[bool] = []

    @torch.no_grad()
    def run(self, steps: list[StepRows]) -> tuple[Tensor, Tensor]:
        """Run steps in order; return expert ids and gates of all their tokens, uint8 and fp16 [T, L, K]."""
        # One upload for all steps: a copy per step from pageable memory would stall the host.
        uploaded = []
        for columns in list(zip(*steps, strict=True))[:4]:
            column = torch.from_numpy(np.concatenate(columns)).to(self.device)
            uploaded.append(column.split([len(c) for c in columns]))
        chosen = []
        # cuDNN's attention would plan anew, on the host, for every cache length.
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            for rows, *on_device in zip(steps, *uploaded, strict=True):
                if self.device.type == "cuda":
                    torch.cuda._sleep(self.cfg.hold_cycles)
                self._events.append([])
                chosen.append(self._step(StepRows(*on_device, *rows[4:]), rows.key_lengths()))
                self.held.append(not self._events[-1][0].query())
        ids_TLK, gates_TLK = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        return ids_TLK, gates_TLK

    def times_ns(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give each step's start since the first, [S], and its marks since its start, [S, M]."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start_ms = [self._events[0][0].elapsed_time(events[0]) for events in self._events]
        marks_ms = [[events[0].elapsed_time(e) for e in events] for events in self._events]
        return (np.array(start_ms) * 1e6).astype(np.int64), (np.array(marks_ms) * 1e6).astype(np.int64)

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True) if self.device.type == "cuda" else HostEvent()
        event.record()
        self._events[-1].append(event)

    def _step(self, rows: StepRows, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Run one step (rows on the device): marks before and after each layer's two parts."""
        self._mark()
        turn_2TW = self.model.turns(rows.position_T)
        x_TD = self.model.embed(self.tokens[rows.request_T, rows.position_T]).to(self.model.dtype)
        routings = []
        for layer, block in enumerate(self.model.blocks):
            attend = partial(self._attend, layer=layer, rows=rows, lengths=lengths)
            x_TD = x_TD + block.attention(x_TD, turn_2TW, attend)
            self._mark()
            y_TD, routing = block.moe(x_TD)
            x_TD = x_TD + y_TD
            self._mark()
            routings.append(routing)
        self._sample(x_TD, rows)
        self._mark()
        ids_TLK, gates_TLK = (torch.stack(columns, 1) for columns in list(zip(*routings, strict=True))[:2])
        return ids_TLK.to(torch.uint8), gates_TLK.half()

    def _sample(self, x_TD: Tensor, rows: StepRows) -> None:
        logits = self.model.logits(x_TD[rows.sampled])[:, :256] / self.cfg.temperature
        noise = torch.empty_like(logits).exponential_(generator=self._random)
        # The largest of p / Exp(1) is a draw from p, and needs no check on the host.
        token = (logits.softmax(-1) / noise).argmax(-1)
        self.tokens[rows.request_T[rows.sampled], rows.position_T[rows.sampled] + 1] = token

    def _attend(
        self, q_THW: Tensor, k_THW: Tensor, v_THW: Tensor, *, layer: int, rows: StepRows, lengths: list[int]
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
    ids_TLK, gates_TLK = server.run(steps)
    start_ns, marks_SM = server.times_ns()
    spans_SM = np.diff(marks_SM, axis=1)
    request_T = np.concatenate([s.request_T for s in steps])
    is_decode = [np.arange(len(s.slot_T)) >= s.num_prefill for s in steps]
    return {
        "request_id": request_T.astype(np.int32),
        "position": np.concatenate([s.position_T for s in steps]).astype(np.int32),
        "phase": np.concatenate(is_decode).astype(np.uint8),
        "step": np.repeat(np.arange(len(steps)), [len(s.slot_T) for s in steps]).astype(np.int32),
        "domain": np.array([r.domain for r in requests], np.uint8)[request_T],
        "expert_ids": ids_TLK.cpu().numpy(),
        "gates": gates_TLK.cpu().numpy(),
        "step_start_ns": start_ns,
        "other_ns": spans_SM[:, 0:-1:2],
        "moe_ns": spans_SM[:, 1:-1:2],
        "head_ns": spans_SM[:, -1],
        "held": np.array(server.held),
    }
