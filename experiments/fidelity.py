"""`expertslice fidelity`: how far the simulator is from committed hardware records that it was not fitted to.

Two folds of whole models, drawn by seed: each is predicted by a truth fitted to half of the other's loads, as
`expertslice calibrate` fits it. Beside it stand
the noise of the measurement and predictors that cost nothing.

Shape letters: N records.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import kendalltau

from ..policies.contract import DeviceSpec
from ..policies.data import load_device
from ..policies.residual import Residual
from ..sim.calibrate import error_figures, fit_truth, halves, predicted_with_bar
from .bench import DEVICES
from .design import FOLD_SEED, FOLDS
from .fidelity_records import Record, committed, device_of, of_layer

SPEED = Path(__file__).resolve().parent.parent / "docs/results/speed"
LEAST_GAP = 0.02
"""Of two launches that hardware separates: several times what two captures of one step differ by."""
Row = dict[str, Any]


def model_name(record: Record) -> str:
    """Return the model that a record is of: what is held out whole."""
    return record.measured.model.name


def predictions(records: Sequence[Record], say: Callable[[str], object] = lambda _: None) -> tuple[list[Row], str]:
    """Return each record with its predictions, none by a model that has seen its shape, and the device's name."""
    manifest = device_of(SPEED)
    name, rows = DEVICES[manifest["device"]], list[Row]()
    device = load_device(name)
    for fold in FOLDS:
        held = [one for one in records if model_name(one) in fold]
        seen = [one for one in records if model_name(one) not in fold]
        truth = fit_truth(halves([one.measured for one in seen], FOLD_SEED)[0], device)
        say(
            f"calibrated on {', '.join(sorted({model_name(one) for one in seen}))}; judged on {', '.join(sorted(fold))}"
        )
        near = _Nearest(seen)
        rows += [_row(one, truth, device, near) for one in held]
    return rows, name


