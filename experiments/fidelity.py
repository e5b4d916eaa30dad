"""`expertslice fidelity`: how far the simulator is from committed hardware records that it was not fitted to.

A profile: whole shapes, loads and a range of splits that were drawn by seed before anything was measured, predicted by
the committed device model. And the tuned layers of the benchmarks, other kernels than a profile's: two folds of whole
models, each predicted by a truth fitted to half of the other's loads. Beside them stand the noise of the measurement
and predictors that cost nothing.

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
from ..sim.calibrate import error_figures, fit_truth, halves, predicted_with_bar, roofline_ns
from .bench import DEVICES
from .calibrate import load_of, measured_of, read_profile, usable
from .design import FOLD_SEED, FOLDS
from .device_model import load
from .fidelity_records import Record, committed, device_of, of_layer

RESULTS = Path(__file__).resolve().parent.parent / "docs/results"
SPEED, PROFILE = RESULTS / "speed", RESULTS / "fidelity/profile"
LEAST_GAP = 0.02
"""Of two launches that hardware separates: several times what two captures of one step differ by."""
Row = dict[str, Any]


def model_name(record: Record) -> str:
    """Return the model that a record is of: what is held out whole."""
    return record.measured.model.name


def layers(say: Callable[[str], object] = lambda _: None) -> tuple[list[Row], Row]:
    """Return the benchmarks' layers with their predictions, none by a truth that has seen its shape, and a summary."""
    records, device, rows = committed(SPEED), load_device(DEVICES[device_of(SPEED)["device"]]), list[Row]()
    for fold in FOLDS:
        held = [one for one in records if model_name(one) in fold]
        seen = [one for one in records if model_name(one) not in fold]
        truth = fit_truth(halves([one.measured for one in seen], FOLD_SEED)[0], device)
        say(
            f"calibrated on {', '.join(sorted({model_name(one) for one in seen}))}; judged on {', '.join(sorted(fold))}"
        )
        near = _Nearest(seen)
        rows += [_row(one, truth, device, near) for one in held]
    return rows, summary_of(rows, "whole models, in two folds") | {"kernels": kernels(device)}


def profile(folder: Path = PROFILE) -> tuple[list[Row], Row]:
    """Return what is held out of the committed profile with the predictions of its device model, and a summary."""
    model = load(folder / "model.json")
    found = [(row, _profiled(row, model.spec)) for row in usable(read_profile(folder)[0])[0]]
    near = _Nearest([one for row, one in found if not row["held_out"]])
    rows = [
        _row(one, model.truth, model.spec, near)
        | {"arm": row["arm"], "regime": regime_of(row["arm"]), "whole_load": load_of(row).held_out}
        for row, one in found
        if row["held_out"]
    ]
    regimes = {name: [row for row in rows if row["regime"] == name] for name in sorted({r["regime"] for r in rows})}
    whole = [row for row in rows if row["whole_load"]]
    summary = summary_of(rows, "whole shapes, loads and a range of splits", whole)
    summary |= {"by_regime": {name: errors_of(mine, "calibrated") for name, mine in regimes.items()}}
    return rows, summary | {"between_runs": between_runs(folder)}


def regime_of(arm: str) -> str:
    """Return what a profiled way is: whole launches, one share of the SMs, a split of them, or slices that share."""
    first = arm.split(maxsplit=1)[0]
    return {"shared": "unsliced", "together": "sharing SMs"}.get(first, "split" if "+" in arm else "one share")


def _profiled(row: Row, device: DeviceSpec) -> Record:
    measured, noise = measured_of(row), (row["us_q80"] - row["us_q20"]) / 2 / row["us_q50"]
    return Record(measured, roofline_ns(measured, device), noise, row["part"])


def between_runs(folder: Path) -> Row:
    """Return how far a later run of some of the profile lies from the first."""
    rows = [usable(read_profile(one)[0])[0] for one in (folder, folder / "again")]
    first, later = ({(row["part"], row["arm"]): row["us_q50"] for row in mine} for mine in rows)
    off = [abs(us / first[at] - 1) for at, us in later.items()]
    return {"points": len(off), "median": float(np.median(off)), "p95": float(np.quantile(off, 0.95))}


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


