"""What a launch is told: tiles and grids, how tokens are routed, and the plan as one buffer of int32 words.

The plan reaches the device as data: the same captured graph runs any placement and tile order of its layout. Only a
`LayerLaunch` is fixed by capture: tiles, grids, stealing, fusing.

Shape letters: E routed experts, S slices, Q lists of row tiles (up, down).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..traces.schema import MoeSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run in Triton's interpreter, which computes bf16 wrongly and knows no inline assembly."""

HOPPER = (9, 0)
MAX_SLICES = 16
SMALLEST_BLOCK_M = 16
MAX_BLOCK_M = 256
MAX_EXPERTS = 512
FP32_COLUMNS = 32
TORCH_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PINGPONG_TILES = ((64, 256, 64, 4), (64, 128, 64, 4), (64, 128, 128, 4))
"""Rows, columns, K step and warps of a group: what its registers hold."""
TILE_ORDERS = ("expert", "heavy", "light")

# Word offsets of a plan: tile order, bounds and slice ids of the token rule, pinned slices [E]; zeros mean slice 0.
ORDER_AT = tl.constexpr(0)
NUM_BOUNDS_AT = tl.constexpr(1)
BOUNDS_AT = tl.constexpr(2)
SLICE_IDS_AT = tl.constexpr(BOUNDS_AT.value + MAX_SLICES)
PINNED_AT = tl.constexpr(SLICE_IDS_AT.value + MAX_SLICES)
# Word offsets of a launch's tiles: block_m [Q, S], block_n [Q, S].
BLOCK_M_AT = tl.constexpr(0)
BLOCK_N_AT = tl.constexpr(2 * MAX_SLICES)
SLICES = tl.constexpr(MAX_SLICES)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """One compiled tile and its grid: `num_ctas` persistent CTAs drain a slice's queue."""

    block_m: int
    block_n: int
    block_k: int
    """For two-byte dtypes; fp32 always sums 32 columns at a time, because its bits depend on that."""
    num_warps: int
    num_stages: int
    num_ctas: int
    descriptors: bool = False
    """Load weights, and rows where they are contiguous, by tensor descriptors (Hopper's copy engine)."""
    flatten: bool = False
    """Pipeline loads across tiles; never where the first product gathers rows, which would lose its own pipelining."""
    pingpong: bool = False
    """Specialised warps (Hopper): one loads, two groups of four multiply tiles in turn. Two-byte dtypes, equal experts,
    rows that lie in expert order."""

    def __post_init__(self) -> None:
        blocks = (self.block_m, self.block_n, self.block_k)
        tile = "x".join(map(str, blocks))
        if any(not SMALLEST_BLOCK_M <= block <= MAX_BLOCK_M or block & (block - 1) for block in blocks):
            raise ValueError(f"tile {tile}: each side must be a power of two from {SMALLEST_BLOCK_M} to {MAX_BLOCK_M}")
        if self.num_ctas < 1 or self.num_stages < 1 or self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(
                f"launch of {self.num_ctas} CTAs, {self.num_warps} warps, {self.num_stages} stages: CTAs and stages "
                "must be at least 1, warps a power of two up to 16"
            )
        if self.pingpong and (*blocks, self.num_warps) not in PINGPONG_TILES:
            allowed = ", ".join(f"{m}x{n}x{k} with {w} warps" for m, n, k, w in PINGPONG_TILES)
            raise ValueError(f"pingpong tile {tile} with {self.num_warps} warps; allowed are {allowed}")

    def k_step(self, element_bytes: int) -> int:
        """Return the columns that a tile of a dtype walks at a time."""
        return FP32_COLUMNS if element_bytes == 4 else self.block_k

    @property
    def max_regs(self) -> int:
        """Registers a thread may take: what leaves room for a neighbour on the SM where the accumulator allows it."""
        return 160 if self.block_m * self.block_n <= 64 * 32 * self.num_warps else 255

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_regs}


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceLaunch:
    """The launches of one slice; a middle product uses `up`."""

    up: LaunchSpec
    down: LaunchSpec
    sm_count: int | None = None
    """SMs that the slice owns; None: it shares the device with the other slices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLaunch:
    """How a layer's experts are launched: what a captured graph fixes."""

    slices: tuple[SliceLaunch, ...]
    steal: bool = False
    """CTAs take tiles by ticket, and an idle slice drains the others' queues."""
    fused: bool = False
    """All products of a slice in one launch that owns its SMs: every CTA of the grid is resident at once."""
    dependent: bool = False
    """Programmatic dependent launch: a kernel starts while the one before it finishes."""
    prefetch_bytes: int = 0
    """Of each product's weights, asked for while a dependent launch waits: for batches that hit nearly all experts."""
    gathered: bool = False
    """Tokens are copied into expert order first, so that the first product reads rows one after another."""
    tf32: bool = False
    """Let fp32 products use tf32 matrix instructions; IEEE products otherwise."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.slices) <= MAX_SLICES:
            raise ValueError(f"a layer of {len(self.slices)} slices; 1 to {MAX_SLICES} are allowed")
        if self.fused and (self.steal or any(s.up.block_m != s.down.block_m for s in self.slices)):
            raise ValueError("a fused slice needs one block_m for up and down, and cannot steal")
        if self.prefetch_bytes < 0 or self.prefetch_bytes % 128 or (self.prefetch_bytes and not self.dependent):
            raise ValueError(
                f"prefetch of {self.prefetch_bytes} bytes: whole lines of 128 bytes, in a dependent launch; leave it"
            )
        if self.fused and self.gathered:
            raise ValueError("a fused slice gathers rows itself; leave `gathered` out")
        specs = [spec for chosen in self.slices for spec in (chosen.up, chosen.down)]
        if any(spec.pingpong for spec in specs) and (self.steal or self.fused):
            raise ValueError("pingpong tiles can be neither fused nor stolen; choose others")
        if any(chosen.up.pingpong for chosen in self.slices) and not self.gathered:
            raise ValueError("a pingpong tile for the first product needs `gathered` rows")

    def spec(self, slice_id: int, product: int, num_products: int) -> LaunchSpec:
        """Return the launch of one product of one slice."""
        chosen = self.slices[slice_id]
        return chosen.down if product == num_products - 1 else chosen.up

    @property
    def num_lists(self) -> int:
        """1 when up and down cut rows alike everywhere, so that one list of row tiles serves both; else 2."""
        return 1 if all(s.up.block_m == s.down.block_m for s in self.slices) else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """How logits become experts and weights. Groups: only experts of the best `top_groups` groups may be chosen."""

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts <= MAX_EXPERTS:
            raise ValueError(
                f"router: top_k {self.top_k} of {self.num_experts} experts; top_k must be 1 to the number of experts, "
                f"of which there may be {MAX_EXPERTS}"
            )
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"router: score {self.score!r}; allowed are softmax, sigmoid")
        if self.num_groups > 1:
            self._check_groups()

    def _check_groups(self) -> None:
        size = self.num_experts // self.num_groups
        if self.num_experts & (self.num_experts - 1) or self.num_groups & (self.num_groups - 1) or size < 2:
            raise ValueError(
                f"router: {self.num_groups} groups of {self.num_experts} experts; both must be powers of two, and a "
                "group must hold at least two experts"
            )
        if not 1 <= self.top_groups <= self.num_groups or self.top_k > self.top_groups * size:
            raise ValueError(
                f"router: top_k {self.top_k} from {self.top_groups} of {self.num_groups} groups of {size}; the best "
                "groups must hold top_k experts"
            )

    @classmethod
    def of(cls, spec: MoeSpec) -> "RouterSpec":
        """Return the router of a model's layers."""
        return cls(num_experts=spec.num_experts, top_k=spec.top_k, score=spec.score, renormalise=spec.renormalise)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRule:
    """The device places experts by their true counts: n tokens go to slice_ids[number of bounds <= n]."""

    bounds: tuple[int, ...]
    slice_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.slice_ids) != len(self.bounds) + 1 or len(self.slice_ids) > MAX_SLICES:
            raise ValueError(
                f"token rule: {len(self.bounds)} bounds with {len(self.slice_ids)} slice ids; give one id more than "
                f"bounds, {MAX_SLICES} at most"
            )
        if list(self.bounds) != sorted(set(self.bounds)):
            raise ValueError(f"token rule: bounds {self.bounds} must rise")


