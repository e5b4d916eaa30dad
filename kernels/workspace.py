"""Every buffer that a layer's kernels write, allocated once for the largest batch: a steady state allocates nothing.

Layers that run one after another may share a workspace; layers that overlap may not. A captured graph holds addresses
in it, so it must outlive the graph.

Shape letters: T tokens, E experts, K top-k, N routed rows (T times K), D model, B blocks of tokens, S slices, Q lists
of row tiles, C row tiles, W words of a plan.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..traces.schema import MoeSpec
from .queues import MAX_TILES, NUM_COUNTERS, tile_capacity
from .routing import MIN_BLOCK_TOKENS, padded_experts
from .spec import (
    HOPPER,
    INTERPRET,
    MAX_BLOCK_M,
    MAX_SLICES,
    SMALLEST_BLOCK_M,
    TORCH_DTYPE,
    LayerLaunch,
    encode_tiles,
    plan_words,
)
from .weights import ALIGN


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workspace:
    """Buffers of one layer for up to `max_tokens` tokens."""

    spec: MoeSpec
    max_tokens: int
    capacity: int
    """Row tiles that a list can hold."""
    plan: Tensor
    """[W] int32: copy the words of `encode_plan` here; all experts on slice 0 until then."""
    ids_TK: Tensor
    """int32, -1 for padding rows."""
    weights_TK: Tensor
    tops_T: Tensor
    """The highest logit of each token, and what its weights divide by, next."""
    totals_T: Tensor
    counts_E: Tensor
    offsets_E1: Tensor
    """[E + 1] int32: where each expert's rows start."""
    row_slot_N: Tensor
    """Place t * K + slot of each row, expert by expert, in token order, and a tile more."""
    members_BE: Tensor
    """int64, a power of two of experts: which tokens of a block chose an expert, a bit each. The
    first row is a small batch's, which leaves it zero."""
    block_counts_EB: Tensor
    """uint8: how many; the pitch is a multiple of 16."""
    arrivals: Tensor
    """How many CTAs of a small batch's routing have arrived: zero between launches."""
    tiles_QC: Tensor
    begins_QS: Tensor
    """[Q, MAX_SLICES + 1]: where each slice's run of tiles begins."""
    tickets: Tensor
    ready_2C: Tensor
    """How many column tiles of a row tile are stored, for the first and the middle product of a fused launch."""
    gathered_ND: Tensor
    """Tokens in expert order, for launches that gather them first; the row pitch is a multiple of 16."""
    hidden: tuple[Tensor, ...]
    """One per product but the last: [N and a tile more, columns], expert by expert; the row pitch is a multiple of 16.
    The columns past a width that is not one are never read."""
    rows_ND: Tensor
    """The last product's rows at their place t * K + slot."""
    out_TD: Tensor
    chains: bool
    """Whether the second launch of routing may begin while the first one ends: on Hopper and later."""
    sizes: dict[LayerLaunch, Tensor] = field(default_factory=dict)
    """Tile sizes on the device, for each launch seen: see `tile_sizes`."""

    @classmethod
    def allocate(cls, spec: MoeSpec, max_tokens: int, device: torch.device | str) -> "Workspace":
        """Allocate for batches of up to `max_tokens` tokens of a model's layer."""
        num_rows = max(1, max_tokens) * spec.top_k
        capacity = tile_capacity(num_rows, spec.num_experts, SMALLEST_BLOCK_M)
        if max_tokens < 0 or capacity > MAX_TILES:
            raise ValueError(f"workspace for {max_tokens} tokens; give 0 to {MAX_TILES // spec.top_k * 15} or so")
        block_e, num_blocks = padded_experts(spec.num_experts), -(-max(1, max_tokens) // MIN_BLOCK_TOKENS)
        dtype = TORCH_DTYPE[spec.dtype]

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def rows(count: int, width: int) -> Tensor:
            return torch.empty(count, -(-width // ALIGN) * ALIGN, dtype=dtype, device=device)

        return cls(
            spec=spec,
            max_tokens=max_tokens,
            capacity=capacity,
            plan=ints(plan_words(spec.num_experts)),
            ids_TK=ints(max(1, max_tokens), spec.top_k),
            weights_TK=torch.zeros(max(1, max_tokens), spec.top_k, dtype=torch.float32, device=device),
            tops_T=torch.empty(max(1, max_tokens), dtype=torch.float32, device=device),
            totals_T=torch.empty(max(1, max_tokens), dtype=torch.float32, device=device),
            counts_E=ints(spec.num_experts),
            offsets_E1=ints(spec.num_experts + 1),
            row_slot_N=ints(num_rows + MAX_BLOCK_M),
            members_BE=torch.zeros(1 + num_blocks, block_e, dtype=torch.int64, device=device),
            block_counts_EB=torch.empty(block_e, -(-num_blocks // 16) * 16, dtype=torch.uint8, device=device),
            arrivals=ints(1),
            tiles_QC=ints(2, capacity),
            begins_QS=ints(2, MAX_SLICES + 1),
            tickets=ints(NUM_COUNTERS, MAX_SLICES),
            ready_2C=ints(2, capacity),
            gathered_ND=rows(num_rows + MAX_BLOCK_M, spec.d_model),
            hidden=tuple(rows(num_rows + MAX_BLOCK_M, p.out_dim) for p in spec.products(max(spec.d_ff))[:-1]),
            rows_ND=rows(num_rows, spec.d_model),
            chains=not INTERPRET.value and torch.cuda.get_device_capability(device) >= HOPPER,
            out_TD=torch.empty(max_tokens, spec.d_model, dtype=dtype, device=device),
        )

    def tile_sizes(self, launch: LayerLaunch) -> Tensor:
        """Return a launch's tile sizes on the device; the first call copies them, so make one before capturing."""
        found = self.sizes.get(launch)
        if found is None:
            found = self.sizes[launch] = encode_tiles(launch).to(self.plan.device)
        return found