def errors_of(rows: Sequence[Row], predictor: str) -> Row:
    """Return the errors of a predictor."""
    predicted_N, measured_N = (np.array([row[f"{name}_ns"] for row in rows]) for name in (predictor, "measured"))
    return error_figures(predicted_N, measured_N)


def summary_of(rows: Sequence[Row], held_out: str, ranked: Sequence[Row] | None = None) -> Row:
    """Return errors of every predictor, coverage, and how well launches of one load are ranked, of `ranked` alone."""
    ranked = rows if ranked is None else ranked
    inside = [abs(math.log(row["measured_ns"] / row["calibrated_ns"])) <= row["bar"] for row in rows]
    noise = [row["noise"] for row in rows if row["noise"] is not None]
    return {
        "records": len(rows),
        "held_out": held_out,
        "noise": {"points": len(noise), "median": float(np.median(noise)), "p95": float(np.quantile(noise, 0.95))},
        "errors": {name: errors_of(rows, name) for name in PREDICTORS},
        "by_tokens": {
            str(tokens): errors_of([row for row in rows if row["tokens"] == tokens], "calibrated")
            for tokens in sorted({row["tokens"] for row in rows})
        },
        "coverage_90": float(np.mean(inside)),
        "ranking": {name: ranking(ranked, f"{name}_ns") for name in PREDICTORS},
    }


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
        "loads": len(regrets), "tau_b": float(np.mean(taus)) if taus else None, "regret_mean": float(np.mean(regrets)),
        "regret_p95": float(np.quantile(regrets, 0.95)), "within_2": float(np.mean(np.array(regrets) <= 0.02)),
        "pairs": separated, "same_sign": same / separated,
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


def judge_committed(say: Callable[[str], object] = lambda _: None) -> tuple[dict[str, list[Row]], Row]:
    """Return rows and summary of the committed records, by kind.

    Raises:
        ValueError: this installation does not have them.
    """
    if not (SPEED / "tried.parquet").exists() or not (PROFILE / "model.json").exists():
        raise ValueError(f"the committed records are not at {SPEED.parent}; run in a checkout of the repository")
    found = {"profile": profile(), "layers": layers(say)}
    return {name: rows for name, (rows, _) in found.items()}, {name: one for name, (_, one) in found.items()}


def lines(summary: Row) -> list[str]:
    """Return a summary for the terminal."""
    found: list[str] = []
    for name, one in summary.items():
        found += ["", f"{name}: {one['records']} layer times; held out: {one['held_out']}"]
        found.append(f"{'predictor':12} {'MAPE':>7} {'median':>7} {'p95':>7} {'bias':>7} {'tau-b':>6}")
        for predictor, e in one["errors"].items():
            tau = one["ranking"][predictor]["tau_b"]
            figures = f"{e['mape']:7.1%} {e['median']:7.1%} {e['p95']:7.1%} {e['bias']:+7.1%}"
            found.append(f"{predictor:12} {figures} {'–' if tau is None else format(tau, '.2f'):>6}")
        found.append(f"{'noise':12} {'':7} {one['noise']['median']:7.1%} {one['noise']['p95']:7.1%}")
        parts = one.get("by_regime", {}) | {f"{k}, physics alone": e for k, e in one.get("kernels", {}).items()}
        found += [
            f"{part}: MAPE {e['mape']:.1%}, p95 {e['p95']:.1%}, bias {e['bias']:+.1%}" for part, e in parts.items()
        ]
        rank = one["ranking"]["calibrated"]
        found.append(f"90 % bars cover {one['coverage_90']:.1%}")
        found.append(
            f"{rank['same_sign']:.1%} of {rank['pairs']} pairs that hardware separates are ordered as it orders them; "
            f"the pick of a load costs {rank['regret_mean']:.1%} on average, in {rank['within_2']:.0%} of "
            f"{rank['loads']} loads 2 % or less"
        )
    return found[1:]
