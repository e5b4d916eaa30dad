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

from ...traces.requests import phases_of
from ...traces.schema import Provenance
from ...traces.trace import UNKNOWN, RoutingTrace, StepTable
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
    def run(self, steps: list[StepRows]) -> Tensor:
        """Run steps in order; return expert ids of all their tokens, uint8 [T, L, K]."""
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
        return torch.cat(chosen)

    def spans_ns(self) -> NDArray[np.int64]:
        """Give the times between the marks of each step, [S, M - 1]: by layer attention and experts, then the head."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        marks_ms = [[events[0].elapsed_time(e) for e in events] for events in self._events]
        return np.diff((np.array(marks_ms) * 1e6).astype(np.int64), axis=1)

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True) if self.device.type == "cuda" else HostEvent()
        event.record()
        self._events[-1].append(event)

    def _step(self, rows: StepRows, lengths: list[int]) -> Tensor:
        """Run one step (rows on the device): marks before and after each layer's two parts."""
        self._mark()
        turn_2TW = self.model.turns(rows.position_T)
        x_TD = self.model.embed(self.tokens[rows.request_T, rows.position_T]).to(self.model.dtype)
        chosen = []
        for layer, block in enumerate(self.model.blocks):
            attend = partial(self._attend, layer=layer, rows=rows, lengths=lengths)
            x_TD = x_TD + block.attention(x_TD, turn_2TW, attend)
            self._mark()
            y_TD, routing = block.moe(x_TD)
            x_TD = x_TD + y_TD
            self._mark()
            chosen.append(routing.ids_TK.to(torch.uint8))
        self._sample(x_TD, rows)
        self._mark()
        return torch.stack(chosen, 1)

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


def record(
    model: Decoder, prompts: dict[str, NDArray[np.int64]], cfg: RecordConfig, provenance: Provenance
) -> RoutingTrace:
    """Serve both workloads, prompts [chunks, C] by domain; return their routing and times, without text or token ids.

    Steps follow each other at once, without the recorder's idle time; those bound by the host have no times.
    """
    requests, steps = plan(list(prompts.values()), cfg)
    Server(model, requests, cfg).run(steps[:20])  # warms allocator and kernel choice; a trial, not recorded
    server = Server(model, requests, cfg)
    ids_TLK = server.run(steps).cpu().numpy()
    spans_SM, known_S1 = server.spans_ns(), np.array(server.held)[:, None]
    request_T = np.concatenate([s.request_T for s in steps])
    phase_T = np.concatenate([np.arange(len(s.slot_T)) >= s.num_prefill for s in steps]).astype(np.uint8)
    step_T = np.repeat(np.arange(len(steps)), [len(s.slot_T) for s in steps])
    table = StepTable(
        phase_S=phases_of(phase_T, step_T, len(steps)),
        segment_S=np.zeros(len(steps), dtype=np.uint8),
        start_ns_S=np.cumsum(spans_SM.sum(axis=1)) - spans_SM.sum(axis=1),
        moe_ns_SL=np.where(known_S1, spans_SM[:, 1:-1:2], UNKNOWN),
        other_ns_SL=np.where(known_S1, spans_SM[:, 0:-1:2], UNKNOWN),
    )
    return RoutingTrace(
        num_experts=model.cfg.num_experts,
        provenance=provenance,
        request_id_T=request_T,
        position_T=np.concatenate([s.position_T for s in steps]).astype(np.int32),
        phase_T=phase_T,
        step_T=step_T,
        domain_T=np.array([r.domain for r in requests], np.int16)[request_T],
        expert_ids_TLK=ids_TLK,
        step_table=table,
        domains=tuple(prompts),
    )
