"""What a step needs of a device whatever the plan.

Shape letters: L MoE layers, E routed experts.
"""

from typing import NamedTuple

import numpy as np

from ..traces.schema import DTYPE_BYTES, MoeSpec, RoutedStep


class StepNeeds(NamedTuple):
    """What a step needs whatever the plan: bytes that must move once and FLOP without padding."""

    hbm_bytes: int
    """Weights of the experts hit, tokens in and out, and other work's bytes."""
    flops_L: list[int]

    @property
    def flops(self) -> int:
        """Of all layers."""
        return sum(self.flops_L)


class Needs:
    """The needs of steps of one model."""

    def __init__(self, model: MoeSpec) -> None:
        experts = range(model.num_experts)
        self._bytes_E = np.array([model.expert_bytes(e) for e in experts], dtype=np.int64)
        self._flops_E = self._bytes_E // DTYPE_BYTES[model.dtype] * 2
        self._token_bytes = 2 * model.d_model * DTYPE_BYTES[model.dtype]
        self._top_k = model.top_k

    def of(self, step: RoutedStep) -> StepNeeds:
        """Return what a step needs."""
        counts_LE = step.counts_LE.astype(np.int64)
        flops_L: list[int] = (counts_LE @ self._flops_E).tolist()
        hbm_bytes = int(((counts_LE > 0) @ self._bytes_E).sum())
        hbm_bytes += int(counts_LE.sum()) // self._top_k * self._token_bytes
        for layer, works in enumerate(step.other_L):
            flops_L[layer] += sum(work.flops for work in works)
            hbm_bytes += sum(work.hbm_bytes for work in works)
        return StepNeeds(hbm_bytes, flops_L)
