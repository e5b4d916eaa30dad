"""What a policy saw and chose at a step, and what the alternatives would have cost: counterfactuals of a finished run.

A run's manifest says all that decided it, and equal inputs give equal decisions: they are made again rather than
stored, in the simulator for `whatif`, on the host's backend for `run`. The records say whether they are those of the
run. Costs are those of the simulator's truth for the step's true counts, switches apart.
"""

import itertools
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..policies.contract import Observation, Plan, Policy
from ..policies.layouts import fallback_plan
from ..policies.loop import deployable_control, drive
from ..policies.oracle import candidate_plans
from ..runtime.backend import RuntimeBackend
from ..runtime.host import HostExecutor
from ..sim.backend import SimBackend
from ..traces.schema import RoutedStep, nearest, next_power_of_two
from .case import Case, Options, prepare
from .ranking import REFERENCE, slice_words
from .records import read_records
from .runs import file_name
from .simulate import with_other_work

NUM_REGRETS = 10
"""Steps up to the one asked for at which regret is told."""


def explain_decision(folder: Path, step: int, name: str | None) -> dict[str, Any]:
    """Return what was seen, chosen and possible at a step of a run, as plain values.

    Raises:
        ValueError: the folder is no run of `whatif` or `run`, or has no such policy or step.
    """
    kind, case = reopened(folder)
    name = name or next((n for n in case.policies if n != REFERENCE), REFERENCE)
    if name not in case.policies:
        raise ValueError(nearest("policy", name, case.policies))
    if not 0 <= step < case.survey.num_steps:
        raise ValueError(f"the run has steps 0 to {case.survey.num_steps - 1}, not {step}; give one of them")
    steps = list(with_other_work(itertools.islice(case.source.steps(), step + 1), case.world.model))
    log = decisions(case.policies[name], steps, case, on_host=kind == "run")
    told = sorted(set(np.linspace(0, step, min(step + 1, NUM_REGRETS)).round().astype(int).tolist()))
    costs = {at: _costs(log.get(at), steps[at], case) for at in told}
    seen = log[step][0] if step in log else None
    return {
        "policy": name,
        "step": step,
        "decided_at": seen.step if seen else None,
        "seen": _seen(seen) if seen else None,
        "as_recorded": _as_recorded(folder, name, step, log[step][1] if step in log else None),
        **costs[step],
        "regret_percent": {at: one["regret_percent"] for at, one in costs.items()},
    }


def reopened(folder: Path) -> tuple[str, Case]:
    """Return which command made a run, and what it compared.

    Raises:
        ValueError: there is no such run, or its trace is not what it was.
    """
    manifest = folder / "manifest.json"
    known = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    kind = known.get("kind")
    if kind not in ("whatif", "run") or "options" not in known:
        raise ValueError(f"{folder} is no run of `expertslice whatif` or `run`; give the folder that one printed")
    options = {f.name: known["options"][f.name] for f in fields(Options) if f.name in known["options"]}
    case = prepare(Options(**{**options, "out": Path(options["out"])}))
    if case.opened.sha256 != known["trace"]["sha256"]:
        raise ValueError(f"{case.opened.name} has changed since the run; bring back the trace of then, or run again")
    return kind, case


def decisions(
    policy: Policy[Any], steps: list[RoutedStep], case: Case, *, on_host: bool
) -> dict[int, tuple[Observation, Plan]]:
    """Return each step's decision: what was seen when its plan was chosen, and the plan; none where nothing was yet."""
    truth = case.world.truth()
    setup = case.world.setup(truth if policy.foresees else None)
    backend = RuntimeBackend(HostExecutor(), bucket_of=next_power_of_two) if on_host else SimBackend(truth)
    delay = deployable_control(policy, setup).control.delay_steps
    log: dict[int, tuple[Observation, Plan]] = {}

    def on_decision(obs: Observation, plan: Plan) -> None:
        log[obs.step + delay] = obs, plan

    drive(policy, backend, steps, setup, on_record=lambda _: None, on_decision=on_decision)
    return log


