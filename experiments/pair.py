"""`expertslice pair`: the same policies on the same steps, on a backend and in the simulator, side by side.

Closed loop: the policy decides in both worlds. Open loop: the plans that ran on the backend are replayed in the
simulator, so that what is left is the error of its cost model. On the backend, policies take turns: A B, B A, ...

Shape letters: R rounds, P policies, N steps, M draws of the model's errors.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..policies.contract import Observation, Plan, Policy, Setup, SliceLayout, StepRecord
from ..policies.layouts import fallback_plan
from ..policies.loop import PolicyError, declared_layouts
from ..runtime.backend import Executor, ExecutorError, RuntimeBackend
from ..sim.backend import SimBackend
from ..traces.schema import next_power_of_two
from . import paired
from .case import Case, Options
from .errors import StoppedError
from .ranking import times_of
from .run import HOST_LABEL, Where, executors, prepare_to_run, steps_of, stoppable
from .runs import RunFolder, file_name, provenance
from .simulate import Outcome, collect, simulate

NUM_DRAWS = 8
SETTLE_STEPS = 8
"""First steps of every block, left out of statistics in both worlds: clocks and caches settle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOptions(Options):
    """What the user asked for."""

    where: Where = "host"
    rounds: int = 4
    busy_ok: bool = False


@dataclass(slots=True)
class Ran:
    """One policy's steps in one world: sums, and the plan that each step ran."""

    setup: Setup
    outcome: Outcome = field(default_factory=Outcome)
    plan_ids: list[str] = field(default_factory=list[str])
    plans: dict[str, Plan] = field(default_factory=dict[str, Plan])
    readings: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Of the GPU, before and after."""

    def __post_init__(self) -> None:
        fallback = fallback_plan(self.setup)
        self.plans[fallback.plan_id] = fallback

    def decided(self, _: Observation, plan: Plan) -> None:
        """Take note of a decision."""
        self.plans[plan.plan_id] = plan

    def recorded(self, record: StepRecord) -> None:
        """Take note of a finished step."""
        self.plan_ids.append(record.plan_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A policy that decides what ran elsewhere: its n-th plan takes effect at step n."""

    foresees: ClassVar[bool] = False
    reads_clock: ClassVar[bool] = False
    plans: tuple[Plan, ...]
    declared: tuple[SliceLayout, ...]

    def init(self, setup: Setup) -> int:
        return setup.control.delay_steps

    def layouts(self, setup: Setup) -> tuple[SliceLayout, ...]:
        del setup
        return self.declared

    def plan(self, obs: Observation, state: int) -> tuple[Plan, int]:
        return self.plans[min(obs.step + state, len(self.plans) - 1)], state


Round = Mapping[str, Ran]


@dataclass(slots=True)
class Found:
    """What there is so far, by policy."""

    closed: dict[str, Ran] = field(default_factory=dict[str, Ran])
    draws: list[list[float]] = field(default_factory=list[list[float]])
    rounds: list[Round] = field(default_factory=list[Round])
    """Complete ones on the backend."""
    replayed: dict[str, Ran] = field(default_factory=dict[str, Ran])


def pair(options: PairOptions, say: Callable[[str], object]) -> tuple[dict[str, Any], Path]:
    """Run policies in both worlds; return the summary and the folder.

    Raises:
        ValueError: something is unknown, does not fit, or cannot run here; the message says what to give instead.
        StoppedError: the user stopped it; complete rounds are kept as a partial result.
    """
    case = _prepare(options)
    about = _about(options, case)
    folder = RunFolder(options.out, "pair", {**provenance(), **about})
    found, reason = Found(), ""
    try:
        with executors(options.where, steps_of(case), seed=options.seed) as make, _sensor(options) as look:
            say("simulator: every policy decides")
            _simulate(case, folder.path, found)
            _take_turns(case, make, options.rounds, look, folder.path, found, say)
        say("simulator: the backend's plans replayed")
        _replay(case, folder.path, found)
    except KeyboardInterrupt:
        reason = "stopped by the user"
    except (ExecutorError, PolicyError) as error:
        reason = str(error)
    except BaseException as error:
        folder.keep_partial(str(error) or type(error).__name__)
        raise
    if reason and not found.rounds:
        folder.keep_partial(reason)
        raise StoppedError(f"{reason}; no round was complete, so there is nothing to compare")
    summary = _conclude(options, case, about, found, folder, reason)
    if not reason:
        return summary, folder.finish()
    folder.manifest["reason"] = reason
    raise StoppedError(f"{reason}; {len(found.rounds)} complete rounds are kept in {folder.finish('partial')}")


