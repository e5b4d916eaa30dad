"""Weights asked for before they can be used, so that memory works while a launch waits for the one before it.

Nothing is loaded into the SM: lines come into L2, where the tiles find them.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import num_threads

from .spec import INTERPRET

LINE_BYTES = tl.constexpr(128)


@triton.jit
def prefetch_share(ptr, num_bytes):
    """Ask for this CTA's share of a run of memory, a line a thread."""
    if not INTERPRET:
        share = tl.cdiv(tl.cdiv(num_bytes, tl.num_programs(0)), LINE_BYTES) * LINE_BYTES
        first = tl.program_id(0) * share
        line_T = first + tl.arange(0, num_threads()) * LINE_BYTES
        for at in range(0, tl.minimum(share, num_bytes - first), num_threads() * LINE_BYTES):
            address_T = ptr.to(tl.int64) + tl.minimum(at + line_T, num_bytes - 1)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address_T], tl.int32, is_pure=False, pack=1
            )
