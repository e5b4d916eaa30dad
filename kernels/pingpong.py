"""The grouped expert product by specialised warps, for Hopper: one warp loads, two warp groups multiply in turn.

While one group rounds, activates and stores its tile of 64 rows, the matrix units work on the other's. Loads run ahead
through a ring of stages, in the order in which the groups take tiles. K is walked in ascending order and rounded once,
as in `grouped`: the bits are the same.

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

BLOCK_M = gl.constexpr(64)
"""Rows of a tile: those of a warp group's matrix instruction."""
CHUNK_K = gl.constexpr(64)
"""128 bytes: a row of the widest swizzle that the copy engine and the matrix units share. A stage holds one or two:
with two, memory is read in longer runs and groups meet half as often."""
GROUP_WARPS = gl.constexpr(4)
REGS = 168
"""A thread's, for three warp groups; the loading one hands most of its own to the others."""
GROUP_REGS = gl.constexpr(240)
LOADER_REGS = gl.constexpr(24)

silu, pointwise = gluon.jit(activation.silu.fn), gluon.jit(activation.pointwise.fn)
locate_tile = gluon.jit(queues.locate_tile.fn)


@gluon.jit
def load_tiles(a_desc, b_desc, ring, GATED: gl.constexpr, tile: gl.constexpr):
    """Fill the ring with the operands of this CTA's tiles."""
    a_bufs, b_bufs, ready, empty, tiles_ptr, offsets_ptr, begin, num_tiles, n_tiles, num_k, n_dim = ring
    BLOCK_N: gl.constexpr = tile[0]
    STAGES: gl.constexpr = tile[1]
    CHUNKS: gl.constexpr = tile[2]
    half_n: gl.constexpr = BLOCK_N // 2
    stage_bytes: gl.constexpr = (BLOCK_M + BLOCK_N) * CHUNKS * CHUNK_K * 2
    step = 0
    for i in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, row, _, n, _ = locate_tile(i, begin, tiles_ptr, offsets_ptr, n_tiles, BLOCK_M)
        # A tile's columns are two runs of weight rows: of SwiGLU gate and up, else neighbours.
        first = expert * n_dim + n * (half_n if GATED else BLOCK_N)
        second = first + (n_dim // 2 if GATED else half_n)
        for k in range(num_k):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, stage_bytes)
            # Chunk by chunk of each run, so that what lies together in memory is asked for together.
            for run in gl.static_range(2):
                for c in gl.static_range(CHUNKS):
                    b, at = b_bufs.index(stage * CHUNKS + c), (k * CHUNKS + c) * CHUNK_K
                    from_row = first if run == 0 else second
                    tma.async_copy_global_to_shared(b_desc, [from_row, at], bar, b.slice(run * half_n, half_n))
            for c in gl.static_range(CHUNKS):
                a, at = a_bufs.index(stage * CHUNKS + c), (k * CHUNKS + c) * CHUNK_K
                tma.async_copy_global_to_shared(a_desc, [row, at], bar, a)
            step += 1


