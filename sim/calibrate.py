"""From measured kernels to the simulator's truth and a policy's belief; not how they are measured, or kept on disk.

The truth is physics, some of its constants fitted, times a residual. A belief is the roofline with fitted ceilings:
other measurements, another form.

Shape letters: N measurements, F features, L layers (here: draws of the counts), S slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares, minimize

from ..policies.contract import DeviceSpec, Plan, TileVariant
from ..policies.cost import CostModel
from ..policies.residual import FLAGS, Residual, features_LSF, fit
from ..policies.tiles import TileConstants
from ..policies.work import segment_sums
from ..traces.schema import F64, I32, MoeSpec

LEAST_POINTS = 40
LEAST_CELLS = 6
FOLDS = 5
LEAST_CHAIN = 0.2
"""Of a measured time that must be left for kernels where the modelled fixed costs exceed it."""
PUBLISHED = TileConstants()
NO_FLAGS = (0.0,) * len(FLAGS)


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """One launch of one load, timed; or the same to be predicted."""

    cell: str
    """What is held out together: a shape with its load."""
    model: MoeSpec
    variants: tuple[TileVariant, ...]
    plan: Plan
    counts_LE: I32
    """Draws of the load where its counts are not on record; the mean over them is predicted."""
    ns: float
    whole: bool = True
    """A layer with routing and combining; else its slices alone."""
    flags: tuple[float, ...] = NO_FLAGS

    def cost(
        self, device: DeviceSpec, residual: Residual | None = None, constants: TileConstants = PUBLISHED
    ) -> CostModel:
        """Return the model of this launch; a residual brings its own constants."""
        if residual and residual.flags != self.flags:
            residual = replace(residual, flags=self.flags)
        return CostModel(
            device=device, model=self.model, variants=self.variants, residual=residual, constants=constants
        )

    def predicted_ns(
        self, device: DeviceSpec, residual: Residual | None = None, constants: TileConstants = PUBLISHED
    ) -> float:
        """Return what the simulator's truth says."""
        work = self.cost(device, residual, constants).work(self.plan, self.counts_LE)
        draws = range(len(self.counts_LE))
        aside = [0 if self.whole else work.head_ns(i) + work.tail_ns(i) for i in draws]
        return float(np.mean([work.layer_times(i).ns - aside[i] for i in draws]))

    def split_ns(self, device: DeviceSpec, constants: TileConstants = PUBLISHED) -> tuple[float, float, F64]:
        """Return fixed ns, ns of the slice that is busy longest by physics alone, and that slice's features."""
        cost = self.cost(device, constants=constants)
        work, shares = cost.work(self.plan, self.counts_LE), cost.shares(self.plan.layout)
        draws = range(len(self.counts_LE))
        busy_LS = np.array([work.layer_times(i).busy_ns_S for i in draws], dtype=np.float64)
        critical = int(busy_LS.sum(axis=0).argmax())
        busy_ns = float(busy_LS[:, critical].mean())
        owner_LE = self.plan.placement.owner_LE(self.counts_LE, 0)
        sums = segment_sums(self.counts_LE, owner_LE, self.plan.tile_order, shares)
        x_F = features_LSF(sums, shares)[:, critical].mean(axis=0)
        return self.predicted_ns(device, constants=constants) - busy_ns, busy_ns, np.concatenate([x_F, self.flags])


def check_enough(rows: Sequence[Measured]) -> None:
    """Raise ValueError where too little was measured to learn from."""
    cells = len({row.cell for row in rows})
    if len(rows) < LEAST_POINTS or cells < LEAST_CELLS:
        raise ValueError(
            f"{len(rows)} usable points of {cells} loads; calibration takes {LEAST_POINTS} of {LEAST_CELLS} or more, "
            "profile more groups"
        )


def halves(rows: Sequence[Measured], seed: int) -> tuple[list[Measured], list[Measured]]:
    """Return two halves of the cells, drawn by seed; no cell is in both."""
    cells = sorted({row.cell for row in rows})
    first = set(np.random.default_rng(seed).permutation(cells)[: (len(cells) + 1) // 2].tolist())
    return [row for row in rows if row.cell in first], [row for row in rows if row.cell not in first]


FREE: dict[str, tuple[float, float]] = {
    "fill_ns": (1500.0, 0.7), "cell_ns": (0.05, 0.7), "read_part": (0.95, 0.1), "matrix_part": (0.95, 0.1),
    "stream_ns": (500.0, 0.7), "overlap": (0.25, 0.7), "ramp_ns": (3000.0, 0.7), "logit_ns": (0.005, 0.7),
}  # fmt: skip
"""Constants of the physics that a profile settles: where each is expected, and the standard deviation of its log."""
TILE_FACTOR = (1.0, 0.15)
"""Likewise, of a tile's own factor."""
TYPICAL = 0.05
"""Of an error of the physics alone, once its constants are fitted; larger ones count for less than their square."""
MOST_FITTED = 160
"""Measurements, drawn evenly, that constants are fitted to: a dozen figures do not take more."""


def fit_constants(rows: Sequence[Measured], device: DeviceSpec) -> TileConstants:
    """Return the most likely constants of the physics, given measurements and what is expected of each."""
    taken = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(MOST_FITTED, len(rows))).astype(int))]
    tiles = sorted({name for row in taken for one in row.plan.layout.slices for name in (one.up, one.down)})
    expected, spread = np.array([*FREE.values(), *([TILE_FACTOR] * len(tiles))]).T

    def constants(at_C: F64) -> TileConstants:
        # Around 1, because the steps of the search are relative.
        found = (expected * np.exp(spread * (at_C - 1.0))).tolist()
        of_tiles = tuple(zip(tiles, found[len(FREE) :], strict=True))
        return TileConstants(**dict(zip(FREE, found, strict=False)), tile_factors=of_tiles)

    def surprise(at_C: F64) -> F64:
        found = constants(at_C)
        errors = [np.log(row.predicted_ns(device, constants=found) / row.ns) / TYPICAL for row in taken]
        return np.array([*errors, *(at_C - 1.0)])

    start = np.ones(len(expected))
    return constants(least_squares(surprise, start, diff_step=0.02, loss="soft_l1", max_nfev=12).x)


