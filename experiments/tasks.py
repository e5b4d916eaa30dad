"""Independent calls on one worker or several: the same outcomes either way, and a bar that says how far they are."""

import itertools
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..policies.contract import Policy
from ..traces.schema import StepSource
from .errors import sentence_of
from .simulate import Outcome, World, simulate


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What every policy is run on: the first steps of a source, under the nominal model or a draw of its errors."""

    kind: str
    """What the outcomes are for: one of `whatif.KINDS`."""
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


def run_tasks(tasks: Sequence[Task], world: World, *, jobs: int) -> Iterator[tuple[int, Outcome]]:
    """Yield each task's place with its outcome, in the order in which they end; progress goes to stderr."""
    calls = unordered(_run, ((*one, world) for one in enumerate(tasks)), jobs)
    with progress(sum(task.run.num_steps for task in tasks)) as advance, closing(calls):
        advance(0, f"simulating {', '.join(dict.fromkeys(task.name for task in tasks))}")
        for left, (place, outcome, refusal) in zip(reversed(range(len(tasks))), calls, strict=True):
            if refusal:
                raise ValueError(refusal)
            task = tasks[place]
            advance(task.run.num_steps, f"simulated {task.name} ({task.run.label}) · {left} of {len(tasks)} left")
            yield place, outcome


def _run(place: int, task: Task, world: World) -> tuple[int, Outcome | None, str | None]:
    """Return the task's place with its outcome, or with the sentence for a mistake of the user's.

    The sentence is made where the mistake is: its traceback does not survive the way back from a worker.
    """
    steps = itertools.islice(task.run.source.steps(), task.run.num_steps)
    try:
        return place, simulate(task.policy, steps, world, draw=task.run.draw, records=task.records), None
    except ValueError as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        return place, None, sentence


def unordered(call: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], jobs: int) -> Generator[Any]:
    """Yield what a call returns for each tuple of arguments, in the order in which the calls end; close it early."""
    parallel = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
    results: Any = parallel(delayed(_uninterrupted)(os.getpid(), call, *given) for given in arguments)
    try:
        yield from results
    finally:
        # Whatever ended this early, what still runs is stopped. The executor's own shutdown would wait for a thread
        # that may be submitting the next call under the same lock.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*still being processed by the workers", category=UserWarning)
            results.close()


def _uninterrupted(parent: int, call: Callable[..., Any], *arguments: Any) -> Any:
    if os.getpid() != parent and threading.current_thread() is threading.main_thread():
        # Ctrl-C reaches every process of the terminal; only the parent decides what to keep.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return call(*arguments)


@contextmanager
def progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """Show a bar on stderr while the context lasts; what it yields moves it on, and says what is going on."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        shown = bar.add_task("starting", total=total)
        yield lambda steps, words: bar.update(shown, advance=steps, description=words)
