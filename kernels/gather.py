"""Copy tokens into expert order, so that the first product reads rows that lie one after another.

Shape letters: T tokens, N routed rows, D model.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..traces.schema import next_power_of_two
from .spec import INTERPRET

if TYPE_CHECKING:
    from .workspace import Workspace

ROWS = 8
COLUMNS = 512


@triton.jit(do_not_specialize=["num_experts", "top_k"])
def gather_kernel(
    x_ptr, row_slot_ptr, offsets_ptr, out_ptr, d_model, num_experts, top_k, out_pitch,
    DEPENDENT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy a few rows; rows past the last expert's are left as they are."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row_N = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live_N = row_N < tl.load(offsets_ptr + num_experts)
    token_N = tl.load(row_slot_ptr + row_N, mask=live_N, other=0) // top_k
    from_N, to_N = token_N.to(tl.int64) * d_model, row_N.to(tl.int64) * out_pitch
    for start in range(0, d_model, BLOCK_D):
        d_D = start + tl.arange(0, BLOCK_D)
        mask = live_N[:, None] & (d_D < d_model)[None, :]
        x = tl.load(x_ptr + from_N[:, None] + d_D[None, :], mask=mask)
        tl.store(out_ptr + to_N[:, None] + d_D[None, :], x, mask=mask)


def gather(x_TD: Tensor, ws: "Workspace", *, dependent: bool = False) -> Tensor:
    """Return the workspace's rows [N, D], filled with each expert's tokens, expert by expert."""
    num_rows, d_model = x_TD.shape[0] * ws.spec.top_k, x_TD.shape[1]
    dependent = dependent and not INTERPRET.value
    gather_kernel[(-(-num_rows // ROWS),)](
        x_TD, ws.row_slot_N, ws.offsets_E1, ws.gathered_ND, d_model, ws.spec.num_experts, ws.spec.top_k,
        ws.gathered_ND.stride(0), DEPENDENT=dependent, ROWS=ROWS,
        BLOCK_D=min(COLUMNS, next_power_of_two(d_model)), launch_pdl=dependent,
    )  # fmt: skip
    return ws.gathered_ND
