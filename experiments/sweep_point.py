"""One policy on one workload, in a process of its own that is stopped when it takes too long or too much memory.

The process is forked from its worker, so the steps of a workload are made once for each worker.
"""

import itertools
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..policies.contract import Policy
from ..traces.compose import Composition
from ..traces.schema import StepSource
from .case import Case, Options, prepare
from .ranking import metrics
from .simulate import World, simulate
from .workload import fixed, rebatched

KEPT_BYTES = 256 * 2**20
"""Steps that take more than this are read from the trace again for every point."""
FORKING = threading.Lock()
"""A process forked between another's pipe and fork would hold that pipe open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one point may take."""

    time_s: float
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a policy is run on: a trace's own steps, or with a seed its requests in other batches."""

    options: Options
    seed: int | None
    num_steps: int


def composition_of(case: Case, work: Workload) -> Composition | None:
    """Return how requests are batched anew; None for the steps as they are.

    Raises:
        ValueError: the trace has too few requests for that, or counts alone.
    """
    if work.seed is None or work.options.fit_routing is not None:
        return None
    if case.rebatch is None:
        raise ValueError(f"{case.opened.name} has too few requests to batch anew; leave --seed out")
    return case.rebatch[1]


@lru_cache(maxsize=4)
def steps_of(work: Workload) -> tuple[World, StepSource]:
    """Return the world and the steps of a workload, kept in memory where they are small."""
    case = prepare(work.options)
    if composition_of(case, work) is not None:
        assert case.rebatch is not None
        return case.world, rebatched(*case.rebatch, num_steps=work.num_steps, seed=work.seed or 0)
    source = case.source
    size_bytes = 4 * work.num_steps * source.num_layers * source.num_experts
    return case.world, fixed(
        itertools.islice(source.steps(), work.num_steps), source
    ) if size_bytes < KEPT_BYTES else source


def measure(policy: Policy[Any], source: StepSource, num_steps: int, world: World) -> dict[str, Any]:
    """Return what a run cost, as plain values, with the time of each step."""
    outcome = simulate(policy, itertools.islice(source.steps(), num_steps), world)
    return {**metrics(outcome), "step_ns": list(outcome.step_ns)}


def guarded(run: Callable[[], dict[str, Any]], limits: Limits) -> tuple[dict[str, Any] | None, str | None]:
    """Return what `run` gives in a process of its own, or why there is nothing."""
    with FORKING:
        reader, writer = multiprocessing.Pipe(duplex=False)
        child = os.fork()
        if child == 0:
            _in_child(writer, run, limits)
        writer.close()
    try:
        if not reader.poll(limits.time_s):
            return None, f"took longer than {limits.time_s:g} s"
        return reader.recv()
    except EOFError:
        return None, "its process died"
    finally:
        reader.close()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _in_child(writer: Connection, run: Callable[[], dict[str, Any]], limits: Limits) -> None:
    try:
        _limit(limits)
        sent = run(), None
    except BaseException as error:
        short = isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError)
        allowed = f"needed more than {limits.memory_bytes / 2**30:g} GiB of memory"
        sent = None, allowed if short else " ".join(f"{type(error).__name__}: {error}".split())
    try:
        writer.send(sent)
    finally:
        # Nothing of the worker's may run here: no handlers, no flushing of its files.
        os._exit(0)


def _limit(limits: Limits) -> None:
    """Limit memory beyond what the worker holds, and the processor's time should nobody be left to stop us."""
    held = Path("/proc/self/statm")
    held_bytes = int(held.read_text().split()[0]) * resource.getpagesize() if held.exists() else 0
    for kind, most in ((resource.RLIMIT_AS, held_bytes + limits.memory_bytes),
                       (resource.RLIMIT_CPU, int(limits.time_s) + 60)):  # fmt: skip
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