def _prepare(options: PairOptions) -> Case:
    if not options.policies:
        raise ValueError("pair compares policies with unsliced; name one or more, such as --policy hot_cold")
    case = prepare_to_run(options, options.where)
    if case.survey.num_steps < 2 * SETTLE_STEPS:
        raise ValueError(f"the trace gives {case.survey.num_steps} steps; pair needs {2 * SETTLE_STEPS} or more")
    return case


def _about(options: PairOptions, case: Case) -> dict[str, Any]:
    return {
        "trace": case.opened.plain(),
        "model": asdict(case.world.model),
        "device": {"name": case.world.device.name, "status": case.world.device.status},
        "where": options.where,
        "label": HOST_LABEL if options.where == "host" else "GPU timing",
        "steps": case.survey.num_steps,
        "seed": options.seed,
        "control": asdict(case.world.control),
        "policies": {name: asdict(policy) for name, policy in case.policies.items()},
        "notes": list(case.notes),
    }


@contextlib.contextmanager
def _sensor(options: PairOptions) -> Iterator[Callable[[], dict[str, Any]]]:
    if options.where == "host":
        yield dict
        return
    from .pair_gpu import sensor

    with sensor(busy_ok=options.busy_ok) as look:
        yield look


def _simulate(case: Case, folder: Path, found: Found) -> None:
    """Let every policy decide in the simulator, and under draws of the model's errors on sampled steps."""
    for name, policy in case.policies.items():
        found.closed[name] = _in_simulator(case, policy, folder / f"simulator-{file_name(name)}.parquet")

    def effects(draw: int | None) -> np.ndarray[Any, np.dtype[np.float64]]:
        ran = {n: simulate(p, case.survey.windows.steps(), case.world, draw=draw) for n, p in case.policies.items()}
        return paired.effect_percent(times_of(ran, list(ran)), 0)

    nominal_P = effects(None)
    for i in range(NUM_DRAWS):
        found.draws.append((effects(1000 * (case.options.seed + 1) + i) - nominal_P).tolist())


def _in_simulator(case: Case, policy: Policy[Any], records: Path) -> Ran:
    setup = case.world.setup()
    return _collected(policy, SimBackend(case.world.truth()), steps_of(case), setup, records)


def _collected(policy: Policy[Any], backend: Any, steps: Iterator[Any], setup: Setup, records: Path) -> Ran:
    ran = Ran(setup)
    ran.outcome = collect(
        policy, backend, steps, setup, records=records, on_record=ran.recorded, on_decision=ran.decided
    )
    return ran


def _take_turns(
    case: Case,
    make: Callable[[], Executor],
    rounds: int,
    look: Callable[[], dict[str, Any]],
    folder: Path,
    found: Found,
    say: Callable[[str], object],
) -> None:
    """Run every policy once a round on the backend, every second round in the opposite order."""
    order = list(case.policies.items())
    for number in range(rounds):
        done: dict[str, Ran] = {}
        for name, policy in order[:: -1 if number % 2 else 1]:
            before, path = look(), folder / f"backend-{file_name(name)}-{number}.parquet"
            with stoppable(steps_of(case)) as steps:
                backend = RuntimeBackend(make(), bucket_of=next_power_of_two)
                done[name] = _collected(policy, backend, steps, case.world.setup(), path)
            done[name].readings = [reading for reading in (before, look()) if reading]
            mean_us = done[name].outcome.times()[SETTLE_STEPS:].mean() / 1000
            say(f"round {number + 1} of {rounds}: {name:14} {mean_us:.1f} us a step")
        found.rounds.append({name: done[name] for name in case.policies})


def _replay(case: Case, folder: Path, found: Found) -> None:
    """Replay in the simulator what each policy's first round ran on the backend."""
    for name, ran in found.rounds[0].items():
        plans = tuple(ran.plans[plan_id] for plan_id in ran.plan_ids)
        policy = Replay(plans=plans, declared=declared_layouts(case.policies[name], ran.setup))
        found.replayed[name] = _in_simulator(case, policy, folder / f"replayed-{file_name(name)}.parquet")


def _conclude(
    options: PairOptions, case: Case, about: dict[str, Any], found: Found, folder: RunFolder, reason: str
) -> dict[str, Any]:
    """Write tables, summary and report of the rounds that are complete."""
    from .bench_rows import write_parquet
    from .pair_summary import blocks, summarise

    summary = {**about, "reason": reason, **summarise(list(case.policies), found, seed=options.seed)}
    write_parquet(folder.path / "blocks.parquet", blocks(found))
    write_parquet(folder.path / "effects.parquet", summary["rows"])
    folder.write_json("summary.json", summary)
    if options.report:
        from .pair_report import render_pair

        folder.write_text("report.html", render_pair(summary, found, folder.path))
    return summary
