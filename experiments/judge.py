"""Learn on one half of the requests, judge on the other, over several splits: who closes the gap to the oracle.

Each split has halves, batches and an order of its own, the same for every policy; what is learned before the judged
steps is kept. Effects of splits are averaged, and their spread gives the intervals.

Shape letters: C splits, P policies, N judged steps.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..policies.contract import Policy
from ..policies.data import load_device
from ..policies.layouts import fallback_plan
from ..traces.schema import StepSource
from . import paired
from .case import Case, Options, prepare
from .halves import learn_then_judge
from .ranking import REFERENCE, times_of
from .runs import RunFolder, provenance
from .simulate import Outcome, World, other_work_of, simulate
from .sweep_grid import grid_of
from .tasks import progress, unordered

BOUND, BASELINES = "oracle", ("dynamic", "hot_cold")
"""The gap lies between the bound and the better of the baselines, and unsliced, which both may fall back to."""
LEAST_GAP_PERCENT = 0.1
"""No GPU's clock repeats a step time better than this: a smaller gap is noise, whatever its interval."""
BELIEF_WORTH = 0.1
"""Fraction by which observed times must differ from the belief's to be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """What is judged on."""

    options: Options
    policies: Sequence[str]
    """As `sweep_grid` reads them."""
    splits: int = 5
    learn_steps: int = 400
    judge_steps: int = 400
    batch_size: int | None = None
    belief: str | None = None
    """Device that policies believe they run on; None: the one they do."""
    perturbed: bool = False
    """Each split is simulated under a draw of the model's errors."""
    out: Path = field(default_factory=lambda: Path("runs"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One policy on one split: the times of the steps that it is judged on."""

    outcome: Outcome
    first: int

    def times(self) -> paired.Floats:
        """Return the judged steps' times, ns."""
        return self.outcome.times()[self.first :]


def judge(asked: Splits) -> tuple[dict[str, Any], Path]:
    """Judge policies on unseen requests; return what came out, as plain values, and the run folder.

    Raises:
        ValueError: the input cannot be used.
    """
    if asked.splits < 2:
        raise ValueError(f"{asked.splits} split has no spread; give at least 2")
    names = dict.fromkeys((REFERENCE, *BASELINES, BOUND, *asked.policies))
    policies = dict(pair for text in names for pair in _named(text))
    case = prepare(replace(asked.options, policies=(REFERENCE,)))
    world = replace(case.world, believed=load_device(asked.belief) if asked.belief else None)
    seeds = [asked.options.seed + i for i in range(asked.splits)]
    sources = {seed: _source(case, asked, seed) for seed in seeds}
    calls = [(name, policies[name], seed, sources[seed], world, asked) for seed in seeds for name in policies]
    folder = RunFolder(asked.out, "judge", _manifest(case, asked, policies))
    found: dict[int, dict[str, Judged]] = {seed: {} for seed in seeds}
    with progress(len(calls)) as advance:
        for name, seed, outcome in unordered(_run, calls, asked.options.jobs):
            found[seed][name] = Judged(outcome=outcome, first=asked.learn_steps)
            advance(1, f"judged {name}")
    summary = summarise([found[seed] for seed in seeds], list(policies), asked)
    summary["belief"] = belief_words(world, sources[seeds[0]])
    folder.write_json("summary.json", summary)
    return summary, folder.finish()


def _named(text: str) -> list[tuple[str, Policy[Any]]]:
    """Return policies by the text that asked for them, so that two settings of one do not collide."""
    found = list(grid_of(text))
    return [(text if len(found) == 1 else f"{name}{asdict(policy)}", policy) for name, policy in found]


def _source(case: Case, asked: Splits, seed: int) -> StepSource:
    if case.rebatch is None:
        raise ValueError(f"{case.opened.name} has too few requests to split; give a trace of at least 8 requests")
    trace, like = case.rebatch
    if asked.batch_size:
        like = replace(like, batch_size=asked.batch_size, max_tokens_per_step=None)
    return learn_then_judge(trace, like, learn_steps=asked.learn_steps, judge_steps=asked.judge_steps, seed=seed)


def _manifest(case: Case, asked: Splits, policies: dict[str, Policy[Any]]) -> dict[str, Any]:
    asked_for = {name: value for name, value in asdict(asked).items() if name != "options"}
    return {
        **provenance(),
        **asked_for,
        "seed": asked.options.seed,
        "trace": case.opened.plain(),
        "device": case.world.device.name,
        "model": case.world.model.name,
        "policies": {name: asdict(policy) for name, policy in policies.items()},
    }


def _run(
    name: str, policy: Policy[Any], seed: int, source: StepSource, world: World, asked: Splits
) -> tuple[str, int, Outcome]:
    return name, seed, simulate(policy, source.steps(), world, draw=seed if asked.perturbed else None)


def summarise(found: Sequence[dict[str, Judged]], names: Sequence[str], asked: Splits) -> dict[str, Any]:
    """Return effects, p-values corrected for their number, what they are worth, and how much of the gap is closed."""
    effect_CP = np.array([paired.effect_percent(times_of(one, names), 0) for one in found])
    effect_P, deviation_BP = effect_CP.mean(axis=0), paired.mean_draws(effect_CP, seed=asked.options.seed)
    low_P, high_P = paired.interval(effect_P, deviation_BP)
    compared = [p for p, name in enumerate(names) if name not in (REFERENCE, BOUND)]
    p_values = dict(zip(compared, paired.holm([paired.p_of_mean(effect_CP[:, p]) for p in compared]), strict=True))
    base_ns = float(np.mean([one[REFERENCE].times().mean() for one in found]))
    base_j = _joules(found, REFERENCE)
    rows = [
        {
            "policy": name,
            "deployable": name != BOUND,
            "effect_percent": float(effect_P[p]),
            "interval_percent": [float(low_P[p]), float(high_P[p])],
            "p_holm": p_values.get(p),
            "gain_us_per_step": float(-effect_P[p] / 100 * base_ns / 1e3),
            "gain_j_per_1k_steps": (base_j - _joules(found, name)) * 1e3,
            "p99_us": float(np.mean([np.quantile(one[name].times(), 0.99) for one in found])) / 1e3,
            "effects_percent": effect_CP[:, p].tolist(),
        }
        for p, name in enumerate(names)
    ]
    rows.sort(key=lambda row: (not row["deployable"], row["effect_percent"]))
    return {"unsliced_us": base_ns / 1e3, "ranking": rows, **_gap(effect_CP, list(names), asked.options.seed)}


def _joules(found: Sequence[dict[str, Judged]], name: str) -> float:
    """Return the energy of a step, learning included: no counter measures a part of a run that is that short."""
    outcomes = [one[name].outcome for one in found]
    return sum(w.energy_uj or 0 for o in outcomes for w in o.energy) / 1e6 / sum(len(o.step_ns) for o in outcomes)


def _gap(effect_CP: paired.Floats, names: list[str], seed: int) -> dict[str, Any]:
    baseline_C = effect_CP[:, [names.index(name) for name in (REFERENCE, *BASELINES)]].min(axis=1)
    gap_C = baseline_C - effect_CP[:, names.index(BOUND)]
    draws_B = paired.mean_draws(gap_C[:, None], seed=seed)
    (low,), (high,) = paired.interval(np.array([gap_C.mean()]), draws_B)
    nothing = bool(low < LEAST_GAP_PERCENT)
    others = [name for name in names if name not in (REFERENCE, *BASELINES, BOUND)]
    closed = {name: float((baseline_C - effect_CP[:, names.index(name)]).sum() / gap_C.sum()) for name in others}
    return {
        "gap_percent": float(gap_C.mean()),
        "gap_interval_percent": [float(low), float(high)],
        "nothing_to_predict": nothing,
        "closed": None if nothing else closed,
    }


def belief_words(world: World, source: StepSource) -> str | None:
    """Return a sentence when what an unsliced step takes is not what the policies believe; None when it is."""
    setup, truth = world.setup(), world.truth()
    plan, steps = fallback_plan(setup), list(source.steps())[::50]
    assert setup.belief is not None
    pairs = [(s.counts_LE, other_work_of(s, world.model)) for s in steps]
    ratio = float(np.median([truth.step_ns(plan, *p) / setup.belief.step_ns(plan, *p) for p in pairs]))
    if abs(ratio - 1.0) < BELIEF_WORTH:
        return None
    return f"the belief disagrees with what was observed: unsliced steps take {ratio:.2f} times what it says"


def lines(summary: dict[str, Any]) -> list[str]:
    """Return the outcome in words, a line each."""
    said = [f"unsliced takes {summary['unsliced_us']:.1f} us a step; effects are on requests never seen"]
    for row in summary["ranking"]:
        low, high = row["interval_percent"]
        p = "bound, not deployable" if row["p_holm"] is None else f"p {row['p_holm']:.3f} (Holm)"
        worth = f"{row['gain_us_per_step']:+.1f} us, {row['gain_j_per_1k_steps']:+.1f} J per 1k steps gained"
        if row["policy"] != REFERENCE:
            said.append(f"{row['policy']:24} {row['effect_percent']:+.2f} % ({low:+.2f} … {high:+.2f}), {p}; {worth}")
    low, high = summary["gap_interval_percent"]
    gap = f"{summary['gap_percent']:.2f} % ({low:.2f} … {high:.2f})"
    if summary["nothing_to_predict"]:
        said.append(f"nothing to predict: the gap to the oracle, {gap}, lies inside the noise")
    else:
        said += [
            f"{name} closes {share:.0%} of the gap to the oracle, {gap}" for name, share in summary["closed"].items()
        ]
    return said + ([summary["belief"]] if summary["belief"] else [])
