"""Search a policy's parameters for several objectives with Optuna: a study that many processes may share.

Every trial runs the same steps, so trials differ by their parameters alone. The search stops when the fastest trial
can be told from every trial with other step times, and was not beaten for a while.
"""

import json
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import paired
from .case import Options, prepare
from .runs import RunFolder, provenance
from .sweep_grid import FORM, NEXT_PARAMETER, grid_of
from .sweep_point import Limits, Workload, composition_of, guarded, measure, steps_of

OBJECTIVES = {"latency": "step_mean_ns", "p99": "step_p99_ns", "energy": "energy_j_per_1k_tokens"}
RANGE = re.compile(r"\s*(-?[\d.]+(?:e-?\d+)?)\s*\.\.\s*(-?[\d.]+(?:e-?\d+)?)\s*")
PATIENCE = 12
"""Trials without a faster one before the search may stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is searched."""

    policy: str
    """Like "hot_cold(min_gain=0.001..0.05, plan_every=8|32)": ranges and choices."""
    options: Options
    objectives: Sequence[str]
    trials: int
    storage: str
    """An SQL address, or the path of a journal file."""
    study: str
    limits: Limits
    out: Path


def space_of(text: str) -> tuple[str, dict[str, tuple[float, float] | tuple[int, int] | list[str]]]:
    """Return the policy's name and its parameters: ranges, of whole numbers where both ends are, or choices.

    Raises:
        ValueError: the text has another form, or no parameter has several values.
    """
    found = FORM.fullmatch(text)
    if found is None or not found[2]:
        raise ValueError(f"search {text!r}: write policy(parameter=least..most, parameter=value|value)")
    space: dict[str, Any] = {}
    for part in NEXT_PARAMETER.split(found[2]):
        name, _, values = part.partition("=")
        ends = RANGE.fullmatch(values)
        if ends is None:
            space[name.strip()] = [value.strip() for value in values.split("|")]
            continue
        whole = ends[1].lstrip("-").isdigit() and ends[2].lstrip("-").isdigit()
        least, most = (int(end) if whole else float(end) for end in (ends[1], ends[2]))
        if not least < most:
            raise ValueError(f"search {text!r}: {name.strip()} goes from {least} to {most}; give the smaller end first")
        space[name.strip()] = least, most
    # The ends stand for all between: a wrong name or type is refused before the first trial.
    for end in (0, -1):
        list(grid_of(_written(found[1], {name: values[end] for name, values in space.items()})))
    return found[1], space


def _written(name: str, params: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in params.items())})"


def search(asked: Asked) -> tuple[dict[str, Any], Path]:
    """Run trials until the best is sure or their number is reached; return what was found, and the run folder.

    Raises:
        ValueError: Optuna is missing, the storage cannot be used, or the input is wrong.
    """
    if unknown := [name for name in asked.objectives if name not in OBJECTIVES]:
        raise ValueError(f"objective {unknown[0]!r} is unknown; there are {', '.join(OBJECTIVES)}")
    name, space = space_of(asked.policy)
    case = prepare(asked.options)
    work = Workload(options=asked.options, seed=asked.options.seed or None, num_steps=case.survey.num_steps)
    composition_of(case, work)
    world, source = steps_of(work)
    folder = RunFolder(asked.out, "search", {**provenance(), "policy": asked.policy, "trace": case.opened.plain()})
    with _study(asked) as (optuna, study):

        def run(trial: Any) -> tuple[float, ...]:
            params = {key: _drawn(trial, key, values) for key, values in space.items()}
            ((_, policy),) = grid_of(_written(name, params))
            found, reason = guarded(lambda: measure(policy, source, work.num_steps, world), asked.limits)
            if found is None:
                trial.set_user_attr("reason", reason)
                raise optuna.TrialPruned(reason)
            trial.set_user_attr("step_ns", found["step_ns"])
            return tuple(found[OBJECTIVES[objective]] for objective in asked.objectives)

        def stop_when_sure(study: Any, _: Any) -> None:
            if separated(_complete(study)):
                study.stop()

        study.optimize(run, n_trials=asked.trials, callbacks=[stop_when_sure])
        summary = _summary(study, asked)
    folder.write_json("summary.json", summary)
    draw(summary, folder.path)
    return summary, folder.finish()


