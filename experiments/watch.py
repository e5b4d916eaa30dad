"""`expertslice run --profile`: a profiler beside a run, and on a GPU its utilisation counters."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Self

from ..policies.contract import Observation, Plan, Setup, StepRecord
from ..runtime.meter import EnergyMeter
from ..runtime.profiler import Profiler, table
from ..runtime.utilisation import Utilisation
from ..traces.schema import RoutedStep


class Watch:
    """Watches one policy's run, from entering to leaving."""

    def __init__(self, setup: Setup, *, counters: bool) -> None:
        self.profiler = Profiler(setup)
        self._counters = Utilisation(EnergyMeter(0)) if counters else None
        self._owned = ExitStack()
        self._submitted = self._finished = 0
        self._is_last = False
        self._used: dict[str, float | None] | None = None
        self.found: dict[str, Any] = {}

    def __enter__(self) -> Self:
        if self._counters:
            self._owned.enter_context(self._counters)
        return self

    def __exit__(self, *_: object) -> None:
        used = self._used if self._used is not None else self._counters.read() if self._counters else {}
        reason = self._counters.reason if self._counters else "no GPU"
        self._owned.close()
        self.found = {**self.profiler.profile(), "utilisation": used, "utilisation_reason": reason}

    def steps(self, steps: Iterator[RoutedStep]) -> Iterator[RoutedStep]:
        """Yield steps, their counts added; counters tell of the time from the first one's submission on."""
        for step in steps:
            if not self._submitted and self._counters:
                self._counters.begin()
            self._submitted += 1
            self.profiler.submitted(step)
            yield step
        self._is_last = True

    def finished(self, record: StepRecord) -> None:
        """Take note of a finished step; counters tell of the time up to the last one."""
        self.profiler.finished(record)
        self._finished += 1
        if self._is_last and self._finished == self._submitted and self._counters:
            self._used = self._counters.read()

    def decided(self, _: Observation, plan: Plan) -> None:
        """Take note of a decision."""
        self.profiler.decided(plan)

    def lines(self) -> list[str]:
        """Return what was found in a few lines."""
        return table(self.found)
