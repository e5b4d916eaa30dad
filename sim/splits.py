"""The simulator held against two tables of measured splits; no figure of the model comes from them.

Table 1 is one expert projection under skewed counts: unsliced, hot beside cold on every SM, or cold experts on a green
context of 16 to 64 SMs. Table 2 is memory-bound decode beside a dense product. Measured times come from outside; this
module models each cell and says how well the model picks.

The tables leave two things open. The readings were chosen, and the form of the physics was settled, with the tables in
view: new hardware rows are the stricter test.
- Which token count divides hot from cold. `threshold="row"`: the one that is best for sharing SMs, kept for the row's
  green contexts; under one threshold the modelled curve over SMs has the measured shape. `threshold="cell"`: the best
  for each cell; the modelled curve is then nearly flat, and picks in two of five rows miss by 29 and 41 %.
- Whether clocks were those of a burst or of steady state: `regime`. A burst describes the first table better (mean
  error 8 % against 14 %, and in steady state three picks miss), steady state the second (6 % against 9 %).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..policies.contract import ByTokens, DeviceSpec, Mechanism, Plan, Slice, SliceLayout, TileOrder, TileVariant
from ..policies.cost import CostModel
from ..policies.layouts import max_ctas_per_sm
from ..policies.stepwork import StepWork
from ..traces.schema import MoeSpec, OtherWork, Product
from .power import sustained_clock

Regime = Literal["burst", "sustained"]


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


def _slice(mechanism: Mechanism, sms: int, variant: TileVariant, ctas_per_sm: int = 1) -> Slice:
    ctas = sms * ctas_per_sm
    return Slice(
        mechanism=mechanism,
        sm_count=sms,
        num_ctas=ctas,
        ctas_per_sm=ctas_per_sm,
        up=variant.name,
        down=variant.name,
    )


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


def _slices_ns(work: StepWork, clock: float) -> int:
    return work.layer_times(0, clock).ns - work.head_ns(0, clock) - work.tail_ns(0)


def projection_row(
    shape: tuple[int, int, int, int, int, float],
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
    sharing = [_slice("sm_budget", bench.sms, cold), _slice("sm_budget", bench.sms, hot)]
    shared = {t: bench.ms(sharing, counts_E, threshold=t) for t in thresholds}
    kept = min(thresholds, key=shared.__getitem__)

    def modelled(name: str) -> float:
        if name == "unsliced":
            return min(
                bench.ms([_slice("shared", bench.sms, v, n)], counts_E, order=order)
                for v, n, order in product(UNSLICED, (1, 2), ORDERS)
                if n <= max_ctas_per_sm(v, device)
            )
        if name == "sharing":
            return shared[kept]
        sms = int(name.removeprefix("green "))
        slices = [_slice("green_context", sms, cold), _slice("green_context", bench.sms - sms, hot)]
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
            alone = bench.ms([_slice("shared", bench.sms, WIDE)], counts_E)
            return alone + bench.ms([_slice("shared", bench.sms, COLD, 2)], none_E, other=stream)
        if cell == "sharing":
            return together(lambda _: _slice("sm_budget", bench.sms, COLD), _slice("sm_budget", bench.sms, HOT))
        sms = int(cell.removeprefix("green "))
        dense_slice = _slice("green_context", bench.sms - sms, WIDE)
        return together(lambda n: _slice("green_context", sms, COLD, n), dense_slice)

    return Row(name, tuple(Cell(cell, ms, modelled(cell)) for cell, ms in measured_ms.items()))


def table_of(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table: measured and modelled times, the pick and what it costs."""
    lines = ["| row | cell: measured / modelled ms | pick | costs |", "|---|---|---|---|"]
    for row in rows:
        cells = "; ".join(f"{c.name}: {c.measured_ms:.3f} / {c.modelled_ms:.3f}" for c in row.cells)
        lines.append(f"| {row.name} | {cells} | {row.picked.name} | {row.regret:+.1%} |")
    return "\n".join(lines)