class _Nearest:
    """The trivial learner: the nearest load on record, scaled by the roofline."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._at_N2 = np.array([_place(one) for one in records])
        self._over_N = [one.measured.ns / one.floor_ns for one in records]

    def ns(self, record: Record) -> float:
        distance_N = np.square(self._at_N2 - _place(record)).sum(axis=1)
        return self._over_N[int(distance_N.argmin())] * record.floor_ns


def _place(record: Record) -> tuple[float, float]:
    rows = record.measured.counts_LE.mean(axis=0)
    return math.log2(record.floor_ns), math.log2(rows.sum() / max(1, (rows > 0).sum()))


def _row(record: Record, truth: Residual, device: DeviceSpec, near: _Nearest) -> Row:
    measured = record.measured
    ns, half = predicted_with_bar(measured, truth, device)
    return {
        "cell": measured.cell, "model": measured.model.name, "source": record.source, "measured_ns": measured.ns,
        "tokens": int(measured.counts_LE[0].sum() // measured.model.top_k), "calibrated_ns": ns, "bar": half,
        "physics_ns": measured.predicted_ns(device), "roofline_ns": record.floor_ns, "nearest_ns": near.ns(record),
        "noise": record.noise,
    }  # fmt: skip


PREDICTORS = ("calibrated", "physics", "nearest", "roofline")


def summary_of(rows: Sequence[Row]) -> Row:
    """Return errors of every predictor, coverage, and how well launches of one load are ranked."""
    measured_N = np.array([row["measured_ns"] for row in rows])
    errors = {name: error_figures(np.array([row[f"{name}_ns"] for row in rows]), measured_N) for name in PREDICTORS}
    inside = [abs(math.log(row["measured_ns"] / row["calibrated_ns"])) <= row["bar"] for row in rows]
    noise = [row["noise"] for row in rows if row["noise"] is not None]
    return {
        "records": len(rows),
        "held_out": "whole models, in two folds",
        "noise": {"points": len(noise), "median": float(np.median(noise)), "p95": float(np.quantile(noise, 0.95))},
        "errors": errors,
        "by_tokens": {
            str(tokens): error_figures(*_pair([row for row in rows if row["tokens"] == tokens]))
            for tokens in sorted({row["tokens"] for row in rows})
        },
        "coverage_90": float(np.mean(inside)),
        "ranking": {name: ranking(rows, f"{name}_ns") for name in ("calibrated", "physics")},
    }


def _pair(rows: Sequence[Row]) -> tuple[Any, Any]:
    return np.array([row["calibrated_ns"] for row in rows]), np.array([row["measured_ns"] for row in rows])


def ranking(rows: Sequence[Row], predictor: str) -> Row:
    """Return how launches of the same load and sitting are ranked: tau-b, pairs told apart, and what the pick costs."""
    loads: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        loads.setdefault((row["cell"], row["source"]), []).append(row)
    taus: list[float] = []
    regrets: list[float] = []
    same = separated = 0
    for launches in loads.values():
        if len(launches) < 2:
            continue
        tau = kendalltau([r["measured_ns"] for r in launches], [r[predictor] for r in launches], variant="b").statistic
        taus += [] if math.isnan(tau) else [float(tau)]
        picked = min(launches, key=lambda row: row[predictor])
        regrets.append(picked["measured_ns"] / min(row["measured_ns"] for row in launches) - 1)
        for a, b in itertools.combinations(launches, 2):
            gap = math.log(a["measured_ns"] / b["measured_ns"])
            if abs(gap) > LEAST_GAP:
                separated += 1
                same += gap * math.log(a[predictor] / b[predictor]) > 0
    return {
        "loads": len(regrets), "tau_b": float(np.mean(taus)), "regret_mean": float(np.mean(regrets)),
        "regret_p95": float(np.quantile(regrets, 0.95)), "pairs": separated, "same_sign": same / separated,
    }  # fmt: skip


def kernels(device: DeviceSpec, folder: Path = SPEED) -> Row:
    """Return errors by kernel of the physics alone: what the profiler says of routing, experts and combining."""
    parts: dict[str, list[tuple[float, float]]] = {"routing": [], "experts": [], "combine": []}
    for row in pq.read_table(folder / "account.parquet").to_pylist():
        measured = of_layer(row, row["launch"], row["whole_us"])
        work = measured.cost(device).work(measured.plan, measured.counts_LE[:1])
        node, times = device.graph_node_ns, work.layer_times(0)
        experts_us = sum(row[f"{part}_us"] for part in ("gather", "up", "middle", "down", "fused"))
        parts["routing"].append((work.head_ns(0) - node, row["routing_us"] * 1000))
        parts["experts"].append((times.busy_ns_S[0], experts_us * 1000))
        parts["combine"].append((work.tail_ns(0), row["combine_us"] * 1000))
    return {name: error_figures(*np.array(pairs).T) for name, pairs in parts.items()}


def judge_committed(say: Callable[[str], object] = lambda _: None) -> tuple[list[Row], Row]:
    """Return rows and summary of the committed records.

    Raises:
        ValueError: this installation does not have them.
    """
    if not (SPEED / "tried.parquet").exists():
        raise ValueError(f"the committed records are not at {SPEED}; run in a checkout of the repository")
    rows, name = predictions(committed(SPEED), say)
    return rows, {"device": name, **summary_of(rows), "kernels": kernels(load_device(name))}


def lines(summary: Row) -> list[str]:
    """Return a summary for the terminal."""
    found = [f"{summary['records']} layer times of {summary['device']}; held out: {summary['held_out']}"]
    found.append(f"{'predictor':12} {'MAPE':>7} {'median':>7} {'p95':>7} {'bias':>7}")
    for name, e in summary["errors"].items():
        found.append(f"{name:12} {e['mape']:7.1%} {e['median']:7.1%} {e['p95']:7.1%} {e['bias']:+7.1%}")
    noise, rank = summary["noise"], summary["ranking"]["calibrated"]
    found.append(f"{'noise':12} {'':7} {noise['median']:7.1%} {noise['p95']:7.1%}")
    for name, e in summary["kernels"].items():
        found.append(f"kernel, physics alone: {name:8} MAPE {e['mape']:6.1%}, bias {e['bias']:+.1%}")
    found.append(f"90 % bars cover {summary['coverage_90']:.1%}")
    found.append(
        f"launches of a load ranked: tau-b {rank['tau_b']:.2f}, {rank['same_sign']:.1%} of {rank['pairs']} pairs that "
        f"hardware separates, the pick costs {rank['regret_mean']:.1%} on average"
    )
    return found
