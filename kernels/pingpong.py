"""The grouped expert product by specialised warps, for Hopper: one warp loads, two warp groups multiply in turn.

While one group rounds, activates and stores its tile, the matrix units work on the other's. Loads run ahead through a
ring of stages, in the order in which the groups take tiles. An expert's last tile, if half of its rows or fewer are
left, loads and multiplies only that half. K is walked in ascending order and rounded once, as in `grouped`: the bits
are the same.

Shape letters: M rows of a tile, N columns, K columns that a product walks.
"""

from typing import TYPE_CHECKING

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import activation, queues
from .spec import LaunchSpec, LayerLaunch
from .weights import ProductWeights

if TYPE_CHECKING:
    from .workspace import Workspace

HALF_M = gl.constexpr(64)
"""Rows of the smallest matrix instruction of a warp group: what a short tile has."""
BLOCK_K = gl.constexpr(64)
"""128 bytes: a row of the widest swizzle that the copy engine and the matrix units share."""
GROUP_WARPS = gl.constexpr(4)
REGS = 168
"""A thread's, for three warp groups; the loading one hands most of its own to the others."""
GROUP_REGS = gl.constexpr(240)
LOADER_REGS = gl.constexpr(24)

silu, pointwise = gluon.jit(activation.silu.fn), gluon.jit(activation.pointwise.fn)
locate_tile = gluon.jit(queues.locate_tile.fn)