def _as_recorded(folder: Path, name: str, step: int, plan: Plan | None) -> bool | None:
    """Return whether the run's record names the plan that was decided again; None: there is no record or no plan."""
    path = folder / f"{file_name(name)}.parquet"
    if plan is None or not path.exists():
        return None
    return [record.plan_id for record in read_records(path, step, step)] == [plan.plan_id]


def _seen(obs: Observation) -> dict[str, Any]:
    """Return an observation in figures."""
    newest = obs.counts_HLE[-1] if len(obs.counts_HLE) else None
    rows = 0 if newest is None else int(newest[0].sum())
    skew = None if newest is None or not rows else float((newest.max(axis=1) / newest.mean(axis=1)).mean())
    return {
        "history_steps": len(obs.counts_HLE),
        "newest_rows_per_layer": rows,
        "newest_max_over_mean": skew,
        "step_us": obs.step_ns / 1e3,
        "busy_us_S": (obs.busy_ns_LS.sum(axis=0) / 1e3).tolist(),
        "power_w": obs.power_w,
        "queued_tokens": obs.queued_tokens,
    }


def _costs(decision: tuple[Observation, Plan] | None, step: RoutedStep, case: Case) -> dict[str, Any]:
    """Return what the chosen plan and every alternative cost on a step, the cheapest first, and the regret."""
    truth = case.world.truth()
    setup = case.world.setup()
    chosen = decision[1] if decision else fallback_plan(setup)
    assert setup.belief is not None
    plans = {plan.plan_id: plan for plan in (chosen, *candidate_plans(replace(setup, belief=truth)))}
    rows = [
        {
            "plan": plan_words(plan),
            "chosen": plan_id == chosen.plan_id,
            "us": truth.step_ns(plan, step.counts_LE, step.other_L) / 1e3,
            "believed_us": setup.belief.step_ns(plan, step.counts_LE, step.other_L) / 1e3,
        }
        for plan_id, plan in plans.items()
    ]
    rows.sort(key=lambda row: row["us"])
    here = next(row["us"] for row in rows if row["chosen"])
    return {"alternatives": rows, "regret_percent": 100 * (here / rows[0]["us"] - 1)}


def plan_words(plan: Plan) -> str:
    """Return a plan in words."""
    slices = " beside ".join(dict.fromkeys(slice_words(one) for one in plan.layout.slices))
    bounds = getattr(plan.placement, "bounds", None)
    rule = "" if bounds == () else f", by tokens at {bounds[0]}" if bounds else ", pinned"
    return f"{plan.layout.num_slices} x {slices}{rule}{', helping each other' if plan.steal else ''}"


def decision_lines(found: dict[str, Any]) -> list[str]:
    """Return a decision in words, a line each."""
    seen = found["seen"]
    said = [f"step {found['step']} of {found['policy']}"]
    if seen is None:
        said.append("no plan had taken effect yet: it ran unsliced")
    else:
        skew = "idle" if seen["newest_max_over_mean"] is None else f"max / mean {seen['newest_max_over_mean']:.2f}"
        said.append(
            f"decided at step {found['decided_at']}, seeing {seen['history_steps']} steps, the newest with "
            f"{seen['newest_rows_per_layer']} rows a layer ({skew}), lasting {seen['step_us']:.1f} us"
        )
    if found["as_recorded"] is False:
        said.append(
            "the run recorded another plan: this policy reads clocks, which were a device's, or it was replaced"
        )
    for row in found["alternatives"]:
        mark = "->" if row["chosen"] else "  "
        said.append(f"{mark} {row['us']:10.1f} us, believed {row['believed_us']:10.1f}  {row['plan']}")
    over = ", ".join(f"{at}: {regret:.2f}" for at, regret in found["regret_percent"].items())
    return [*said, f"regret against the cheapest, percent by step: {over}"]
