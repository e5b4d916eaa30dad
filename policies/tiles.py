"""What one tile of an expert product costs on an SM, from the silicon's figures; not how tiles share a device.

A tile of block_m rows by block_n columns walks K in steps of block_k. Per step the tensor cores multiply, the
warpgroups read both operands from shared memory, and the next operands arrive through the SM's port to L2. The slowest
of the three is the tile's *pipe* time: while it lasts, a second CTA on the same SM gains nothing. Filling the pipeline
and storing the result leave the pipe idle: that is the tile's *wait*, which a second CTA can hide.

Shape letters: S slices, P products, D widths (1 where experts are alike).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..traces.schema import DTYPE_BYTES, F64, I64, Ints, MoeSpec, Product
from .contract import DeviceSpec, TileVariant

WGMMA_CAPABILITY = 90
WGMMA_ROWS = 64
"""Rows of one warpgroup instruction; narrower tiles, and older devices, use the warp-level one."""
MOST_REMEMBERED = 1 << 15
"""Demands remembered of one layout, each of 48 bytes a product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConstants:
    """What the model needs beside the device's figures, each with its error. None comes from an expert kernel.

    A calibrated truth has others, fitted to a profile: `sim.calibrate`.
    """

    fill_ns: float = 700.0
    """Of a tile, in which its CTA multiplies nothing: from its first load to its first multiplication, about one DRAM
    access (published latencies on H100 are 500 to 800 ns), and what a profile finds beside it."""
    cell_ns: float = 0.0
    """Likewise, for each cell of a tile: activation, conversion and the way to memory beside the port's part."""
    l2_port_bytes_per_clk: float = 64.0
    """Per SM; long-standing width of the port between an SM and L2 (microbenchmarks since Volta)."""
    warp_mma_flops_per_clk: float = 2540.0
    """Per SM, of warp-level instructions; 62 % of the warpgroup rate on H100 (published microbenchmark)."""
    read_part: float = 1.0
    """Of the device's read curve, that products of experts reach."""
    matrix_part: float = 1.0
    """Of the device's matrix rates, likewise."""
    stream_ns: float = 0.0
    """In which the weights that a CTA has in flight arrive, memory idle; 0: as the device's read curve has it."""
    overlap: float = 0.0
    """How far apart two limits must lie to hide one another: both together take (a^p + b^p)^(1/p), p = 1 / overlap. At
    0 the longer one alone counts."""
    ramp_ns: float = 0.0
    """Of a product's kernel: from its launch to full work, and from the first idle SM to its end."""
    logit_ns: float = 0.0
    """Of routing, for each logit beyond what the read curve says."""
    tile_factors: tuple[tuple[str, float], ...] = ()
    """(tile, how much longer a step of it along K takes than its slowest part says): what its instructions cost."""
    rel_errors: tuple[tuple[str, float], ...] = (
        ("fill_ns", 0.3),
        ("l2_port_bytes_per_clk", 0.1),
        ("warp_mma_flops_per_clk", 0.1),
    )
    """(field, one standard error as a fraction)."""


class TileCost(NamedTuple):
    """One tile of one product under one variant; times at the burst clock."""

    pipe_ns: float
    wait_ns: float
    flops: float
    """As executed, padding included."""


def matrix_rate_per_s(device: DeviceSpec, dtype: str) -> float:
    """Return the matrix rate of the whole device in a burst; fp32 products are IEEE, off the tensor cores."""
    return device.fp32_flops_per_s if dtype == "fp32" else device.matrix_flops_per_s


def peak_flops_per_clk(device: DeviceSpec, dtype: str) -> float:
    """Return the most FLOP that one SM does in a clock."""
    if dtype == "fp32":
        return device.fp32_flops_per_s / device.sm_count / (device.clock_mhz * 1e6)
    return device.mma_flops_per_clk