@gluon.jit
def activate(x, EPILOGUE: gl.constexpr, BLOCK_N: gl.constexpr):
    """Apply an epilogue to rounded products in float32, as `grouped.activate`; gate columns lie before up columns."""
    if EPILOGUE == "swiglu":
        gate, up = x.reshape([BLOCK_M, 2, BLOCK_N // 2]).permute([0, 2, 1]).split()
        x = silu(gate) * up
    else:
        x = pointwise(x, EPILOGUE)
    return x


@gluon.jit
def multiply_tile(ring, out, next_turn, step, expert, row, row_end, n, role: gl.constexpr, tile: gl.constexpr):
    """Multiply one tile as its operands arrive, and store it."""
    a_bufs, b_bufs, ready, empty, _, _, _, _, _, num_k, n_dim = ring
    out_ptr, bias_ptr, row_slot_ptr, out_pitch = out
    SCATTER: gl.constexpr = role[0]
    EPILOGUE: gl.constexpr = role[1]
    HAS_BIAS: gl.constexpr = role[2]
    BLOCK_N: gl.constexpr = tile[0]
    STAGES: gl.constexpr = tile[1]
    CHUNKS: gl.constexpr = tile[2]
    OUT: gl.constexpr = out_ptr.dtype.element_ty
    GATED: gl.constexpr = EPILOGUE == "swiglu"
    half_n: gl.constexpr = BLOCK_N // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[GROUP_WARPS, 1], instr_shape=[16, BLOCK_N, 16]
    )
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, mma)
    for k in range(num_k):
        stage = (step + k) % STAGES
        mbarrier.wait(ready.index(stage), (step + k) // STAGES & 1)
        for c in gl.static_range(CHUNKS):
            a = a_bufs.index(stage * CHUNKS + c)
            acc = warpgroup_mma(a, b_bufs.index(stage * CHUNKS + c).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=CHUNKS, deps=(acc,))
        mbarrier.arrive(empty.index((step + k + STAGES - 1) % STAGES), count=1, pred=k > 0)
    mbarrier.arrive(next_turn, count=1)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(empty.index((step + num_k - 1) % STAGES), count=1)
    if HAS_BIAS:
        j_N = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, mma))
        col_N = n * BLOCK_N + j_N
        if GATED:
            col_N = n * half_n + j_N % half_n + j_N // half_n * (n_dim // 2)
        bias_ptr += expert.to(gl.int64) * n_dim
        acc += gl.load(bias_ptr + gl.minimum(col_N, n_dim - 1)).to(gl.float32)[None, :]
    y = acc.to(OUT)
    if EPILOGUE != "none":
        y = activate(y.to(gl.float32), EPILOGUE, BLOCK_N).to(OUT)
    WIDTH: gl.constexpr = half_n if GATED else BLOCK_N
    # 16 bytes a thread, whole rows by neighbouring threads, and each warp keeps its rows.
    lanes: gl.constexpr = WIDTH // 8 if WIDTH < 256 else 32
    rowwise: gl.constexpr = gl.BlockedLayout(
        [BLOCK_M // GROUP_WARPS * lanes // 32, 8], [32 // lanes, lanes], [GROUP_WARPS, 1], [1, 0]
    )
    y = gl.convert_layout(y, rowwise)
    m_M = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, rowwise))
    col_N = n * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, rowwise))
    live_M = m_M < row_end - row
    place_M = row + m_M
    if SCATTER:
        place_M = gl.load(row_slot_ptr + row + m_M, mask=live_M, other=0)
    out_ptrs = out_ptr + (place_M.to(gl.int64) * out_pitch)[:, None] + col_N[None, :]
    gl.store(out_ptrs, y, mask=live_M[:, None] & (col_N < n_dim // (2 if GATED else 1))[None, :])


@gluon.jit
def multiply_tiles(turn, turns, ring, out, role: gl.constexpr, tile: gl.constexpr):
    """Multiply every other tile of this CTA: those of a turn, 0 or 1.

    A group waits until the other has seen the last operands of the tile before: a stage's barrier tells only odd
    fillings from even ones, so whoever waits on it must not be two fillings ahead.
    """
    _, _, _, _, tiles_ptr, offsets_ptr, begin, num_tiles, n_tiles, num_k, _ = ring
    step, phase = turn * num_k, 1 - turn
    for i in range(gl.program_id(0) + turn * gl.num_programs(0), num_tiles, 2 * gl.num_programs(0)):
        expert, row, row_end, n, _ = locate_tile(i, begin, tiles_ptr, offsets_ptr, n_tiles, BLOCK_M)
        mbarrier.wait(turns.index(turn), phase)
        multiply_tile(ring, out, turns.index(1 - turn), step, expert, row, row_end, n, role, tile)
        step += 2 * num_k
        phase ^= 1


@gluon.jit(do_not_specialize=["slice_id"])
def pingpong_kernel(
    a_desc, b_desc, out_ptr, bias_ptr, row_slot_ptr, tiles_ptr, begins_ptr, offsets_ptr,
    slice_id, k_dim, n_dim, out_pitch,
    SCATTER: gl.constexpr, EPILOGUE: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CHUNKS: gl.constexpr,
):  # fmt: skip
    """Drain a slice's queue with a fixed stride."""
    GATED: gl.constexpr = EPILOGUE == "swiglu"
    a_bufs = gl.allocate_shared_memory(a_desc.dtype, [STAGES * CHUNKS, BLOCK_M, CHUNK_K], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(b_desc.dtype, [STAGES * CHUNKS, BLOCK_N, CHUNK_K], b_desc.layout)
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
    num_k = gl.cdiv(k_dim, CHUNKS * CHUNK_K)
    ring = (a_bufs, b_bufs, ready, empty, tiles_ptr, offsets_ptr, begin, num_tiles, n_tiles, num_k, n_dim)
    out = (out_ptr, bias_ptr, row_slot_ptr, out_pitch)
    tile: gl.constexpr = (BLOCK_N, STAGES, CHUNKS)
    role: gl.constexpr = (SCATTER, EPILOGUE, HAS_BIAS)
    gl.warp_specialize(
        [
            (multiply_tiles, (0, turns, ring, out, role, tile)),
            (multiply_tiles, (1, turns, ring, out, role, tile)),
            (load_tiles, (a_desc, b_desc, ring, GATED, tile)),
        ],
        [GROUP_WARPS, 1],
        [GROUP_REGS, LOADER_REGS],
    )


def descriptor(rows: Tensor, block_rows: int) -> TensorDescriptor:
    """Return the descriptor of a matrix whose columns a product walks."""
    block = [block_rows, CHUNK_K.value]
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
        descriptor(x[:, : held.k_dim], BLOCK_M.value),
        descriptor(held.weight.view(-1, held.k_dim), spec.block_n // 2),
        out, held.bias, ws.row_slot_N, ws.tiles_QC[row_list], ws.begins_QS[row_list], ws.offsets_E1,
        slice_id, held.k_dim, held.n_dim, out.stride(0),
        SCATTER=last, EPILOGUE=epilogue, HAS_BIAS=held.bias is not None,
        BLOCK_N=spec.block_n, STAGES=spec.num_stages, CHUNKS=spec.block_k // CHUNK_K.value,
        num_warps=GROUP_WARPS.value, maxnreg=REGS,
    )  # fmt: skip