@contextmanager
def _study(asked: Asked) -> Any:
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise ValueError("optuna is not installed; pip install 'expertslice[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if "://" not in asked.storage:
            Path(asked.storage).parent.mkdir(parents=True, exist_ok=True)
        storage = asked.storage if "://" in asked.storage else JournalStorage(JournalFileBackend(asked.storage))
        study = optuna.create_study(
            storage=storage,
            study_name=asked.study,
            directions=["minimize"] * len(asked.objectives),
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=asked.options.seed),
        )
    except Exception as error:
        # Storages raise whatever their database does.
        raise ValueError(f"storage {asked.storage} cannot be used ({error}); give a file, or an SQL address") from error
    if len(study.directions) != len(asked.objectives):
        raise ValueError(f"study {asked.study!r} has {len(study.directions)} objectives; take another --study name")
    yield optuna, study


def _drawn(trial: Any, key: str, values: Any) -> Any:
    if isinstance(values, list):
        return trial.suggest_categorical(key, values)
    kind = trial.suggest_int if isinstance(values[0], int) else trial.suggest_float
    return kind(key, *values)


def _complete(study: Any) -> list[Any]:
    return [trial for trial in study.trials if trial.values and "step_ns" in trial.user_attrs]


def separated(trials: Sequence[Any]) -> bool:
    """Return whether the fastest trial's interval leaves out all others but those with the very same times."""
    if len(trials) <= PATIENCE:
        return False
    times_PN = np.unique(np.array([trial.user_attrs["step_ns"] for trial in trials], dtype=np.float64), axis=0)
    means = [float(np.mean(trial.user_attrs["step_ns"])) for trial in trials]
    if min(means[-PATIENCE:]) < min(means[:-PATIENCE]) or len(times_PN) < 2:
        return False
    best = int(times_PN.mean(axis=1).argmin())
    effect_P, deviation_BP = paired.effect_percent(times_PN, best), paired.block_bootstrap(times_PN, best, seed=0)
    return bool(np.delete(paired.compare_all(effect_P, deviation_BP).differ_PP[best], best).all())


def _summary(study: Any, asked: Asked) -> dict[str, Any]:
    done, front = _complete(study), {trial.number for trial in study.best_trials}
    rows = [
        {"trial": t.number, "params": t.params, "front": t.number in front}
        | dict(zip(asked.objectives, t.values, strict=True))
        for t in done
    ]
    failed = [t.user_attrs["reason"] for t in study.trials if "reason" in t.user_attrs]
    units = {name: OBJECTIVES[name] for name in asked.objectives}
    return {
        "trials": rows,
        "failed": failed,
        "stopped_sure": separated(done),
        "objectives": units,
        "study": asked.study,
    }


def draw(summary: dict[str, Any], folder: Path) -> None:
    """Draw every trial by its first two objectives, the Pareto front apart."""
    from .plotting import PALETTE, axes, finish, styled

    names, rows = list(summary["objectives"]), summary["trials"]
    if len(names) < 2 or not rows:
        return
    with styled():
        figure, ax = axes(3.2)
        for front, colour, label in ((False, PALETTE[7], "trials"), (True, PALETTE[0], "Pareto front")):
            some = [row for row in rows if row["front"] == front]
            ax.plot([r[names[0]] for r in some], [r[names[1]] for r in some], "o", ms=4, color=colour, label=label)
        ax.set(xlabel=summary["objectives"][names[0]], ylabel=summary["objectives"][names[1]])
        ax.legend()
        finish(figure, "pareto", "Objectives of every trial", "Nothing lies both left of and below the front.", folder)


def search_lines(summary: dict[str, Any]) -> list[str]:
    """Return the Pareto front in words, a line each."""
    told = "the fastest is told from all others" if summary["stopped_sure"] else "the fastest is not sure yet"
    said = [f"{len(summary['trials'])} trials, {len(summary['failed'])} failed; {told}"]
    for row in [row for row in summary["trials"] if row["front"]][:10]:
        values = ", ".join(f"{unit} {row[name]:.4g}" for name, unit in summary["objectives"].items())
        said.append(f"front: {values}  {json.dumps(row['params'])}")
    return said
