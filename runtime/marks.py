"""Moments of one pass: before and after the experts of each layer, on the device's clock or on the host's.

Shape letters: L MoE layers.
"""

import time
from typing import Any

import numpy as np
import torch

from ..traces.schema import I64
from ..traces.trace import UNKNOWN


class Marks:
    """Marks 2l and 2l + 1 stand before and after the experts of layer l; the pass begins when this is made."""

    def __init__(self, device: torch.device, num_layers: int) -> None:
        self._on_device = device.type == "cuda"
        self._marks: list[Any] = [None] * (2 * num_layers)
        self._begin = self._now()

    def _now(self) -> Any:
        if not self._on_device:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, place: int) -> None:
        self._marks[place] = self._now()

    def spans_ns(self) -> I64:
        """Return what lay between marks, [L, 2]: before a layer's experts since those below, and the experts."""
        spans, before = [], self._begin
        for mark in self._marks:
            spans.append(self._between(before, mark))
            before = mark
        return np.array(spans, dtype=np.int64).reshape(-1, 2)

    def _between(self, first: Any, second: Any) -> int:
        if first is None or second is None:
            return UNKNOWN
        return round(first.elapsed_time(second) * 1e6) if self._on_device else second - first
