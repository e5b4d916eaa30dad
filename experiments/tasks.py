"""Independent simulations on one worker or several: the same outcomes either way, and a bar that names what runs."""

import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..policies.contract import Policy
from ..traces.schema import StepSource
from .errors import sentence_of
from .simulate import Outcome, World, simulate

POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One policy over one source of steps."""

    label: str
    """What the progress bar calls it."""
    kind: str
    """What the outcome is for: "trace", "composition" or "draw"."""
    index: int
    """Which composition or draw."""
    name: str
    policy: Policy[Any]
    source: StepSource
    num_steps: int
    draw: int | None = None
    records: Path | None = None

    def run(self, world: World, on_steps: Callable[[int], None]) -> Outcome:
        """Simulate it."""
        steps = self.source.steps()
        return simulate(self.name, self.policy, steps, world, draw=self.draw, records=self.records, on_steps=on_steps)


@dataclass(frozen=True, slots=True)
class Refused:
    """A mistake of the user's, as its sentence: a traceback does not survive the way back from a worker."""

    sentence: str


def _run_in_worker(place: int, task: Task, world: World, counters: Path) -> tuple[int, Outcome | Refused]:
    # Ctrl-C reaches every process of the terminal; only the parent decides what to keep.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    done = np.memmap(counters, dtype=np.int64, mode="r+")
    try:
        return place, task.run(world, lambda steps: done.__setitem__(place, steps))
    except ValueError as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        return place, Refused(sentence)


def run_tasks(tasks: Sequence[Task], world: World, *, jobs: int) -> Iterator[tuple[Task, Outcome]]:
    """Yield each task with its outcome, in the order in which they end; progress goes to stderr."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertslice-")))
        counters = folder / "steps-done.i64"
        np.zeros(len(tasks), dtype=np.int64).tofile(counters)
        done = np.memmap(counters, dtype=np.int64, mode="r+")
        ended: set[int] = set()
        stack.enter_context(_bar(tasks, done, ended))
        runner = _serially if jobs == 1 else _in_parallel
        for place, outcome in runner(tasks, world, jobs, counters):
            ended.add(place)
            yield tasks[place], outcome


def _serially(tasks: Sequence[Task], world: World, jobs: int, counters: Path) -> Iterator[tuple[int, Outcome]]:
    del jobs
    done = np.memmap(counters, dtype=np.int64, mode="r+")
    for place, task in enumerate(tasks):
        yield place, task.run(world, lambda steps, place=place: done.__setitem__(place, steps))


def _in_parallel(tasks: Sequence[Task], world: World, jobs: int, counters: Path) -> Iterator[tuple[int, Outcome]]:
    from joblib import Parallel, delayed

    parallel = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
    results = parallel(delayed(_run_in_worker)(place, task, world, counters) for place, task in enumerate(tasks))
    try:
        for place, outcome in results:
            yield place, _accepted(outcome)
    finally:
        # Whatever ended this early, what still runs is stopped. The executor's own shutdown would wait for a thread
        # that may be submitting the next task under the same lock.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*still being processed by the workers", category=UserWarning)
            results.close()


def _accepted(outcome: Outcome | Refused) -> Outcome:
    if isinstance(outcome, Outcome):
        return outcome
    raise ValueError(outcome.sentence)


@contextmanager
def _bar(tasks: Sequence[Task], done: "np.memmap[Any, np.dtype[np.int64]]", ended: set[int]) -> Iterator[None]:
    """Show steps done, what runs now, how many simulations are left and how long they will take."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    steps = np.array([task.num_steps for task in tasks])
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    bar = progress.add_task("starting", total=int(steps.sum()))
    over = threading.Event()

    def refresh() -> None:
        now = np.minimum(done, steps)
        running = [task.label for i, task in enumerate(tasks) if now[i] > 0 and i not in ended]
        following = [task.label for i, task in enumerate(tasks) if i not in ended][:1]
        left = len(tasks) - len(ended)
        text = f"simulating {', '.join(running[:2] or following)} · {left} of {len(tasks)} left"
        progress.update(bar, completed=int(now.sum()), description=text)

    def watch() -> None:
        while not over.wait(POLL_S):
            refresh()

    with progress:
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            refresh()