def fit_truth(rows: Sequence[Measured], device: DeviceSpec) -> Residual:
    """Return the residual of some measurements; its bar covers 90 % of cells left out in turn, a fifth at a time."""
    constants = fit_constants(rows, device)
    x_NF, ratio_N = _points(rows, device, constants)
    residual, cells = fit(x_NF, ratio_N), sorted({row.cell for row in rows})
    fold_N = np.array([cells.index(row.cell) % FOLDS for row in rows])
    off: list[float] = []
    for fold in range(min(FOLDS, len(cells))):
        out_N = fold_N == fold
        part = fit(x_NF[~out_N], ratio_N[~out_N], like=residual)
        off += (np.abs(ratio_N[out_N] - part.log_factor(x_NF[out_N])) / part.widening(x_NF[out_N])).tolist()
    return replace(residual, bar=float(np.quantile(off, 0.9)), constants=constants)


def _points(rows: Sequence[Measured], device: DeviceSpec, constants: TileConstants) -> tuple[F64, F64]:
    x: list[F64] = []
    ratio: list[float] = []
    for row in rows:
        fixed_ns, busy_ns, x_F = row.split_ns(device, constants)
        x.append(x_F)
        ratio.append(np.log(max(row.ns - fixed_ns, LEAST_CHAIN * row.ns) / busy_ns))
    return np.array(x), np.array(ratio)


CEILINGS: tuple[tuple[str, ...], ...] = (
    ("read_curve_bytes_per_s",),
    ("mma_flops_per_clk", "matrix_flops_per_s"),
    ("l2_bytes_per_clk", "smem_bytes_per_clk"),
)
"""Figures of a device that a belief scales together."""


def believed(device: DeviceSpec, factors: Sequence[float]) -> DeviceSpec:
    """Return a device with each group of `CEILINGS` scaled."""
    changes: dict[str, Any] = {}
    for names, factor in zip(CEILINGS, factors, strict=True):
        for name in names:
            value = getattr(device, name)
            changes[name] = tuple(v * factor for v in value) if isinstance(value, tuple) else value * factor
    changes["sustained_flops_per_s"] = min(device.sustained_flops_per_s, changes["matrix_flops_per_s"])
    return replace(device, **changes)


def fit_belief(rows: Sequence[Measured], device: DeviceSpec) -> tuple[float, ...]:
    """Return the factors of `CEILINGS` under which the roofline comes nearest, none above 1."""
    whole = [row for row in rows if row.whole] or list(rows)

    def off(log_factors: F64) -> float:
        found = believed(device, np.exp(log_factors).tolist())
        errors = [np.log(roofline_ns(row, found) / row.ns) for row in whole]
        return float(np.mean(np.square(errors)) + 0.01 * np.mean(np.square(log_factors)))

    found = minimize(
        off, np.full(len(CEILINGS), -0.1), method="Nelder-Mead", bounds=[(-1.5, 0.0)] * len(CEILINGS),
        options={"maxfev": 80},
    )  # fmt: skip
    return tuple(float(one) for one in np.exp(found.x))


def roofline_ns(row: Measured, device: DeviceSpec) -> float:
    """Return what a policy would believe of a layer."""
    cost = CostModel(device=device, model=row.model, variants=row.variants, detail="roofline")
    return max(1.0, cost.step_ns(row.plan, row.counts_LE) / len(row.counts_LE))


def error_figures(predicted_N: F64, measured_N: F64) -> dict[str, float]:
    """Return the mean, median and 95 % quantile of the absolute relative error, and the signed mean."""
    error_N = predicted_N / measured_N - 1
    return {
        "points": len(error_N),
        "mape": float(np.abs(error_N).mean()),
        "median": float(np.median(np.abs(error_N))),
        "p95": float(np.quantile(np.abs(error_N), 0.95)),
        "bias": float(error_N.mean()),
    }


def judge(rows: Sequence[Measured], residual: Residual, device: DeviceSpec) -> dict[str, float]:
    """Return `error_figures` of held-out rows and the coverage of their 90 % bars; what is refused is counted apart."""
    predicted: list[float] = []
    measured: list[float] = []
    covered: list[bool] = []
    refused = 0
    for row in rows:
        try:
            ns, half = predicted_with_bar(row, residual, device)
        except ValueError:
            refused += 1
            continue
        predicted.append(ns)
        measured.append(row.ns)
        covered.append(abs(np.log(row.ns / ns)) <= half)
    if not predicted:
        raise ValueError(f"all {refused} held-out points lie far outside what was measured; profile more shapes")
    figures = error_figures(np.array(predicted), np.array(measured))
    return {**figures, "coverage": float(np.mean(covered)), "refused": refused}


def predicted_with_bar(row: Measured, residual: Residual, device: DeviceSpec) -> tuple[float, float]:
    """Return ns, and half of the 90 % interval of log(measured / predicted).

    Raises:
        ValueError: the row is far outside what was measured.
    """
    ns, (fixed_ns, _, x_F) = row.predicted_ns(device, residual), row.split_ns(device, residual.constants)
    kernels = max(0.0, 1.0 - fixed_ns / ns)
    return ns, residual.bar * float(residual.widening(x_F)) * kernels
