"""The combine: each token's weighted sum over its slots, in slot order, rounded once. `reference.combine` defines it.

Shape letters: T tokens, K top-k, D model.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..traces.schema import next_power_of_two
from .grouped import round_to
from .routing import live_tokens
from .spec import INTERPRET


@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(
    rows_ptr, weights_ptr, out_ptr, num_tokens_ptr, num_rows, d_model, rows_pitch,
    TOP_K: tl.constexpr, PADDED: tl.constexpr, DEPENDENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum one token's slots over a block of columns; padding rows get zeros."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d_D < d_model
    live = inside & (token < live_tokens(num_tokens_ptr, num_rows, PADDED))
    total_D = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(TOP_K):
        row = token * TOP_K + k
        part_D = tl.load(rows_ptr + row * rows_pitch + d_D, mask=live, other=0.0).to(tl.float32)
        total_D += tl.load(weights_ptr + row) * part_D
    if INTERPRET:
        total_D = round_to(total_D, out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * d_model + d_D, total_D.to(out_ptr.dtype.element_ty), mask=inside)


def combine(
    rows_ND: Tensor, weights_TK: Tensor, out_TD: Tensor, *, num_tokens: Tensor | None = None, dependent: bool = False
) -> None:
    """Fill out [T, D] from rows at their places t * K + slot."""
    num_rows, d_model = out_TD.shape
    if num_rows == 0:
        return
    dependent = dependent and not INTERPRET.value
    block_d = min(1024, next_power_of_two(d_model))
    combine_kernel[(num_rows, -(-d_model // block_d))](
        rows_ND, weights_TK, out_TD, num_tokens, num_rows, d_model, rows_ND.stride(0),
        TOP_K=weights_TK.shape[1], PADDED=num_tokens is not None, DEPENDENT=dependent, BLOCK_D=block_d,
        # A fused multiply-add would round differently from the definition.
        num_warps=4, enable_fp_fusion=False, launch_pdl=dependent,
    )  # fmt: skip
