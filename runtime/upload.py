"""What a step needs on the device, side by side in one buffer, so that a single copy brings it there.

Shape letters: L MoE layers, T tokens, K top-k, E experts, W words of a plan, P places of other work, A what is asked of
a launch, N all ids of a step, R steps in flight.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl

from ..traces.schema import I32, I64, next_power_of_two
from .workload import CHOSEN, OTHERS, STEP_DOWN

ALIGN_BYTES = 16
PARTS = {"asked": torch.int64, "plans": torch.int32, "head": torch.int32, "ids": torch.int16}
"""In the order of the buffer: ids last, since a step has as many as it has tokens."""
LOGITS_BLOCK = 2048


@triton.jit
def logits_kernel(  # noqa: PLR0917
    ids_ptr, num_tokens_ptr, logits_ptr, max_tokens, num_experts, K: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, CHOSEN: tl.constexpr, STEP_DOWN: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Store logits [L, T, E] that choose the ids [L, T, K] in their order; rows without a token keep what they held."""
    num_tokens, layer = tl.load(num_tokens_ptr), tl.program_id(1)
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e_E = tl.arange(0, BLOCK_E)
    logits_TE = tl.full([BLOCK_T, BLOCK_E], OTHERS, tl.float32)
    for k in tl.static_range(K):
        id_T = tl.load(ids_ptr + (layer * num_tokens + t_T) * K + k, mask=t_T < num_tokens, other=-1)
        logits_TE = tl.where(e_E[None, :] == id_T[:, None].to(tl.int32), CHOSEN - STEP_DOWN * k, logits_TE)
    held_TE = (t_T < num_tokens)[:, None] & (e_E < num_experts)[None, :]
    at_TE = (layer * max_tokens + t_T)[:, None] * num_experts + e_E[None, :]
    tl.store(logits_ptr + at_TE, logits_TE.to(logits_ptr.dtype.element_ty), mask=held_TE)


class Upload:
    """The buffer on the device, and one in pinned host memory for each step in flight."""

    def __init__(self, num_steps: int, *, asked: tuple[int, ...], plans: tuple[int, ...], ids: int) -> None:
        """Allocate, all zeros: what is asked [L, P, A], plans [L, W] and so many ids."""
        shapes = {"asked": asked, "plans": plans, "head": (2,), "ids": (ids,)}
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
        self.asked_LPA, self.plans_LW, self.ids_N = views["asked"], views["plans"], views["ids"]
        self.num_tokens, self.slot = views["head"][:1], views["head"][1:]
        self._staged_R = [{name: view.numpy() for name, view in staged.items()} for staged in staged_R]
        for slot, staged in enumerate(self._staged_R):
            staged["head"][1] = slot
        self._held_R: list[object] = [None] * num_steps

    def send(
        self, slot: int, ids_LTK: np.ndarray, *, plan: object, fill: Callable[[I32], None], asked_LPA: I64 | None
    ) -> None:
        """Enqueue the way of a step's inputs to the device, from the buffer of a slot; nothing waits.

        Args:
            slot: whose last copy has ended.
            ids_LTK: the experts of the step's tokens.
            plan: known by identity.
            fill: writes the plan's words [L, W]; not called for a plan that the slot holds.
            asked_LPA: of other work; None: the step has none.
        """
        staged = self._staged_R[slot]
        staged["head"][0] = ids_LTK.shape[1]
        staged["ids"][: ids_LTK.size].reshape(ids_LTK.shape)[...] = ids_LTK
        if self._held_R[slot] is not plan:
            self._held_R[slot] = plan
            fill(staged["plans"])
        if asked_LPA is not None:
            staged["asked"][:] = asked_LPA
        end = self._ids_at + PARTS["ids"].itemsize * ids_LTK.size
        self._device[:end].copy_(self._host_R[slot, :end], non_blocking=True)

    def write_logits(self, logits_LTE: torch.Tensor, bucket: int, top_k: int) -> None:
        """Enqueue logits with which routing chooses the ids of whatever step is there, of at most `bucket` tokens."""
        num_layers, max_tokens, num_experts = logits_LTE.shape
        block_e = next_power_of_two(num_experts)
        block_t = max(1, LOGITS_BLOCK // block_e)
        logits_kernel[-(-bucket // block_t), num_layers](
            self.ids_N, self.num_tokens, logits_LTE, max_tokens, num_experts, K=top_k, BLOCK_T=block_t, BLOCK_E=block_e,
            CHOSEN=CHOSEN, STEP_DOWN=STEP_DOWN, OTHERS=OTHERS,
        )  # fmt: skip