def _warp_reads_bytes(variant: TileVariant, a_bytes: int, b_bytes: int) -> int:
    """Return the least that a grid of warps reads per step: each row of warps reads B, each column of warps A."""
    warp_rows = [1 << i for i in range(8) if variant.num_warps % (1 << i) == 0 and 16 << i <= variant.block_m]
    return min(a_bytes * (variant.num_warps // rows) + b_bytes * rows for rows in warp_rows)


def _clocks_per_step(variant: TileVariant, device: DeviceSpec, constants: TileConstants, dtype: str) -> float:
    """Return the SM clocks of one step along K."""
    size = DTYPE_BYTES[dtype]
    peak = peak_flops_per_clk(device, dtype)
    a_bytes, b_bytes = variant.block_m * variant.block_k * size, variant.block_n * variant.block_k * size
    if device.compute_capability >= WGMMA_CAPABILITY and variant.block_m >= WGMMA_ROWS:
        rows = variant.block_m // WGMMA_ROWS
        # Warpgroups beyond the rows split the columns, and each of them reads the rows again.
        read_bytes = a_bytes * max(1, variant.num_warps // 4 // rows) + b_bytes * rows
    else:
        read_bytes = _warp_reads_bytes(variant, a_bytes, b_bytes)
        peak = min(peak, constants.warp_mma_flops_per_clk)
    mma = 2 * variant.block_m * variant.block_n * variant.block_k / (peak * constants.matrix_part)
    smem = (read_bytes + a_bytes + b_bytes) / device.smem_bytes_per_clk
    port = (a_bytes + b_bytes) / constants.l2_port_bytes_per_clk
    return max(mma, smem, port) * dict(constants.tile_factors).get(variant.name, 1.0)


def tile_cost(
    variant: TileVariant, product: Product, device: DeviceSpec, constants: TileConstants, dtype: str
) -> TileCost:
    """Return the cost of one tile of a product."""
    slowest = _clocks_per_step(variant, device, constants, dtype)
    k_padded = -(-product.k_dim // variant.block_k) * variant.block_k
    port_bytes_per_ns = constants.l2_port_bytes_per_clk * device.clock_mhz / 1e3
    stored = variant.block_m * variant.block_n * DTYPE_BYTES[dtype] * product.out_dim / product.n_dim
    return TileCost(
        pipe_ns=k_padded / variant.block_k * slowest * 1e3 / device.clock_mhz,
        wait_ns=constants.fill_ns + constants.cell_ns * variant.block_m * variant.block_n + stored / port_bytes_per_ns,
        flops=2.0 * variant.block_m * variant.block_n * k_padded,
    )


@dataclass(frozen=True)
class Tables:
    """What every tile of a layout and model costs."""

    rows_PS: I64
    columns_PSD: I64
    """Tiles across the columns."""
    tile_PSD: F64
    """[3, P, S, D]: pipe ns, wait ns and FLOP of a tile."""
    weight_bytes_PD: F64
    row_bytes_PD: F64
    """Of one row, in and out."""
    in_bytes_PD: F64


def tables_of(
    tiles_S: Sequence[tuple[TileVariant, TileVariant]],
    model: MoeSpec,
    device: DeviceSpec,
    constants: TileConstants,
) -> Tables:
    """Return the tables of a model on slices that run their first products by one tile, the down product by another."""
    by_product = list(zip(*(model.products(width) for width in model.d_ff), strict=True))
    variants = [[tiles[int(p == len(by_product) - 1)] for tiles in tiles_S] for p in range(len(by_product))]

    def cost(variant: TileVariant, product: Product) -> TileCost:
        return tile_cost(variant, product, device, constants, model.dtype)

    tile_PSD3 = np.array(
        [[[cost(v, d) for d in widths] for v in of_s] for widths, of_s in zip(by_product, variants, strict=True)]
    )
    dims_PD3 = np.array([[(d.k_dim, d.n_dim, d.out_dim) for d in widths] for widths in by_product])
    k_PD, n_PD, out_PD = np.moveaxis(dims_PD3, -1, 0)
    block_n_PS1 = np.array([[[v.block_n] for v in of_s] for of_s in variants])
    size = float(DTYPE_BYTES[model.dtype])
    return Tables(
        rows_PS=np.array([[v.block_m for v in of_s] for of_s in variants]),
        columns_PSD=-(-n_PD[:, None, :] // block_n_PS1),
        tile_PSD=np.moveaxis(tile_PSD3, -1, 0),
        weight_bytes_PD=size * k_PD * n_PD,
        row_bytes_PD=size * (k_PD + out_PD),
        in_bytes_PD=size * k_PD,
    )


def demands(tokens: Ints, owner: Ints, width: Ints, tables: Tables) -> tuple[I64, F64]:
    """Return what experts ask for, each with its tokens on its slice; `width`, its place in D, may broadcast.

    Returns:
        Tiles [P, ...], and [5, P, ...]: pipe ns, wait ns and FLOP of all its tiles, L2 bytes and DRAM bytes.
    """
    row_tiles = -(-tokens // tables.rows_PS[:, owner])
    column_tiles = tables.columns_PSD[:, owner, width]
    tiles = row_tiles * column_tiles
    weights = tables.weight_bytes_PD[:, width]
    asked = np.empty((5, *tiles.shape))
    asked[:3] = tiles * tables.tile_PSD[:, :, owner, width]
    # Every column tile reads the rows again, every row tile the weights.
    asked[3] = column_tiles * tokens * tables.in_bytes_PD[:, width] + row_tiles * weights
    asked[4] = (tokens > 0) * weights + tokens * tables.row_bytes_PD[:, width]
    return tiles, asked


class Demands:
    """The demands of experts on one layout's slices, remembered by tokens: the same counts come again and again."""

    def __init__(self, tables: Tables) -> None:
        self._tables, self._tokens = tables, 0

    def __call__(self, tokens: Ints, owner: Ints, expert: Ints) -> tuple[I64, F64]:
        """Return `demands` of experts with so many tokens on their slices."""
        num_slices, num_widths = self._tables.tile_PSD.shape[2:]
        width = expert % num_widths
        most = int(tokens.max(initial=0))
        if (most + 1) * num_slices * num_widths > MOST_REMEMBERED:
            return demands(tokens, owner, width, self._tables)
        if most >= self._tokens:
            self._remember(1 << max(8, most.bit_length()))
        # By take: indexing costs ten times as much.
        at = (np.multiply(owner, num_widths, dtype=np.intp) + width) * self._tokens + tokens
        return self._tiles_PX.take(at, axis=1), self._asked_5PX.take(at, axis=2)

    def _remember(self, num_tokens: int) -> None:
        num_slices, num_widths = self._tables.tile_PSD.shape[2:]
        owner, width, tokens = np.ix_(range(num_slices), range(num_widths), range(num_tokens))
        tiles, asked = demands(tokens, owner, width, self._tables)
        self._tokens = num_tokens
        self._tiles_PX, self._asked_5PX = tiles.reshape(len(tiles), -1), asked.reshape(*asked.shape[:2], -1)


def read_bytes_per_ns(device: DeviceSpec, ctas: float) -> float:
    """Return the DRAM bandwidth that so many persistent CTAs reach, by the device's read curve."""
    xs, ys = device.read_curve_ctas, device.read_curve_bytes_per_s
    if ctas >= xs[-1]:
        return ys[-1] / 1e9
    right = bisect_left(xs, ctas)
    x0, y0 = (xs[right - 1], ys[right - 1]) if right else (0, 0.0)
    return (y0 + (ys[right] - y0) * (ctas - x0) / (xs[right] - x0)) / 1e9


def cta_gain(device: DeviceSpec, constants: TileConstants, ctas_per_sm: float, flight_bytes: float) -> float:
    """Return how many single CTAs of the read curve an SM is worth whose CTAs each have so many bytes in flight.

    Few CTAs are bound by their bytes in flight, many by the SM's port: the latency of a request is that of an idle
    memory plus the time its SM's own requests take through the port.
    """
    one = device.read_curve_bytes_per_s[0] / device.read_curve_ctas[0] / 1e9
    port = constants.l2_port_bytes_per_clk * device.clock_mhz / 1e3
    if constants.stream_ns:
        return 1 / (constants.stream_ns / (ctas_per_sm * flight_bytes) + 1 / port) / one
    if ctas_per_sm <= 1 or one >= port:
        return min(ctas_per_sm, 1.0)
    flight = 1 / (1 / one - 1 / port)
    return 1 / (1 / (ctas_per_sm * flight) + 1 / port) / one
