"""The grouped expert product: persistent CTAs drain a slice's queue of tiles, one expert's rows times its weights.

A tile's bits depend on its rows, weights and epilogue alone: K is walked in ascending order by one CTA and rounded
once, so that tile shape, grid, slice and neighbours are free choices. `reference.product` defines the result.

Shape letters: E experts, N routed rows, D columns that a product reads, F columns that it has before its epilogue.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from .activation import clamped_swiglu, pointwise, silu
from .pingpong import pingpong_product
from .prefetch import prefetch_share
from .queues import locate_tile
from .spec import BLOCK_M_AT, BLOCK_N_AT, INTERPRET, SLICES, LayerLaunch
from .weights import ProductWeights

if TYPE_CHECKING:
    from .workspace import Workspace

EPILOGUES = ("none", "relu", "gelu", "swiglu", "swiglu_clamped")


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """Round float32 to a dtype and back; Triton's interpreter would truncate to bf16."""
    if INTERPRET and DTYPE.is_bf16():
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        return tl.where(x != x, x, rounded)  # noqa: PLR0124
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def activate(x, EPILOGUE: tl.constexpr, PAIRED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Apply an epilogue to rounded products in float32; SwiGLU, clamped or not, returns half the columns.

    PAIRED: gate and up columns alternate; else a tile's first half is gate, its second half up.
    """
    if EPILOGUE == "swiglu" or EPILOGUE == "swiglu_clamped":  # noqa: PLR1714
        half: tl.constexpr = BLOCK_N // 2
        if PAIRED:
            pairs = tl.reshape(x, [BLOCK_M, half, 2])
        else:
            pairs = tl.permute(tl.reshape(x, [BLOCK_M, 2, half]), [0, 2, 1])
        gate, up = tl.split(pairs)
        x = clamped_swiglu(gate, up) if EPILOGUE == "swiglu_clamped" else silu(gate) * up
    else:
        x = pointwise(x, EPILOGUE)
    return x


@triton.jit
def weight_rows(col, n_dim, GATED: tl.constexpr, HALVES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return which weight row each column of a tile is; SwiGLU's gate and up rows alternate, or fill half each."""
    n_N = tl.arange(0, BLOCK_N)
    if GATED and HALVES:
        half: tl.constexpr = BLOCK_N // 2
        return col // 2 + n_N % half + n_N // half * (n_dim // 2)
    if GATED:
        return (col + n_N) // 2 + (col + n_N) % 2 * (n_dim // 2)
    return col + n_N


@triton.jit
def expert_tile(
    a, b, out_ptr, bias_ptr, scale_ptr, row_slot_ptr, offset_ptr, bias_offset_ptr, k_dim_ptr, n_dim_ptr,
    expert, row, row_stop, col, col_stop, k_dim, n_dim, a_pitch, out_pitch, top_k,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, UNEVEN: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN_K: tl.constexpr, A_DESC: tl.constexpr, B_DESC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute and store rows [row, row_stop) by columns [col, col_stop) of one expert's product, at most a tile."""
    GATED: tl.constexpr = EPILOGUE == "swiglu" or EPILOGUE == "swiglu_clamped"  # noqa: PLR1714
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    # An expert's start is 64 bits wide; what a tile adds to it fits 32, which spares registers.
    b_start = expert.to(tl.int64) * n_dim * k_dim
    bias_start = expert.to(tl.int64) * n_dim
    if UNEVEN:
        b_start = tl.multiple_of(tl.load(offset_ptr + expert), 16)
        bias_start = tl.load(bias_offset_ptr + expert)
        k_dim = tl.load(k_dim_ptr + expert)
        n_dim = tl.load(n_dim_ptr + expert)
        if ALIGNED:
            k_dim = tl.multiple_of(k_dim, 16)
        col_stop = tl.minimum(col_stop, n_dim)
    # Rows past the expert's are read and dropped: hidden buffers are a tile longer than their rows.
    m_M = tl.arange(0, BLOCK_M)
    row_slot_ptr += row
    if A_DESC:
        a_start_M = m_M
    elif GATHER:
        # Rows past the expert's are read as live ones again, which are at hand: one row for all of them would be
        # asked for by every SM at once.
        token_M = tl.load(row_slot_ptr + m_M % (row_stop - row)) // top_k
        a_start_M = token_M.to(tl.int64) * a_pitch
    else:
        a += row.to(tl.int64) * a_pitch
        a_start_M = m_M * a_pitch
    weight_N = tl.minimum(weight_rows(col, n_dim, GATED, B_DESC, BLOCK_N), n_dim - 1)
    k_K = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # A zero that the compiler does not know: else it would add fp32 products one by one to the whole sum.
    nothing = tl.full([BLOCK_M, BLOCK_N], (k_dim >> 31).to(tl.float32), tl.float32)
    lost = nothing
    for k in range(0, k_dim, BLOCK_K):
        if A_DESC:
            x = a.load([row, k])
        else:
            a_ptrs = a + a_start_M[:, None] + (k + k_K)[None, :]
            x = tl.load(a_ptrs) if EVEN_K else tl.load(a_ptrs, mask=(k + k_K < k_dim)[None, :], other=0.0)
        if B_DESC:
            if GATED:
                w = tl.reshape(b.load([expert * 2, col // 2, k]), [BLOCK_N, BLOCK_K]).T
            else:
                w = b.load([expert * n_dim + col, k]).T
        else:
            b_ptrs = b + b_start + (weight_N * k_dim)[None, :] + (k + k_K)[:, None]
            w = tl.load(b_ptrs) if EVEN_K else tl.load(b_ptrs, mask=(k + k_K < k_dim)[:, None], other=0.0)
        if INTERPRET:
            x, w = x.to(tl.float32), w.to(tl.float32)
        if OUT.is_fp32():
            # What rounding loses of the sum so far goes into the next addition (Kahan): the error stays that of a step.
            part = tl.dot(x, w, nothing, input_precision=PRECISION) - lost
            total = acc + part
            lost = (total - acc) - part
            acc = total
        else:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + bias_start + weight_N).to(tl.float32)[None, :]
    live_M = m_M < row_stop - row
    slot_M = tl.load(row_slot_ptr + m_M) if SCATTER or HAS_SCALE else m_M
    y = activate(round_to(acc, OUT), EPILOGUE, not B_DESC, BLOCK_M, BLOCK_N) if EPILOGUE != "none" else acc
    if HAS_SCALE:
        y = round_to(y, OUT) * tl.load(scale_ptr + slot_M, mask=live_M, other=0.0)[:, None]
    if INTERPRET:
        y = round_to(y, OUT)
    FACTOR: tl.constexpr = 2 if GATED else 1
    out_N = tl.multiple_of(col // FACTOR, 8) + tl.arange(0, BLOCK_N // FACTOR)
    if SCATTER:
        out_start_M = slot_M.to(tl.int64) * out_pitch
    else:
        out_ptr += row.to(tl.int64) * out_pitch
        out_start_M = m_M * out_pitch
    out_ptrs = out_ptr + out_start_M[:, None] + out_N[None, :]
    tl.store(out_ptrs, y.to(OUT), mask=live_M[:, None] & (out_N < col_stop // FACTOR)[None, :])


@triton.jit(do_not_specialize=["slice_id", "num_slices", "row_list", "top_k"])
def grouped_kernel(
    a, b, out_ptr, bias_ptr, scale_ptr, row_slot_ptr, offset_ptr, bias_offset_ptr, k_dim_ptr, n_dim_ptr,
    sizes_ptr, tiles_ptr, begins_ptr, offsets_ptr, tickets_ptr, weight_ptr,
    prefetch_bytes, slice_id, num_slices, row_list, k_dim, n_dim, a_pitch, out_pitch, top_k,
    STEAL: tl.constexpr, FLATTEN: tl.constexpr, DEPENDENT: tl.constexpr,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, UNEVEN: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN_K: tl.constexpr, A_DESC: tl.constexpr, B_DESC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Drain a slice's queue with a fixed stride, or by tickets and then the other slices' queues."""
    if DEPENDENT:
        prefetch_share(weight_ptr, prefetch_bytes)
        gdc_wait()
    if STEAL:
        for hop in range(num_slices):
            victim = (slice_id + hop) % num_slices
            begin = tl.load(begins_ptr + victim)
            # Another slice's tiles may be larger or smaller than ours: cut them by its geometry, walk them by our own.
            their_m = tl.load(sizes_ptr + BLOCK_M_AT + row_list * SLICES + victim)
            their_n = tl.load(sizes_ptr + BLOCK_N_AT + row_list * SLICES + victim)
            n_tiles = tl.cdiv(n_dim, their_n)
            num_tiles = (tl.load(begins_ptr + victim + 1) - begin) * n_tiles
            ticket = tl.atomic_add(tickets_ptr + victim, 1, sem="relaxed")
            while ticket < num_tiles:
                expert, row, row_end, n, _ = locate_tile(ticket, begin, tiles_ptr, offsets_ptr, n_tiles, their_m)
                row_stop = tl.minimum(row_end, row + their_m)
                col_stop = tl.minimum(n_dim, (n + 1) * their_n)
                num_m = tl.cdiv(row_stop - row, BLOCK_M)
                for sub in range(num_m * tl.cdiv(col_stop - n * their_n, BLOCK_N)):
                    expert_tile(
                        a, b, out_ptr, bias_ptr, scale_ptr, row_slot_ptr,
                        offset_ptr, bias_offset_ptr, k_dim_ptr, n_dim_ptr,
                        expert, row + sub % num_m * BLOCK_M, row_stop,
                        tl.multiple_of(n * their_n, 16) + sub // num_m * BLOCK_N, col_stop,
                        k_dim, n_dim, a_pitch, out_pitch, top_k,
                        GATHER, SCATTER, EPILOGUE, HAS_BIAS, HAS_SCALE, UNEVEN, ALIGNED, EVEN_K,
                        A_DESC, B_DESC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                    )  # fmt: skip
                ticket = tl.atomic_add(tickets_ptr + victim, 1, sem="relaxed")
    else:
        begin = tl.load(begins_ptr + slice_id)
        n_tiles = tl.cdiv(n_dim, BLOCK_N)
        num_tiles = (tl.load(begins_ptr + slice_id + 1) - begin) * n_tiles
        for i in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
            expert, row, row_end, n, _ = locate_tile(i, begin, tiles_ptr, offsets_ptr, n_tiles, BLOCK_M)
            expert_tile(
                a, b, out_ptr, bias_ptr, scale_ptr, row_slot_ptr,
                offset_ptr, bias_offset_ptr, k_dim_ptr, n_dim_ptr,
                expert, row, row_end, n * BLOCK_N, n_dim, k_dim, n_dim, a_pitch, out_pitch, top_k,
                GATHER, SCATTER, EPILOGUE, HAS_BIAS, HAS_SCALE, UNEVEN, ALIGNED, EVEN_K,
                A_DESC, B_DESC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    if DEPENDENT:
        # Not before: CTAs that only wait would take room from those that work.
        gdc_launch_dependents()


def weight_descriptor(held: ProductWeights, epilogue: str, block_n: int, block_k: int) -> TensorDescriptor:
    """Return the descriptor of a stacked weight: all rows, or [2 E, F / 2] halves where gate meets up."""
    rows = held.weight.numel() // held.k_dim
    if epilogue in ("swiglu", "swiglu_clamped"):
        half = held.n_dim // 2
        view = held.weight.view(rows // half, half, held.k_dim)
        return TensorDescriptor.from_tensor(view, [2, block_n // 2, block_k])
    return TensorDescriptor.from_tensor(held.weight.view(rows, held.k_dim), [block_n, block_k])


def grouped_product(
    x: Tensor,
    held: ProductWeights,
    out: Tensor,
    ws: "Workspace",
    launch: LayerLaunch,
    *,
    slice_id: int,
    product: int,
    num_products: int,
    epilogue: str,
    scale_TK: Tensor | None = None,
) -> None:
    """Launch one slice's part of one product.

    The first product gathers its rows from x [T, D] by token, unless the launch gathered them before; later ones read
    rows in expert order, in a buffer of the workspace. The last one stores rows at their place t * K + slot, scaled by
    the routing weight if one is given.
    """
    spec = launch.spec(slice_id, product, num_products)
    first, last = product == 0 and not launch.gathered, product == num_products - 1
    if spec.pingpong:
        if epilogue == "swiglu_clamped":
            raise ValueError("pingpong tiles know no clamped SwiGLU; choose another tile")
        if scale_TK is not None:
            raise ValueError("pingpong tiles do not scale by the routing weight; choose another tile")
        pingpong_product(x, held, out, ws, launch, spec, slice_id=slice_id, last=last, epilogue=epilogue)
        return
    block_k = spec.k_step(x.element_size())
    # The copy engine wants stacked weights whose rows start at multiples of 16 bytes; other weights load by pointers.
    by_desc = spec.descriptors and not held.uneven and held.k_dim * x.element_size() % 16 == 0
    a_desc = by_desc and not first
    row_list = 1 if last and launch.num_lists == 2 else 0
    dependent = launch.dependent and not INTERPRET.value
    grouped_kernel[(spec.num_ctas,)](
        TensorDescriptor.from_tensor(x[:, : held.k_dim], [spec.block_m, block_k]) if a_desc else x,
        weight_descriptor(held, epilogue, spec.block_n, block_k) if by_desc else held.weight,
        out, held.bias, scale_TK, ws.row_slot_N, held.offset_E, held.bias_offset_E, held.k_dim_E, held.n_dim_E,
        ws.tile_sizes(launch), ws.tiles_QC[row_list], ws.begins_QS[row_list], ws.offsets_E1, ws.tickets[product],
        held.weight, min(launch.prefetch_bytes, held.weight.nbytes),
        slice_id, len(launch.slices), row_list, held.k_dim, held.n_dim, x.stride(0), out.stride(0),
        ws.spec.top_k, STEAL=launch.steal, FLATTEN=spec.flatten and not first, DEPENDENT=dependent,
        GATHER=first, SCATTER=last, EPILOGUE=epilogue, HAS_BIAS=held.bias is not None,
        HAS_SCALE=scale_TK is not None, UNEVEN=held.uneven, ALIGNED=held.aligned,
        EVEN_K=not held.uneven and held.k_dim % block_k == 0, A_DESC=a_desc, B_DESC=by_desc,
        PRECISION="tf32" if launch.tf32 else "ieee",
        BLOCK_M=spec.block_m, BLOCK_N=spec.block_n, BLOCK_K=block_k,
        **spec.options, launch_pdl=dependent,
    )  # fmt: skip
