"""Work beside the experts, as opaque as traces give it: a streaming read of its bytes and a product of its FLOP.

One launch does both at once, so that it lasts as long as the longer of the two: the first half of its CTAs multiplies,
the other half reads, one of each on an SM. How much it does is read from the device: a captured launch serves any step.

Shape letters: L MoE layers, P places of a layer (before it, then beside each slice), A what is asked of a launch.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from ..kernels.spec import MAX_SLICES, TORCH_DTYPE
from ..traces.schema import I64, OtherWork

PLACES = 1 + MAX_SLICES
BEFORE = 0
"""The place of work that runs alone; that of slice s is 1 + s."""
TILE = {"bf16": (64, 256, 128), "fp16": (64, 256, 128), "fp32": (64, 64, 32)}
CHUNK_WORDS = 4096
NUM_WARPS = 4
L2_FACTOR = 4


@triton.jit
def other_kernel(  # noqa: PLR0917
    source_ptr, tile_ptr, sink_ptr, asked_ptr, source_words,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Read asked[0] bytes from word asked[2] on, around the source, and multiply asked[1] FLOP."""
    workers = tl.num_programs(0) // 2
    worker = tl.program_id(0) % workers
    if tl.program_id(0) < workers:
        steps = tl.cdiv(tl.load(asked_ptr + 1), 2 * BLOCK_M * BLOCK_N * BLOCK_K).to(tl.int32)
        k_K = tl.arange(0, BLOCK_K)
        a = tl.load(tile_ptr + tl.arange(0, BLOCK_M)[:, None] * BLOCK_K + k_K[None, :])
        b = tl.load(tile_ptr + tl.arange(0, BLOCK_N)[None, :] * BLOCK_K + k_K[:, None])
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for _ in range(worker, steps, workers):
            acc = tl.dot(a, b, acc, input_precision="ieee")
        # What is stored must be worked out.
        tl.store(sink_ptr + tl.program_id(0), tl.sum(tl.sum(acc, axis=1), axis=0))
    else:
        words = tl.cdiv(tl.load(asked_ptr), 16).to(tl.int32) * 4
        start = tl.load(asked_ptr + 2).to(tl.int32)
        i_C = tl.arange(0, CHUNK)
        seen = tl.zeros([CHUNK], tl.int32)
        coming = tl.zeros([CHUNK], tl.int32)
        for chunk in range(worker, tl.cdiv(words, CHUNK), workers):
            # The next chunk is on its way while the one before is folded in.
            at = tl.multiple_of((start + chunk) % (source_words // CHUNK) * CHUNK, 16)
            held = coming
            coming = tl.load(source_ptr + at + i_C, mask=chunk * CHUNK + i_C < words, other=0)
            seen ^= held
        tl.store(sink_ptr + tl.program_id(0), tl.sum(seen ^ coming, axis=0).to(tl.float32))


def asked_LPA(
    other_L: Sequence[Sequence[OtherWork]], num_layers: int, num_slices: int, start_chunk: int
) -> tuple[I64, int]:
    """Return bytes, FLOP and first chunk for every layer and place, and the chunk after the last one.

    Works of one place are one launch. Reads go on where those before them ended, so that they come from memory.
    """
    asked = np.zeros((num_layers, PLACES, 3), dtype=np.int64)
    for layer, works in enumerate(other_L):
        for work in works:
            on = work.on_slice(num_slices)
            asked[layer, BEFORE if on is None else 1 + on, :2] += work.hbm_bytes, work.flops
    chunks_LP = -(-asked[..., 0] // (4 * CHUNK_WORDS))
    ends = start_chunk + np.cumsum(chunks_LP)
    asked[..., 2] = ends.reshape(chunks_LP.shape) - chunks_LP
    return asked, int(ends[-1])


def slice_ids_of(other_L: Iterable[Iterable[OtherWork]]) -> frozenset[int | None]:
    """Return the slices that a step's other work names; None: before the layer."""
    return frozenset(work.slice_id for works in other_L for work in works)


def places_of(slice_ids: Iterable[int | None], num_slices: int) -> frozenset[int]:
    """Return the places of such work under a layout."""
    return frozenset(BEFORE if s is None else 1 + min(s, num_slices - 1) for s in slice_ids)


class OtherKernels:
    """The launches of other work, with what they read and where they put what nobody reads."""

    def __init__(self, asked: torch.Tensor, dtype: str, *, l2_bytes: int, sm_count: int) -> None:
        """`asked` [L, P, 3], int64, is filled before each step; the source exceeds L2 several times."""
        self.block_m, self.block_n, self.block_k = TILE[dtype]
        self._asked, self._sm_count, device = asked, sm_count, asked.device
        words = max(1, L2_FACTOR * l2_bytes // (4 * CHUNK_WORDS)) * CHUNK_WORDS
        self.num_chunks = words // CHUNK_WORDS
        # Not zeros, which would draw less power; the sum of a chunk fits 32 bits.
        self._source = torch.randint(1 << 18, (words,), dtype=torch.int32, device=device)
        # Small exact numbers, and not all alike.
        quarters = torch.arange(self.block_n * self.block_k, device=device) * 2654435761 % 7 - 3
        self._tile = (quarters / 4).to(TORCH_DTYPE[dtype])
        self._sink = torch.zeros(PLACES, 2 * sm_count, dtype=torch.float32, device=device)

    def launch(self, layer: int, place: int, sm_count: int | None = None) -> None:
        """Enqueue a layer's work of one place, on so many SMs."""
        grid = 2 * min(self._sm_count, sm_count or self._sm_count)
        other_kernel[(grid,)](
            self._source, self._tile, self._sink[place], self._asked[layer, place], self._source.numel(),
            BLOCK_M=self.block_m, BLOCK_N=self.block_n, BLOCK_K=self.block_k, CHUNK=CHUNK_WORDS, num_warps=NUM_WARPS,
        )  # fmt: skip