def encode_plan(
    num_slices: int, num_experts: int, placement: "TokenRule | ArrayLike | None" = None, *, tile_order: str = "expert"
) -> Tensor:
    """Return a plan as int32 words [W] on the host, ready to be copied over a workspace's.

    By numpy, in a few microseconds: a policy may decide at every step.

    Args:
        num_slices: of the layout that the plan is for.
        num_experts: E.
        placement: a token rule, the slice of each expert [E], or None for slice 0 alone; [L, E] gives words [L, W].
        tile_order: expert, heavy (most tokens first) or light, within each slice.
    """
    if tile_order not in TILE_ORDERS:
        raise ValueError(f"plan: tile order {tile_order!r}; allowed are {', '.join(TILE_ORDERS)}")
    rule = placement if isinstance(placement, TokenRule) else None
    slice_ids = (
        np.zeros(num_experts, np.int32) if placement is None else np.asarray(rule.slice_ids if rule else placement)
    )
    count = slice_ids.shape[-1]
    if rule is None and count != num_experts:
        raise ValueError(f"plan: slices for {count} experts; the model has {num_experts}")
    if not 0 <= slice_ids.min() <= slice_ids.max() < num_slices:
        raise ValueError(f"plan: slice ids {np.unique(slice_ids).tolist()}; the layout has slices 0..{num_slices - 1}")
    words = np.zeros((*slice_ids.shape[:-1], plan_words(num_experts)), np.int32)
    fill_plan(words, rule.bounds if rule else None, slice_ids, tile_order=tile_order)
    return torch.from_numpy(words)


def fill_plan(
    words: "NDArray[np.int32]", bounds: "Sequence[int] | None", slice_ids: "ArrayLike", *, tile_order: str
) -> None:
    """Fill the words [..., W] of a plan that is known to be sound; what is not of it may hold anything.

    Args:
        words: on the host.
        bounds: of a token rule; None: every expert has its slice.
        slice_ids: one more than bounds, or those of experts [..., E].
        tile_order: within each slice.
    """
    words[..., ORDER_AT.value] = TILE_ORDERS.index(tile_order)
    if bounds is None:
        words[..., NUM_BOUNDS_AT.value] = -1
        words[..., PINNED_AT.value :] = slice_ids
    else:
        words[..., NUM_BOUNDS_AT.value] = len(bounds)
        words[..., BOUNDS_AT.value : BOUNDS_AT.value + len(bounds)] = bounds
        words[..., SLICE_IDS_AT.value : SLICE_IDS_AT.value + len(bounds) + 1] = slice_ids


def plan_words(num_experts: int) -> int:
    """Return the length of a plan."""
    return PINNED_AT.value + num_experts


def encode_tiles(launch: LayerLaunch) -> Tensor:
    """Return the rows and columns of every slice's tiles, for up and for down, as int32 words on the host."""
    words = np.zeros((4, MAX_SLICES), np.int32)
    for i, s in enumerate(launch.slices):
        words[:, i] = s.up.block_m, s.down.block_m, s.up.block_n, s.down.block_n
    return torch.from_numpy(words.ravel())
