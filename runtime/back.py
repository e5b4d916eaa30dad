"""What comes back of a step: counts and stamps, which the device itself stores into host memory, in the step's slot.

Shape letters: L MoE layers, E experts, S slices, R steps in flight.
"""

import torch
import triton
import triton.language as tl

from ..kernels.spec import MAX_SLICES
from ..traces.schema import I32, I64

BLOCK = 1024


@triton.jit
def back_kernel(
    counts_ptr, counts_out_ptr, num_counts, stamps_ptr, stamps_out_ptr, num_stamps, slot_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    """Copy counts and stamps to their places of a slot; each program a block of both."""
    slot = tl.load(slot_ptr).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts = tl.load(counts_ptr + at, mask=at < num_counts)
    tl.store(counts_out_ptr + slot * num_counts + at, counts, mask=at < num_counts)
    stamps = tl.load(stamps_ptr + at, mask=at < num_stamps)
    tl.store(stamps_out_ptr + slot * num_stamps + at, stamps, mask=at < num_stamps)


class Back:
    """Counts and stamps of a step on the device, and a place in pinned host memory for each step in flight."""

    def __init__(self, num_steps: int, num_layers: int, num_experts: int) -> None:
        """Allocate, all zeros."""
        num_stamps = 2 * (1 + num_layers * MAX_SLICES)
        self.counts_LE = torch.zeros(num_layers, num_experts, dtype=torch.int32, device="cuda")
        self._stamps = torch.zeros(num_stamps, dtype=torch.int64, device="cuda")
        self.begin, self.end = self._stamps[:1], self._stamps[1:2]
        """Where a step's own stamps belong."""
        self.stamps_LS2 = self._stamps[2:].view(num_layers, MAX_SLICES, 2)
        self._counts_RLE = torch.zeros(num_steps, num_layers, num_experts, dtype=torch.int32, pin_memory=True)
        self._stamps_R = torch.zeros(num_steps, num_stamps, dtype=torch.int64, pin_memory=True)
        self._host = self._counts_RLE.numpy(), self._stamps_R.numpy()
        self._ended_R: list[torch.cuda.Event] = [torch.cuda.Event() for _ in range(num_steps)]

    def bring(self, slot: torch.Tensor) -> None:
        """Enqueue the way back into a slot, which the device reads when it gets there."""
        most = max(self.counts_LE.numel(), self._stamps.numel())
        back_kernel[(triton.cdiv(most, BLOCK),)](
            self.counts_LE, self._counts_RLE, self.counts_LE.numel(), self._stamps, self._stamps_R,
            self._stamps.numel(), slot, BLOCK=BLOCK,
        )  # fmt: skip

    def ends(self, slot: int) -> None:
        """Take note that a slot is filled once the device is here."""
        self._ended_R[slot].record()

    def is_there(self, slot: int, *, wait: bool) -> bool:
        """Return whether a slot is filled; waits for it if told to."""
        if wait:
            self._ended_R[slot].synchronize()
        return wait or self._ended_R[slot].query()

    def counts(self, slot: int) -> I32:
        """Return the counts [L, E] of a filled slot; they change when the slot is filled again."""
        return self._host[0][slot]

    def stamps(self, slot: int, num_slices: int) -> tuple[I64, I64]:
        """Return when a filled slot's step began and ended [2], and its slices [L, S, 2], by the device's timer."""
        stamps = self._host[1][slot]
        return stamps[:2].copy(), stamps[2:].reshape(*self.stamps_LS2.shape)[:, :num_slices].copy()
