"""Independent simulations on one worker or several: the same outcomes either way, and a bar that names what runs."""

import itertools
import os
import signal
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..policies.contract import Policy
from ..traces.schema import StepSource
from .errors import sentence_of
from .simulate import Outcome, World, simulate


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What every policy is run on: the first steps of a source, under the nominal model or a draw of its errors."""

    kind: str
    """What the outcomes are for: "trace", "composition", "nominal" or "draw"."""
    label: str
    source: StepSource
    num_steps: int
    index: int = 0
    """Which composition or draw."""
    draw: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One policy on one run."""

    run: Run
    name: str
    policy: Policy[Any]
    records: Path | None = None


def _run(place: int, task: Task, world: World, counters: Path, parent: int) -> tuple[int, Outcome | None, str | None]:
    """Return the task's place with its outcome, or with the sentence for a mistake of the user's.

    The sentence is made where the mistake is: its traceback does not survive the way back from a worker.
    """
    if os.getpid() != parent:
        # Ctrl-C reaches every process of the terminal; only the parent decides what to keep.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    done = np.memmap(counters, dtype=np.int64, mode="r+")
    steps = itertools.islice(task.run.source.steps(), task.run.num_steps)
    options = {"draw": task.run.draw, "records": task.records, "on_steps": lambda n: done.__setitem__(place, n)}
    try:
        return place, simulate(task.policy, steps, world, **options), None
    except ValueError as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        return place, None, sentence


def run_tasks(tasks: Sequence[Task], world: World, *, jobs: int) -> Iterator[tuple[Task, Outcome]]:
    """Yield each task with its outcome, in the order in which they end; progress goes to stderr."""
    parallel = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertslice-")))
        counters = folder / "steps-done.i64"
        np.zeros(len(tasks), dtype=np.int64).tofile(counters)
        bar = stack.enter_context(Bar(tasks, np.memmap(counters, dtype=np.int64, mode="r")))
        calls = (delayed(_run)(place, task, world, counters, os.getpid()) for place, task in enumerate(tasks))
        results = parallel(calls)
        stack.callback(stop_workers, results)
        for place, outcome, refusal in results:
            if refusal:
                raise ValueError(refusal)
            bar.ended.add(place)
            yield tasks[place], outcome


def stop_workers(results: Any) -> None:
    # Whatever ended this early, what still runs is stopped. The executor's own shutdown would wait for a thread that
    # may be submitting the next task under the same lock.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*still being processed by the workers", category=UserWarning)
        results.close()


class Bar(Progress):
    """Shows steps done, what runs now, how many simulations are left and how long they will take."""

    def __init__(self, tasks: Sequence[Task], done: "np.memmap[Any, np.dtype[np.int64]]") -> None:
        self._simulated, self._done = tasks, done
        self._steps = np.array([task.run.num_steps for task in tasks])
        self.ended: set[int] = set()
        """Places of the tasks that have ended."""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        super().__init__(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self.add_task("starting", total=int(self._steps.sum()))

    def get_renderables(self) -> Iterable[RenderableType]:
        """Read the counters before every redraw."""
        now = np.minimum(self._done, self._steps)
        left = [i for i in range(len(now)) if i not in self.ended]
        running = [i for i in left if now[i] > 0] or left[:1]
        shown = [self._simulated[i] for i in running[:2]]
        names = ", ".join(f"{task.name} ({task.run.label})" for task in shown)
        text = f"simulating {names} · {len(left)} of {len(now)} left"
        for bar in self.task_ids:
            self.update(bar, completed=int(now.sum()), description=text)
        return super().get_renderables()
