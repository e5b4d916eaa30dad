"""Energy of a run in windows of 2 s or more, for whatever steps end in them. A thread of its own reads the counter.

A query takes milliseconds, in the driver rather than in the interpreter: meanwhile steps are enqueued and run.
"""

import threading
import time
import warnings
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, replace

from ..policies.contract import EnergyWindow
from .meter import LEAST_WINDOW_S, EnergyMeter, MeterError

POLL_S = 0.002
UNKNOWN = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """The counter where it was seen to move, and the device then; None: it does not say."""

    at_ns: int
    energy_uj: int
    sm_clock_mhz: float | None
    temperature_c: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """Steps between two ticks."""

    first_step: int
    last_step: int
    begin: Tick
    end: Tick

    @property
    def duration_ns(self) -> int:
        return self.end.at_ns - self.begin.at_ns


class Windows:
    """Windows from ticks and ends of steps, on one clock; ticks may come from another thread."""

    def __init__(self) -> None:
        self._ticks: deque[Tick] = deque()
        self._spans: list[_Span] = []
        self._steps: tuple[int, int] | None = None

    def tick(self, tick: Tick) -> None:
        self._ticks.append(tick)

    def ended(self, step: int, end_ns: int) -> None:
        """Add a step's end; what ended before the first tick belongs to no window."""
        while len(self._ticks) > 1 and self._ticks[1].at_ns < end_ns:
            self._cut()
        if self._ticks and self._ticks[0].at_ns < end_ns:
            self._steps = (self._steps[0] if self._steps else step), step

    def _cut(self) -> None:
        begin, end = self._ticks.popleft(), self._ticks[0]
        if self._steps:
            self._spans.append(_Span(first_step=self._steps[0], last_step=self._steps[1], begin=begin, end=end))
        self._steps = None

    @property
    def power_w(self) -> float | None:
        return _uj(self._spans[-1]) / self._spans[-1].duration_ns * 1000 if self._spans else None

    def all(self, idle_w: float) -> list[EnergyWindow]:
        """Return the windows once all has ended: a short rest is part of the last one that it follows."""
        while len(self._ticks) > 1:
            self._cut()
        spans = self._spans
        if len(spans) > 1 and spans[-1].duration_ns < LEAST_WINDOW_S * 1e9 and spans[-2].end == spans[-1].begin:
            spans = [*spans[:-2], replace(spans[-2], last_step=spans[-1].last_step, end=spans[-1].end)]
        return [
            _window((one.first_step, one.last_step), one.duration_ns, idle_w, energy_uj=_uj(one), end=one.end)
            for one in spans
        ]


def _uj(span: _Span) -> int:
    return span.end.energy_uj - span.begin.energy_uj


def _window(
    steps: tuple[int, int], duration_ns: int, idle_w: float, *, energy_uj: int | None = None, end: Tick | None = None
) -> EnergyWindow:
    clock_mhz = end and end.sm_clock_mhz
    return EnergyWindow(
        first_step=steps[0],
        last_step=steps[1],
        duration_ns=duration_ns,
        energy_uj=energy_uj,
        idle_w=idle_w,
        sm_clock_mhz=UNKNOWN if clock_mhz is None else clock_mhz,
        temperature_c=end and end.temperature_c,
    )


class EnergyLog:
    """Reads the counter from entering to `close`; a device that cannot be read has windows without energy."""

    def __init__(self, meter: EnergyMeter) -> None:
        self._meter, self.windows = meter, Windows()
        self._owned, self._stop = ExitStack(), threading.Event()
        self._thread: threading.Thread | None = None
        self._reason: str | None = None
        self._idle_w = UNKNOWN
        self._steps: tuple[int, int] | None = None
        self._ends_ns = (0, 0)

    def measure_idle(self) -> None:
        """Measure what the device draws with nothing to do: before the clock starts, it takes three seconds."""
        try:
            self._owned.enter_context(self._meter)
            self._idle_w = self._meter.idle().power_w
        except (MeterError, ImportError) as error:
            self._reason = str(error)

    def start(self, zero_ns: int) -> None:
        """Begin the first window; ends of steps are ns since `zero_ns` of the meter's clock."""
        if self._reason is None:
            self._zero_ns = zero_ns
            self._thread = threading.Thread(target=self._read, name="energy", daemon=True)
            self._thread.start()

    def ended(self, step: int, end_ns: int) -> None:
        self._steps = (self._steps[0] if self._steps else step), step
        self._ends_ns = (self._ends_ns[0] or end_ns), end_ns
        self.windows.ended(step, end_ns)

    def _read(self) -> None:
        try:
            stopping = False
            while not stopping:
                stopping = self._stop.is_set()
                self.windows.tick(self._tick())
                self._stop.wait(LEAST_WINDOW_S)
        except MeterError as error:
            self._reason = str(error)

    def _tick(self) -> Tick:
        energy_mj, at_ns = self._meter.tick(lambda: time.sleep(POLL_S))
        now = self._meter.snapshot()
        return Tick(
            at_ns=at_ns - self._zero_ns,
            energy_uj=energy_mj * 1000,
            sm_clock_mhz=now.sm_clock_mhz,
            temperature_c=now.temperature_c,
        )

    def close(self) -> list[EnergyWindow]:
        """End the last window, which takes a tenth of a second, and return all; says once what could not be read."""
        self._stop.set()
        if self._thread:
            self._thread.join()
        self._owned.close()
        if self._reason:
            warnings.warn(f"energy is not measured: {self._reason}", stacklevel=2)
        if (found := self.windows.all(self._idle_w)) or self._steps is None:
            return found
        # The counter is not readable, or did not move meanwhile.
        return [_window(self._steps, self._ends_ns[1] - self._ends_ns[0], self._idle_w)]
