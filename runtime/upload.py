"""What a step needs on the device, side by side in one buffer, so that a single copy brings it there.

Shape letters: L MoE layers, T tokens, K top-k, W words of a plan, P places of other work, A what is asked of a launch,
R steps in flight.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from ..traces.schema import I32, I64

ALIGN_BYTES = 16
PARTS = {"asked": torch.int64, "plans": torch.int32, "num_tokens": torch.int32, "ids": torch.int16}
"""In the order of the buffer: ids last, since a step has as many as it has tokens."""


class Upload:
    """The buffer on the device, and one in pinned host memory for each step in flight."""

    def __init__(self, num_steps: int, *, asked: tuple[int, ...], plans: tuple[int, ...], ids: int) -> None:
        """Allocate, all zeros: what is asked [L, P, A], plans [L, W] and so many ids."""
        shapes = {"asked": asked, "plans": plans, "num_tokens": (1,), "ids": (ids,)}
        at, size = dict[str, slice](), 0
        for name, dtype in PARTS.items():
            at[name] = slice(size, size + math.prod(shapes[name]) * dtype.itemsize)
            size = -(-at[name].stop // ALIGN_BYTES) * ALIGN_BYTES
        self._ids_at = at["ids"].start
        self._device = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self._host_R = torch.zeros(num_steps, size, dtype=torch.uint8, pin_memory=True)
        views, *staged_R = (
            {name: one[at[name]].view(dtype).view(shapes[name]) for name, dtype in PARTS.items()}
            for one in (self._device, *self._host_R)
        )
        self.asked_LPA, self.plans_LW = views["asked"], views["plans"]
        self.num_tokens, self._ids = views["num_tokens"], views["ids"]
        self._staged_R = [{name: view.numpy() for name, view in staged.items()} for staged in staged_R]
        self._held_R: list[object] = [None] * num_steps

    def send(
        self, slot: int, ids_LTK: np.ndarray, *, plan: object, words_LW: Callable[[], I32], asked_LPA: I64 | None
    ) -> torch.Tensor:
        """Enqueue the way of a step's inputs to the device, from the buffer of a slot; nothing waits.

        Args:
            slot: whose last copy has ended.
            ids_LTK: the experts of the step's tokens.
            plan: known by identity.
            words_LW: returns the plan's words; not called for a plan that the slot holds.
            asked_LPA: of other work; None: the step has none.

        Returns:
            The ids on the device, [L, T, K] int16.
        """
        staged = self._staged_R[slot]
        staged["num_tokens"][0] = ids_LTK.shape[1]
        staged["ids"][: ids_LTK.size] = ids_LTK.ravel()
        if self._held_R[slot] is not plan:
            self._held_R[slot] = plan
            staged["plans"][:] = words_LW()
        if asked_LPA is not None:
            staged["asked"][:] = asked_LPA
        end = self._ids_at + PARTS["ids"].itemsize * ids_LTK.size
        self._device[:end].copy_(self._host_R[slot, :end], non_blocking=True)
        return self._ids[: ids_LTK.size].view(ids_LTK.shape)
