"""A plain grouped expert product in Triton, there to say what each tile variant holds of an SM.

A bounded grid walks a queue of tiles in memory, so that a slice is a number of programs and its work is data. Routing,
epilogues and queues made on the device are not here; when `grouped` fixes the resources of its tiles, this file goes.

Shape letters: N routed rows sorted by expert, E experts, D contracted width, F output width, Q tiles of a queue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from triton import knobs


@triton.jit
def grouped_product_kernel(  # noqa: PLR0917
    x_ptr,
    w_ptr,
    out_ptr,
    offsets_ptr,
    queue_ptr,
    num_tiles_ptr,
    d_dim,
    f_dim,
    stride_x,
    stride_we,
    stride_wf,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Drain a queue of (expert, first row, first column): out = x @ w[expert].T, summed in fp32, rounded once."""
    # The count is read, not passed: a captured graph serves any routing.
    num_tiles = tl.load(num_tiles_ptr)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert = tl.load(queue_ptr + 3 * tile)
        row = tl.load(queue_ptr + 3 * tile + 1)
        # Without the hint the store cannot tell that its columns are aligned, and writes two bytes at a time.
        col = tl.multiple_of(tl.load(queue_ptr + 3 * tile + 2), BLOCK_N)
        rows = tl.load(offsets_ptr + expert + 1) - row
        cols = f_dim - col
        m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        # Scalars are 64 bits wide, what a tile adds to them is 32: pointers per element would spill registers.
        x_base = x_ptr + row.to(tl.int64) * stride_x
        w_base = w_ptr + expert.to(tl.int64) * stride_we + col.to(tl.int64) * stride_wf
        out_base = out_ptr + row.to(tl.int64) * stride_out + col
        # Rows and columns past the end are clamped for loads and dropped by the store: masks would cost in the loop.
        x_offsets = tl.minimum(m, rows - 1)[:, None] * stride_x + k[None, :]
        w_offsets = tl.minimum(n, cols - 1)[None, :] * stride_wf + k[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        # K ascending and one rounding at the end, so that no choice of tile changes a bit of the result.
        for start in tl.range(0, d_dim, BLOCK_K):
            if EVEN_K:
                x = tl.load(x_base + x_offsets)
                w = tl.load(w_base + w_offsets)
            else:
                x = tl.load(x_base + x_offsets, mask=k[None, :] < d_dim - start, other=0.0)
                w = tl.load(w_base + w_offsets, mask=k[:, None] < d_dim - start, other=0.0)
            if WIDEN:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            acc = tl.dot(x, w, acc, input_precision="ieee")
            x_base += BLOCK_K
            w_base += BLOCK_K
        inside = (m < rows)[:, None] & (n < cols)[None, :]
        tl.store(out_base + m[:, None] * stride_out + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """The compile-time shape of one variant."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def tile_queue(offsets_E1: Sequence[int], f_dim: int, tile: Tile) -> list[tuple[int, int, int]]:
    """Return (expert, first row, first column) of every tile in expert order; all row tiles of a column together.

    An expert's weights are then read from memory once.
    """
    return [
        (expert, row, col)
        for expert, (start, end) in enumerate(pairwise(offsets_E1))
        for col in range(0, f_dim, tile.block_n)
        for row in range(start, end, tile.block_m)
    ]


def grouped_product(
    x_ND: torch.Tensor,
    w_EFD: torch.Tensor,
    offsets_E1: torch.Tensor,
    queue_Q3: torch.Tensor,
    *,
    tile: Tile,
    num_ctas: int,
    out_NF: torch.Tensor,
) -> torch.Tensor:
    """Drain a queue with `num_ctas` programs and return `out_NF`.

    `offsets_E1` and `queue_Q3` are int32 on the device of x; the last axes of x, w and out are dense.
    """
    num_tiles = torch.tensor([queue_Q3.shape[0]], dtype=torch.int32, device=x_ND.device)
    grouped_product_kernel[(num_ctas,)](
        x_ND,
        w_EFD,
        out_NF,
        offsets_E1,
        queue_Q3,
        num_tiles,
        x_ND.shape[1],
        w_EFD.shape[1],
        x_ND.stride(0),
        w_EFD.stride(0),
        w_EFD.stride(1),
        out_NF.stride(0),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        EVEN_K=x_ND.shape[1] % tile.block_k == 0,
        # The interpreter multiplies raw bf16 bits: widen there.
        WIDEN=knobs.runtime.interpret and x_ND.dtype == torch.bfloat16,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_NF
