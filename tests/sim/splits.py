"""The simulator held against two tables of measured splits; no figure of the model comes from them.

Each cell is modelled and the rows say how well the model picks. As a command it prints the page of both tables:

    python tests/sim/splits.py > docs/split-tables.md
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expertslice.policies.contract import ByTokens, DeviceSpec, Plan, Slice, SliceLayout, TileOrder, TileVariant
from expertslice.policies.cost import CostModel
from expertslice.policies.data import load_device
from expertslice.policies.layouts import max_ctas_per_sm, uniform_slice
from expertslice.policies.stepwork import StepWork
from expertslice.sim.power import AVERAGE_NS, Power
from expertslice.traces.schema import MoeSpec, OtherWork, Product

Regime = Literal["burst", "sustained"]
Shape = tuple[int, int, int, int, int, float]
# d_model, f, experts, top-k, tokens, Zipf exponent: unsliced, sharing, cold on 16 / 32 / 48 / 64 SMs, ms.
PROJECTION: dict[Shape, tuple[float, ...]] = {
    (4096, 14336, 8, 2, 512, 1.5): (0.391, 0.349, 0.777, 0.444, 0.374, 0.373),
    (2048, 4096, 64, 4, 2048, 2.0): (0.453, 0.408, 0.883, 0.497, 0.417, 0.415),
    (2048, 4096, 32, 4, 2048, 1.0): (0.319, 0.297, 0.475, 0.305, 0.345, 0.412),
    (2048, 768, 128, 8, 4096, 1.0): (0.254, 0.240, 0.549, 0.317, 0.245, 0.264),
    (2048, 1024, 64, 8, 1024, 1.2): (0.120, 0.116),
    (2048, 4096, 32, 4, 4096, 1.5): (0.454, 0.446, 0.623, 0.442, 0.509, 0.621),
}
PROJECTION_CELLS = ("unsliced", "sharing", "green 16", "green 32", "green 48", "green 64")
# Bytes streamed, rows and dimensions of the dense product (the last is 137 GFLOP; its shape is not stated):
# one after the other, plain streams, sharing, decode on 16 / 24 / 32 / 40 / 48 / 64 SMs, ms.
MIXED: dict[str, tuple[float, tuple[int, int, int], tuple[float, ...]]] = {
    "large-decode|gemm4096": (
        2147.483648e6,
        (4096, 8192, 8192),
        (1.434, 1.432, 1.480, 1.706, 1.272, 1.204, 1.324, 1.318, 1.378),
    ),
    "mixtral-decode|gemm8192": (
        1879.048192e6,
        (8192, 8192, 8192),
        (2.302, 2.161, 2.501, 2.001, 2.207, 2.003, 2.095, 2.204, 2.578),
    ),
    "qwen-decode|gemm2048": (
        3221.225472e6,
        (2048, 8192, 8192),
        (1.423, 1.473, 1.317, 2.469, 1.682, 1.357, 1.277, 1.279, 1.314),
    ),
    "large-decode|small-gemm": (
        2147.483648e6,
        (4096, 4096, 4096),
        (0.918, 0.914, 0.853, 1.605, 1.118, 0.935, 0.884, 0.868, 0.835),
    ),
}
MIXED_CELLS = (
    "one after the other", "streams", "sharing",
    "green 16", "green 24", "green 32", "green 40", "green 48", "green 64",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OneProduct(MoeSpec):
    """A model whose experts are a single product, as the tables measured it."""

    def products(self, d_ff: int) -> tuple[Product, ...]:
        """Return the one product."""
        return (Product(name="only", k_dim=self.d_model, n_dim=d_ff, out_dim=d_ff),)


class Cell(NamedTuple):
    """One way to run a row's work."""

    name: str
    measured_ms: float
    modelled_ms: float


class Row(NamedTuple):
    """All measured ways to run the same work."""

    name: str
    cells: tuple[Cell, ...]

    @property
    def picked(self) -> Cell:
        """Return the cell that the model takes for the fastest."""
        return min(self.cells, key=lambda cell: cell.modelled_ms)

    @property
    def regret(self) -> float:
        """Return what the pick costs on hardware above the row's best cell, as a fraction."""
        return self.picked.measured_ms / min(cell.measured_ms for cell in self.cells) - 1

    def only(self, prefix: str) -> "Row":
        """Return the row with the cells whose name starts so."""
        return Row(self.name, tuple(cell for cell in self.cells if cell.name.startswith(prefix)))


