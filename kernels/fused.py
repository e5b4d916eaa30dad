"""All products of a slice in one launch: hidden rows stay in L2, and no launch waits for the tail of the one before.

A tile of a later product waits until the row tile that it reads is whole. Each CTA takes its tiles in queue order and
what a tile waits for lies earlier in that order, so the launch ends as long as every CTA of the grid is resident: the
grid may not exceed what the slice's SMs hold, which is checked. Waiting is bounded and traps.

One CTA could keep an expert's hidden rows in registers, but then it alone would stream all of that expert's weights,
at a hundredth of the memory bandwidth: the products are spread over all CTAs instead, and hidden rows pass through L2.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .grouped import expert_tile, weight_descriptor
from .prefetch import prefetch_share
from .queues import locate_tile
from .spec import INTERPRET, LayerLaunch

if TYPE_CHECKING:
    from .weights import ExpertWeights
    from .workspace import Workspace

RESERVED_SMEM_BYTES = 1024
"""What the driver takes of an SM's shared memory for each CTA."""
MAX_POLLS = tl.constexpr(1 << 22)
"""Some seconds: a tile waits microseconds."""


@triton.jit
def wait_for(ready_ptr, needed):
    """Wait until a counter has reached what is needed; trap when it never does."""
    polls = 0
    while tl.atomic_add(ready_ptr, 0, sem="acquire") < needed:
        polls += 1
        if polls > MAX_POLLS:
            if INTERPRET:
                tl.device_assert(False, "a fused tile waits for a row tile that nobody computes")
            else:
                tl.inline_asm_elementwise("trap; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def fused_product(
    a, b, out_ptr, bias_ptr, row_slot_ptr, tiles_ptr, offsets_ptr, waits_ptr, signals_ptr,
    begin, num_m, base, waits_for, k_dim, n_dim, a_pitch, out_pitch, top_k,
    WAITS: tl.constexpr, SIGNALS: tl.constexpr, EPILOGUE: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, B_DESC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute this CTA's tiles of one product; return the number of the tile after the product's last, and n tiles."""
    n_tiles = tl.cdiv(n_dim, BLOCK_N)
    num_tiles = num_m * n_tiles
    grid = tl.num_programs(0)
    # Tiles are dealt over all products as over one queue, so that a product's tail does not idle the same CTAs again.
    for i in range((tl.program_id(0) + grid - base % grid) % grid, num_tiles, grid):
        expert, row, row_end, n, place = locate_tile(i, begin, tiles_ptr, offsets_ptr, n_tiles, BLOCK_M)
        if WAITS:
            wait_for(waits_ptr + place, waits_for)
        expert_tile(
            a, b, out_ptr, bias_ptr, None, row_slot_ptr, None, None, None, None,
            expert, row, row_end, n * BLOCK_N, n_dim, k_dim, n_dim, a_pitch, out_pitch, top_k,
            not WAITS, not SIGNALS, EPILOGUE, HAS_BIAS, False, False, True, EVEN_K,
            False, B_DESC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if SIGNALS:
            # All warps have stored before one thread says so.
            tl.debug_barrier()
            tl.atomic_add(signals_ptr + place, 1, sem="release")
    return base + num_tiles, n_tiles


@triton.jit(do_not_specialize=["slice_id", "capacity", "top_k"])
def fused_kernel(
    x_ptr, b0, b1, b2, bias0_ptr, bias1_ptr, bias2_ptr, hidden0_ptr, hidden1_ptr, rows_ptr,
    row_slot_ptr, tiles_ptr, begins_ptr, offsets_ptr, ready_ptr, weight_ptr,
    prefetch_bytes, slice_id, capacity, d_model, n_dim, d_ff, x_pitch, hidden_pitch, rows_pitch, top_k,
    THREE: tl.constexpr, DEPENDENT: tl.constexpr, EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr, EVEN_D: tl.constexpr, EVEN_F: tl.constexpr, B_DESC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, UP_N: tl.constexpr, DOWN_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Drain a slice's queue once for each product: up, middle where experts have three products, down."""
    if DEPENDENT:
        prefetch_share(weight_ptr, prefetch_bytes)
        gdc_wait()
    begin = tl.load(begins_ptr + slice_id)
    num_m = tl.load(begins_ptr + slice_id + 1) - begin
    ready0, ready1 = ready_ptr, ready_ptr + capacity
    base, n_tiles = fused_product(
        x_ptr, b0, hidden0_ptr, bias0_ptr, row_slot_ptr, tiles_ptr, offsets_ptr, ready0, ready0,
        begin, num_m, 0, 0, d_model, n_dim, x_pitch, hidden_pitch, top_k,
        False, True, EPILOGUE, HAS_BIAS, EVEN_D, B_DESC, PRECISION, BLOCK_M, UP_N, BLOCK_K,
    )  # fmt: skip
    if THREE:
        base, n_tiles = fused_product(
            hidden0_ptr, b1, hidden1_ptr, bias1_ptr, row_slot_ptr, tiles_ptr, offsets_ptr, ready0, ready1,
            begin, num_m, base, n_tiles, d_ff, d_ff, hidden_pitch, hidden_pitch, top_k,
            True, True, EPILOGUE, HAS_BIAS, EVEN_F, B_DESC, PRECISION, BLOCK_M, UP_N, BLOCK_K,
        )  # fmt: skip
    fused_product(
        hidden1_ptr if THREE else hidden0_ptr, b2, rows_ptr, bias2_ptr, row_slot_ptr, tiles_ptr, offsets_ptr,
        ready1 if THREE else ready0, ready0, begin, num_m, base, n_tiles, d_ff, d_model, hidden_pitch, rows_pitch,
        top_k, True, False, "none", HAS_BIAS, EVEN_F, B_DESC, PRECISION, BLOCK_M, DOWN_N, BLOCK_K,
    )  # fmt: skip
    if DEPENDENT:
        gdc_launch_dependents()


def fused_experts(
    x_TD: Tensor, weights: "ExpertWeights", ws: "Workspace", launch: LayerLaunch, *, slice_id: int
) -> None:
    """Launch all products of one slice of a routed batch at once.

    Raises:
        ValueError: experts differ in width, or the grid is larger than what the slice's SMs hold at once.
    """
    if any(held.uneven for held in weights.products):
        raise ValueError(f"model {weights.spec.name!r}: a fused launch needs experts of one width; launch unfused")
    args, options = _arguments(x_TD, weights, ws, launch, slice_id)
    if INTERPRET.value:
        # Programs run one after another there: only a single one never waits for a later one.
        fused_kernel[(1,)](*args, **options)
        return
    chosen = launch.slices[slice_id]
    compiled = fused_kernel.warmup(*args, grid=(1,), **options)
    ctas_per_sm = resident_ctas(compiled, x_TD.device)
    sms = chosen.sm_count or torch.cuda.get_device_properties(x_TD.device).multi_processor_count
    sharing = [chosen] if chosen.sm_count else [s for s in launch.slices if s.sm_count is None]
    num_ctas = sum(s.up.num_ctas for s in sharing)
    if num_ctas > sms * ctas_per_sm:
        raise ValueError(
            f"fused slice {slice_id}: {num_ctas} CTAs wait for each other, and {sms} SMs hold {ctas_per_sm} each; "
            "use a smaller grid"
        )
    fused_kernel[(chosen.up.num_ctas,)](*args, **options)


def _arguments(
    x_TD: Tensor, weights: "ExpertWeights", ws: "Workspace", launch: LayerLaunch, slice_id: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    first, middle, last = weights.products[0], weights.products[1], weights.products[-1]
    spec, down_n = launch.slices[slice_id].up, launch.slices[slice_id].down.block_n
    block_k = spec.k_step(x_TD.element_size())
    by_desc = spec.descriptors and all(h.k_dim * x_TD.element_size() % 16 == 0 for h in weights.products)
    blocks_n = (spec.block_n, spec.block_n, down_n)
    held = [
        weight_descriptor(h, epilogue, n, block_k) if by_desc else h.weight
        for h, epilogue, n in zip(
            (first, middle, last), (weights.epilogues[0], weights.epilogues[1], "none"), blocks_n, strict=True
        )
    ]
    dependent = launch.dependent and not INTERPRET.value
    args = (
        x_TD, *held, first.bias, middle.bias, last.bias, ws.hidden[0], ws.hidden[-1], ws.rows_ND,
        ws.row_slot_N, ws.tiles_QC[0], ws.begins_QS[0], ws.offsets_E1, ws.ready_2C,
        first.weight, min(launch.prefetch_bytes, first.weight.nbytes),
        slice_id, ws.capacity, first.k_dim, first.n_dim, last.k_dim,
        x_TD.stride(0), ws.hidden[0].stride(0), ws.rows_ND.stride(0), ws.spec.top_k,
    )  # fmt: skip
    options = dict(
        THREE=len(weights.products) == 3, DEPENDENT=dependent, EPILOGUE=weights.epilogues[0],
        HAS_BIAS=first.bias is not None, EVEN_D=first.k_dim % block_k == 0, EVEN_F=last.k_dim % block_k == 0,
        B_DESC=by_desc, PRECISION="tf32" if launch.tf32 else "ieee",
        BLOCK_M=spec.block_m, UP_N=spec.block_n, DOWN_N=down_n, BLOCK_K=block_k, **spec.options, launch_pdl=dependent,
    )  # fmt: skip
    return args, options


def resident_ctas(compiled: Any, device: torch.device) -> int:
    """Return how many CTAs of a compiled kernel one SM holds."""
    compiled._init_handles()
    props, warps = torch.cuda.get_device_properties(device), compiled.metadata.num_warps
    regs = -(-compiled.n_regs * 32 // 256) * 256 * warps
    return min(
        props.regs_per_multiprocessor // regs,
        props.shared_memory_per_multiprocessor // (compiled.metadata.shared + RESERVED_SMEM_BYTES),
        props.max_threads_per_multi_processor // (32 * warps),
    )
