"""What a policy saw and chose at a step, and what the alternatives would have cost: counterfactuals of a finished run.

A run's manifest says all that decided it, and equal inputs give equal decisions: they are made again rather than
stored. Costs are those of the simulator's truth for the step's true counts, switches apart.
"""

import itertools
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..policies.contract import Observation, Plan, Policy
from ..policies.layouts import fallback_plan
from ..policies.loop import deployable_control
from ..policies.oracle import candidate_plans
from ..traces.schema import RoutedStep, nearest
from .case import Case, Options, prepare
from .ranking import REFERENCE, slice_words
from .simulate import other_work_of, simulate

NUM_REGRETS = 10
"""Steps up to the one asked for at which regret is told."""


def explain_decision(folder: Path, step: int, name: str | None) -> dict[str, Any]:
    """Return what was seen, chosen and possible at a step of a what-if run, as plain values.

    Raises:
        ValueError: the folder is no what-if run, or has no such policy or step.
    """
    case = reopened(folder)
    name = name or next((n for n in case.policies if n != REFERENCE), REFERENCE)
    if name not in case.policies:
        raise ValueError(nearest("policy", name, case.policies))
    if not 0 <= step < case.survey.num_steps:
        raise ValueError(f"the run has steps 0 to {case.survey.num_steps - 1}, not {step}; give one of them")
    policy, steps = case.policies[name], list(itertools.islice(case.source.steps(), step + 1))
    log = decisions(policy, steps, case)
    told = sorted(set(np.linspace(0, step, min(step + 1, NUM_REGRETS)).round().astype(int).tolist()))
    costs = {at: _costs(log.get(at), steps[at], case) for at in told}
    seen = log[step][0] if step in log else None
    return {
        "policy": name,
        "step": step,
        "decided_at": seen.step if seen else None,
        "seen": _seen(seen) if seen else None,
        **costs[step],
        "regret_percent": {at: one["regret_percent"] for at, one in costs.items()},
    }


def reopened(folder: Path) -> Case:
    """Return what a what-if run compared.

    Raises:
        ValueError: there is no such run, or its trace is not what it was.
    """
    manifest = folder / "manifest.json"
    known = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    if known.get("kind") != "whatif":
        raise ValueError(f"{folder} is no run of `expertslice whatif`; give the folder that one printed")
    options = {f.name: known["options"][f.name] for f in fields(Options) if f.name in known["options"]}
    case = prepare(Options(**{**options, "out": Path(options["out"])}))
    if case.opened.sha256 != known["trace"]["sha256"]:
        raise ValueError(f"{case.opened.name} has changed since the run; bring back the trace of then, or run again")
    return case


def decisions(policy: Policy[Any], steps: list[RoutedStep], case: Case) -> dict[int, tuple[Observation, Plan]]:
    """Return each step's decision: what was seen when its plan was chosen, and the plan; none where nothing was yet."""
    setup = case.world.setup(foresees=policy.foresees, truth=case.world.truth())
    delay = deployable_control(policy, setup).control.delay_steps
    log: dict[int, tuple[Observation, Plan]] = {}

    def on_decision(obs: Observation, plan: Plan) -> None:
        log[obs.step + delay] = obs, plan

    simulate(policy, steps, case.world, on_decision=on_decision)
    return log


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
    setup = case.world.setup(foresees=False, truth=truth)
    chosen = decision[1] if decision else fallback_plan(setup)
    assert setup.belief is not None
    other = other_work_of(step, truth.model)
    plans = {plan.plan_id: plan for plan in (chosen, *candidate_plans(replace(setup, belief=truth)))}
    rows = [
        {
            "plan": plan_words(plan),
            "chosen": plan_id == chosen.plan_id,
            "us": truth.step_ns(plan, step.counts_LE, other) / 1e3,
            "believed_us": setup.belief.step_ns(plan, step.counts_LE, other) / 1e3,
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
    for row in found["alternatives"]:
        mark = "->" if row["chosen"] else "  "
        said.append(f"{mark} {row['us']:10.1f} us, believed {row['believed_us']:10.1f}  {row['plan']}")
    over = ", ".join(f"{at}: {regret:.2f}" for at, regret in found["regret_percent"].items())
    return [*said, f"regret against the cheapest, percent by step: {over}"]