def tau(rows: Sequence[Row]) -> float:
    """Return Kendall's tau-b between modelled and measured times, the mean over rows."""
    taus: list[float] = []
    for row in rows:
        signs = np.sign(
            [(a.measured_ms - b.measured_ms, a.modelled_ms - b.modelled_ms) for a, b in combinations(row.cells, 2)]
        )
        measured, modelled = signs.T
        taus.append(float((measured * modelled).sum() / np.sqrt((measured**2).sum() * (modelled**2).sum())))
    return float(np.mean(taus))


def mean_abs_error(rows: Sequence[Row]) -> float:
    """Return the mean absolute relative error over all cells."""
    return float(np.mean([abs(c.modelled_ms / c.measured_ms - 1) for r in rows for c in r.cells]))


def tile(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> TileVariant:
    """Return a tile with the resources that its operands and accumulators need, bf16."""
    return TileVariant(
        name=f"{block_m}x{block_n}x{block_k}w{num_warps}s{num_stages}",
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        num_warps=num_warps,
        num_stages=num_stages,
        smem_bytes=num_stages * (block_m + block_n) * block_k * 2,
        regs_per_thread=min(255, block_m * block_n // (num_warps * 32) + 64),
    )


HOT, COLD = tile(128, 128, 64, 8, 4), tile(64, 128, 64, 4, 4)
WIDE = tile(128, 256, 64, 8, 4)
UNSLICED = (COLD, tile(64, 256, 64, 8, 4), HOT, WIDE)
ORDERS: tuple[TileOrder, ...] = ("expert", "heavy", "light")


def clipped_zipf(num_experts: int, top_k: int, num_tokens: int, exponent: float) -> NDArray[np.int32]:
    """Return counts as the tables made them: a Zipf share of all rows, cut off at one row per token and expert."""
    share_E = np.arange(1, num_experts + 1, dtype=np.float64) ** -exponent
    share_E /= share_E.sum()
    return np.minimum(num_tokens, np.round(share_E * num_tokens * top_k)).astype(np.int32)


class _Bench:
    """Times slices alone: no routing, no combining."""

    def __init__(self, model: MoeSpec, variants: tuple[TileVariant, ...], device: DeviceSpec, regime: Regime) -> None:
        self.cost = CostModel(device=device, model=model, variants=variants)
        self.sms = device.sm_count
        self._regime: Regime = regime

    def ms(
        self,
        slices: Sequence[Slice],
        counts_E: NDArray[np.int32],
        *,
        threshold: int | None = None,
        order: TileOrder = "heavy",
        other: tuple[OtherWork, ...] = (),
    ) -> float:
        """Return the time of one layer's slices; experts of fewer tokens than the threshold go to slice 0."""
        rule = ByTokens(bounds=(), slice_ids=(len(slices) - 1,))
        if threshold is not None:
            rule = ByTokens(bounds=(threshold,), slice_ids=(0, 1))
        plan = Plan(layout=SliceLayout(slices=tuple(slices)), placement=rule, tile_order=order)
        work = self.cost.work(plan, counts_E[None], (other,) if other else ())
        clock = 1.0
        if self._regime == "sustained":
            params = self.cost.model.products(self.cost.model.d_ff[0])[0]
            flops = 2.0 * params.k_dim * params.n_dim * int(counts_E.sum()) + sum(w.flops for w in other)
            clock = sustained_clock(self.cost.device, lambda c: (_slices_ns(work, c), work.moved_bytes(0), flops))
        return _slices_ns(work, clock) / 1e6


def sustained_clock(device: DeviceSpec, run: Callable[[float], tuple[float, float, float]]) -> float:
    """Return the clock that a workload settles at when repeated without rest.

    `run` maps a clock to the (duration ns, bytes moved, FLOP) of one repetition.
    """
    power = Power(device)
    spent_ns, clock, repetition = 0.0, 0.0, (0.0, 0.0, 0.0)
    while spent_ns < 10 * AVERAGE_NS:
        if power.clock != clock:
            clock = power.clock
            repetition = run(clock)
        power.spend(round(repetition[0]), repetition[1], repetition[2])
        spent_ns += max(1.0, repetition[0])
    return power.clock


def _slices_ns(work: StepWork, clock: float) -> int:
    return work.layer_times(0, clock).ns - work.head_ns(0, clock) - work.tail_ns(0)


def projection_row(
    shape: Shape,
    measured_ms: Mapping[str, float],
    device: DeviceSpec,
    *,
    threshold: Literal["row", "cell"] = "row",
    regime: Regime = "burst",
    pair: tuple[TileVariant, TileVariant] = (HOT, COLD),
) -> Row:
    """Model one row of the first table.

    Args:
        shape: d_model, f, experts, top-k, tokens, Zipf exponent.
        measured_ms: by cell: "unsliced", "sharing", and "green N" for cold experts on N SMs.
        device: the device.
        threshold: how cold is told from hot, see the module.
        regime: of the clocks.
        pair: hot and cold tile.
    """
    d_model, width, num_experts, top_k, num_tokens, exponent = shape
    counts_E = clipped_zipf(num_experts, top_k, num_tokens, exponent)
    model = OneProduct(
        name="row", num_layers=1, num_experts=num_experts, top_k=top_k, d_model=d_model, d_ff=(width,), kind="gelu2"
    )
    hot, cold = pair
    bench = _Bench(model, tuple(dict.fromkeys((*UNSLICED, *pair))), device, regime)
    thresholds = np.unique(counts_E).tolist()
    sharing = [uniform_slice("sm_budget", bench.sms, cold.name), uniform_slice("sm_budget", bench.sms, hot.name)]
    shared = {t: bench.ms(sharing, counts_E, threshold=t) for t in thresholds}
    kept = min(thresholds, key=shared.__getitem__)

    def modelled(name: str) -> float:
        if name == "unsliced":
            return min(
                bench.ms([uniform_slice("shared", bench.sms, v.name, n)], counts_E, order=order)
                for v, n, order in product(UNSLICED, (1, 2), ORDERS)
                if n <= max_ctas_per_sm(v, device)
            )
        if name == "sharing":
            return shared[kept]
        sms = int(name.removeprefix("green "))
        slices = [
            uniform_slice("green_context", sms, cold.name),
            uniform_slice("green_context", bench.sms - sms, hot.name),
        ]
        return min(bench.ms(slices, counts_E, threshold=t) for t in (thresholds if threshold == "cell" else [kept]))

    label = ", ".join(str(part) for part in shape)
    return Row(label, tuple(Cell(name, ms, modelled(name)) for name, ms in measured_ms.items()))


def mixed_row(
    name: str,
    decode_bytes: float,
    dense: tuple[int, int, int],
    measured_ms: Mapping[str, float],
    device: DeviceSpec,
    *,
    regime: Regime = "sustained",
) -> Row:
    """Model one row of the second table.

    Args:
        name: of the row.
        decode_bytes: weights streamed.
        dense: rows, inner and outer dimension of the dense product, run with 128 x 256 tiles.
        measured_ms: by cell: "one after the other", "streams", "sharing", and "green N" for decode on N SMs.
        device: the device.
        regime: of the clocks.
    """
    rows, inner, outer = dense
    model = OneProduct(name=name, num_layers=1, num_experts=1, top_k=1, d_model=inner, d_ff=(outer,), kind="gelu2")
    bench = _Bench(model, (COLD, HOT, WIDE), device, regime)
    counts_E, none_E = np.array([rows], dtype=np.int32), np.zeros(1, dtype=np.int32)
    stream = (OtherWork(flops=0, hbm_bytes=round(decode_bytes), slice_id=0),)

    def together(cold: Callable[[int], Slice], hot: Slice) -> float:
        # The tables tuned how many CTAs per SM the streaming kernel had.
        return min(bench.ms([cold(n), hot], counts_E, other=stream) for n in (1, 2, 3))

    def modelled(cell: str) -> float:
        if cell in ("one after the other", "streams"):
            # A full grid of wide tiles leaves no room beside it, so that plain streams queue.
            alone = bench.ms([uniform_slice("shared", bench.sms, WIDE.name)], counts_E)
            return alone + bench.ms([uniform_slice("shared", bench.sms, COLD.name, 2)], none_E, other=stream)
        if cell == "sharing":
            hot = uniform_slice("sm_budget", bench.sms, HOT.name)
            return together(lambda _: uniform_slice("sm_budget", bench.sms, COLD.name), hot)
        sms = int(cell.removeprefix("green "))
        dense_slice = uniform_slice("green_context", bench.sms - sms, WIDE.name)
        return together(lambda n: uniform_slice("green_context", sms, COLD.name, n), dense_slice)

    return Row(name.replace("|", " beside "), tuple(Cell(cell, ms, modelled(cell)) for cell, ms in measured_ms.items()))


def projection_rows(device: DeviceSpec, **reading: str) -> list[Row]:
    rows: list[Row] = []
    for shape, times in PROJECTION.items():
        measured = dict(zip(PROJECTION_CELLS, times, strict=False))
        rows.append(projection_row(shape, measured, device, **reading))
    return rows


def mixed_rows(device: DeviceSpec, **reading: str) -> list[Row]:
    return [
        mixed_row(name, moved, dense, dict(zip(MIXED_CELLS, times, strict=True)), device, **reading)
        for name, (moved, dense, times) in MIXED.items()
    ]


LIMIT = 0.10
"""What a pick may cost above its row's best cell."""

PAGE = """<!-- Generated by `python tests/sim/splits.py > docs/split-tables.md`. -->

# The split tables

Two tables of splits measured on an H100, modelled cell by cell with the provisional device file. No figure of the model
comes from them, but the readings below were chosen, and the form of the physics was settled, with the tables in view:
new hardware rows are the stricter test.

1. **One projection.** One expert product under skewed counts, clipped Zipf, bf16. *unsliced*: one launch, its tile,
   CTAs per SM and queue order tuned. *sharing*: hot experts (128 x 128 tiles) beside cold ones (64 x 128) on every SM.
   *green N*: cold experts on a green context of N SMs, hot ones on the others. A row is named by d_model, f, experts,
   top-k, tokens and Zipf exponent; its fifth was measured without green contexts.
2. **Mixed work.** Memory-bound decode, a plain stream of weights, beside a dense product (128 x 256 tiles): one after
   the other, on two plain streams, sharing every SM, or decode on a green context of N SMs.

The tables leave two things open.

- **Threshold**: which token count tells hot from cold. *row*: the count that is best for sharing, kept for the row's
  green contexts. *cell*: the best count for each cell, as if every cell had been tuned alone.
- **Regime**: clocks of a *burst*, or the *sustained* ones at which the power limit leaves repeated work.

Tests hold the first reading under each table: a pick costs at most 10 % more than its row's best cell. The others are
printed good or bad. The measured times are rounded to a microsecond; their raw records are not part of this repository.
"""


def table_of(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table: measured and modelled times, the pick and what it costs."""
    lines = ["| row | cell: measured / modelled ms | pick | costs |", "|---|---|---|---|"]
    for row in rows:
        cells = "; ".join(f"{c.name}: {c.measured_ms:.3f} / {c.modelled_ms:.3f}" for c in row.cells)
        lines.append(f"| {row.name} | {cells} | {row.picked.name} | {row.regret:+.1%} |")
    return "\n".join(lines)


def section(title: str, rows: Sequence[Row]) -> str:
    """Return one reading of a table as Markdown: its cells, how well they rank, and the picks that miss."""
    green = [row.only("green") for row in rows if row.only("green").cells]
    lines = [f"### {title}\n", table_of(rows), ""]
    for name, part in (("All cells", rows), ("Green contexts alone", green)):
        missed = [f"{row.name} ({row.picked.name}, {row.regret:+.0%})" for row in part if row.regret > LIMIT]
        lines.append(
            f"{name}: Kendall tau {tau(part):.2f}, mean error {mean_abs_error(part):.1%}, largest cost of a pick "
            f"{max(row.regret for row in part):.1%}. Picks that cost over {LIMIT:.0%}: {'; '.join(missed) or 'none'}.\n"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the page."""
    device = load_device("h100-sxm5-80gb")
    parts = [PAGE, f"Device: {device.title}, {device.status}.\n", "## One projection\n"]
    for regime, threshold in product(("burst", "sustained"), ("row", "cell")):
        rows = projection_rows(device, regime=regime, threshold=threshold)
        parts.append(section(f"{regime.capitalize()}, threshold per {threshold}", rows))
    parts.append("## Mixed work\n")
    parts += [section(regime.capitalize(), mixed_rows(device, regime=regime)) for regime in ("burst", "sustained")]
    sys.stdout.write("\n".join(parts))


if __name__ == "__main__":
    main()