@gluon.jit
def load_tiles(
    a_desc, b_desc, a_bufs, b_bufs, ready, empty, tiles_ptr, offsets_ptr, begin, num_tiles, n_tiles, num_k, n_dim,
    GATED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring with the operands of this CTA's tiles."""
    half_n: gl.constexpr = BLOCK_N // 2
    tall_bytes: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K * 2
    short_bytes: gl.constexpr = (HALF_M + BLOCK_N) * BLOCK_K * 2
    step = 0
    for i in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, row, row_end, n, _ = locate_tile(i, begin, tiles_ptr, offsets_ptr, n_tiles, BLOCK_M)
        tall = row_end - row > HALF_M
        # A tile's columns are two runs of weight rows: of SwiGLU gate and up, else neighbours.
        first = expert * n_dim + n * (half_n if GATED else BLOCK_N)
        second = first + (n_dim // 2 if GATED else half_n)
        for k in range(num_k):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            bar, a, b = ready.index(stage), a_bufs.index(stage), b_bufs.index(stage)
            if BLOCK_M > HALF_M:
                mbarrier.expect(bar, tall_bytes, pred=tall)
                mbarrier.expect(bar, short_bytes, pred=row_end - row <= HALF_M)
            else:
                mbarrier.expect(bar, short_bytes)
            tma.async_copy_global_to_shared(a_desc, [row, k * BLOCK_K], bar, a.slice(0, HALF_M))
            tma.async_copy_global_to_shared(b_desc, [first, k * BLOCK_K], bar, b.slice(0, half_n))
            tma.async_copy_global_to_shared(b_desc, [second, k * BLOCK_K], bar, b.slice(half_n, half_n))
            if BLOCK_M > HALF_M:
                tma.async_copy_global_to_shared(
                    a_desc, [row + HALF_M, k * BLOCK_K], bar, a.slice(HALF_M, HALF_M), pred=tall
                )
            step += 1


@gluon.jit
def activate(x, EPILOGUE: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr):
    """Apply an epilogue to rounded products in float32, as `grouped.activate`; gate columns lie before up columns."""
    if EPILOGUE == "swiglu":
        gate, up = x.reshape([ROWS, 2, BLOCK_N // 2]).permute([0, 2, 1]).split()
        x = silu(gate) * up
    else:
        x = pointwise(x, EPILOGUE)
    return x


@gluon.jit
def multiply_tile(
    a_bufs, b_bufs, ready, empty, next_turn, step, num_k, out_ptr, bias_ptr, row_slot_ptr, bias_start, row, row_end, n,
    n_dim, out_pitch, SCATTER: gl.constexpr, EPILOGUE: gl.constexpr, HAS_BIAS: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply one tile as its operands arrive, and store it."""
    OUT: gl.constexpr = out_ptr.dtype.element_ty
    GATED: gl.constexpr = EPILOGUE == "swiglu"
    half_n: gl.constexpr = BLOCK_N // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[GROUP_WARPS, 1], instr_shape=[16, BLOCK_N, 16]
    )
    acc = gl.zeros([ROWS, BLOCK_N], gl.float32, mma)
    for k in range(num_k):
        stage = (step + k) % STAGES
        mbarrier.wait(ready.index(stage), (step + k) // STAGES & 1)
        a, b = a_bufs.index(stage).slice(0, ROWS), b_bufs.index(stage).permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        mbarrier.arrive(empty.index((step + k + STAGES - 1) % STAGES), count=1, pred=k > 0)
    mbarrier.arrive(next_turn, count=1)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(empty.index((step + num_k - 1) % STAGES), count=1)
    if HAS_BIAS:
        j_N = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, mma))
        col_N = n * BLOCK_N + j_N
        if GATED:
            col_N = n * half_n + j_N % half_n + j_N // half_n * (n_dim // 2)
        acc += gl.load(bias_ptr + bias_start + gl.minimum(col_N, n_dim - 1)).to(gl.float32)[None, :]
    y = acc.to(OUT)
    if EPILOGUE != "none":
        y = activate(y.to(gl.float32), EPILOGUE, ROWS, BLOCK_N).to(OUT)
    WIDTH: gl.constexpr = half_n if GATED else BLOCK_N
    # 16 bytes a thread, whole rows by neighbouring threads.
    lanes: gl.constexpr = WIDTH // 8 if WIDTH < 256 else 32
    rowwise: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [GROUP_WARPS, 1], [1, 0])
    y = gl.convert_layout(y, rowwise)
    m_M = gl.arange(0, ROWS, layout=gl.SliceLayout(1, rowwise))
    col_N = n * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, rowwise))
    live_M = m_M < row_end - row
    place_M = row + m_M
    if SCATTER:
        place_M = gl.load(row_slot_ptr + row + m_M, mask=live_M, other=0)
    out_ptrs = out_ptr + (place_M.to(gl.int64) * out_pitch)[:, None] + col_N[None, :]
    gl.store(out_ptrs, y, mask=live_M[:, None] & (col_N < n_dim // (2 if GATED else 1))[None, :])


@gluon.jit
def multiply_tiles(
    turn, turns, a_bufs, b_bufs, ready, empty, tiles_ptr, offsets_ptr, begin, num_tiles, n_tiles, num_k, n_dim,
    out_ptr, bias_ptr, row_slot_ptr, out_pitch, SCATTER: gl.constexpr, EPILOGUE: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply every other tile of this CTA: those of a turn, 0 or 1.

    A group waits until the other has seen the last operands of the tile before: a stage's barrier tells only odd
    fillings from even ones, so whoever waits on it must not be two fillings ahead.
    """
    step, phase = turn * num_k, 1 - turn
    for i in range(gl.program_id(0) + turn * gl.num_programs(0), num_tiles, 2 * gl.num_programs(0)):
        expert, row, row_end, n, _ = locate_tile(i, begin, tiles_ptr, offsets_ptr, n_tiles, BLOCK_M)
        bias_start = expert.to(gl.int64) * n_dim
        mbarrier.wait(turns.index(turn), phase)
        tall = row_end - row > HALF_M if BLOCK_M > HALF_M else False
        if tall:
            multiply_tile(
                a_bufs, b_bufs, ready, empty, turns.index(1 - turn), step, num_k, out_ptr, bias_ptr, row_slot_ptr,
                bias_start, row, row_end, n, n_dim, out_pitch, SCATTER, EPILOGUE, HAS_BIAS, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
        else:
            multiply_tile(
                a_bufs, b_bufs, ready, empty, turns.index(1 - turn), step, num_k, out_ptr, bias_ptr, row_slot_ptr,
                bias_start, row, row_end, n, n_dim, out_pitch, SCATTER, EPILOGUE, HAS_BIAS, HALF_M, BLOCK_N, STAGES,
            )  # fmt: skip
        step += 2 * num_k
        phase ^= 1


@gluon.jit(do_not_specialize=["slice_id"])
def pingpong_kernel(
    a_desc, b_desc, out_ptr, bias_ptr, row_slot_ptr, tiles_ptr, begins_ptr, offsets_ptr,
    slice_id, k_dim, n_dim, out_pitch,
    SCATTER: gl.constexpr, EPILOGUE: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Drain a slice's queue with a fixed stride."""
    GATED: gl.constexpr = EPILOGUE == "swiglu"
    a_bufs = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], b_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for turn in gl.static_range(2):
        mbarrier.init(turns.index(turn), count=1)
    begin = gl.load(begins_ptr + slice_id)
    n_tiles = gl.cdiv(n_dim, BLOCK_N)
    num_tiles = (gl.load(begins_ptr + slice_id + 1) - begin) * n_tiles
    num_k = gl.cdiv(k_dim, BLOCK_K)
    gl.warp_specialize(
        [
            (
                multiply_tiles,
                (
                    0, turns, a_bufs, b_bufs, ready, empty, tiles_ptr, offsets_ptr, begin, num_tiles, n_tiles, num_k,
                    n_dim, out_ptr, bias_ptr, row_slot_ptr, out_pitch, SCATTER, EPILOGUE, HAS_BIAS, BLOCK_M,
                    BLOCK_N, STAGES,
                ),
            ),
            (
                multiply_tiles,
                (
                    1, turns, a_bufs, b_bufs, ready, empty, tiles_ptr, offsets_ptr, begin, num_tiles, n_tiles, num_k,
                    n_dim, out_ptr, bias_ptr, row_slot_ptr, out_pitch, SCATTER, EPILOGUE, HAS_BIAS, BLOCK_M,
                    BLOCK_N, STAGES,
                ),
            ),
            (
                load_tiles,
                (
                    a_desc, b_desc, a_bufs, b_bufs, ready, empty, tiles_ptr, offsets_ptr, begin, num_tiles, n_tiles,
                    num_k, n_dim, GATED, BLOCK_M, BLOCK_N, STAGES,
                ),
            ),
        ],
        [GROUP_WARPS, 1],
        [GROUP_REGS, LOADER_REGS],
    )  # fmt: skip


def descriptor(rows: Tensor, block_rows: int) -> TensorDescriptor:
    """Return the descriptor of a matrix whose columns a product walks."""
    block = [block_rows, BLOCK_K.value]
    return TensorDescriptor.from_tensor(rows, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))


def pingpong_product(
    x: Tensor,
    held: ProductWeights,
    out: Tensor,
    ws: "Workspace",
    launch: LayerLaunch,
    spec: LaunchSpec,
    *,
    slice_id: int,
    last: bool,
    epilogue: str,
) -> None:
    """Launch one slice's part of one product on rows in expert order, by specialised warps.

    Raises:
        ValueError: the experts differ in width, or the dtype, the width or the device is none that this kernel takes.
    """
    if held.uneven or x.element_size() != 2 or held.k_dim % 8 or not ws.chains:
        raise ValueError(
            f"pingpong tiles on {x.device} for {x.dtype} rows of {held.k_dim}: they take two-byte rows of a multiple "
            "of 8 columns, experts of one width, and a Hopper GPU; choose another tile"
        )
    row_list = 1 if last and launch.num_lists == 2 else 0
    pingpong_kernel[(spec.num_ctas,)](
        descriptor(x[:, : held.k_dim], HALF_M.value),
        descriptor(held.weight.view(-1, held.k_dim), spec.block_n // 2),
        out, held.bias, ws.row_slot_N, ws.tiles_QC[row_list], ws.begins_QS[row_list], ws.offsets_E1,
        slice_id, held.k_dim, held.n_dim, out.stride(0),
        SCATTER=last, EPILOGUE=epilogue, HAS_BIAS=held.bias is not None,
        BLOCK_M=spec.block_m, BLOCK_N=spec.block_n, STAGES=spec.num_stages, num_warps=GROUP_WARPS.value, maxnreg=REGS,
    )  # fmt: skip
