"""Clock and power as state, and energy windows.

Power is what idles, plus energy per byte, plus energy per FLOP that falls with the square of the clock. The constants
follow from four figures of the device: power while streaming, while multiplying at the sustained rate, and both rates.
Firmware watches a moving average: a burst runs at the full clock, and once the average nears the limit the clock falls
until the sustained rate is left; idle time lets it recover.
"""

from dataclasses import dataclass, replace
from math import cbrt, exp, floor

from ..policies.contract import DeviceSpec, EnergyWindow
from ..policies.energy import energy_rates

AVERAGE_NS = 40_000_000
"""Time constant of the moving average: a burst of 20 ms keeps its clock, 100 ms of rest restore it."""
GAIN = 5.0
"""How far above the limit power may go for each watt that the average lies below it."""
CLOCK_STEPS = 256
LEAST_CLOCK = 0.25
WINDOW_NS = 2_000_000_000


class Power:
    """Follows what the device draws; `clock` is a part of the burst clock."""

    def __init__(self, device: DeviceSpec) -> None:
        self._device = device
        # The regulator holds the mean just below the limit: at what the sustained product was measured to draw.
        self._held_w = min(device.matrix_w, device.limit_w)
        self._joule_per_byte, self._joule_per_flop = energy_rates(device)
        self.clock = 1.0
        self.average_w = device.idle_w
        self._work_w = (0.0, 0.0)
        """Memory and matrix power of the last arithmetic at the full clock: a gap between steps is no new workload."""

    def spend(self, duration_ns: int, hbm_bytes: float, flops: float) -> float:
        """Account for a stretch of work and set the clock of the next; return its energy in joules."""
        if duration_ns <= 0:
            return 0.0
        seconds = duration_ns / 1e9
        memory_w = self._device.idle_w + self._joule_per_byte * hbm_bytes / seconds
        matrix_w = self._joule_per_flop * flops / seconds * self.clock**2
        drawn_w = memory_w + matrix_w
        step = 1 - exp(-duration_ns / AVERAGE_NS)
        self.average_w += (drawn_w - self.average_w) * step
        # A gain above 1 / step would overshoot within one more stretch like this one.
        allowed_w = self._held_w + min(GAIN, 1 / step) * (self._held_w - self.average_w)
        if matrix_w:
            self._work_w = memory_w, matrix_w / self.clock**3
        self.clock = self._next_clock(allowed_w)
        return drawn_w * seconds

    def _next_clock(self, allowed_w: float) -> float:
        """Return the clock at which work like the last would draw what is allowed; its rate follows the clock."""
        memory_w, matrix_w = self._work_w
        if memory_w + matrix_w <= allowed_w:
            return 1.0
        clock = cbrt(max(0.0, allowed_w - memory_w) / matrix_w) if matrix_w else 1.0
        return max(LEAST_CLOCK, min(1.0, floor(clock * CLOCK_STEPS) / CLOCK_STEPS))


class EnergyMeter:
    """Cuts a run into windows of at least 2 s; only a run shorter than that has a shorter one."""

    def __init__(self, device: DeviceSpec) -> None:
        self._device = device
        self._windows: list[_Window] = []

    def add(self, step: int, duration_ns: int, joules: float, clock: float) -> None:
        """Add the time up to the end of a step, its energy and its mean clock."""
        if not self._windows or self._windows[-1].duration_ns >= WINDOW_NS:
            self._windows.append(_Window(step))
        self._windows[-1].add(step, duration_ns, joules, clock * duration_ns)

    def windows(self, last_step: int) -> list[EnergyWindow]:
        """Return all windows; the rest of the run is part of the last one."""
        closed = self._windows.copy()
        if len(closed) > 1 and closed[-1].duration_ns < WINDOW_NS:
            rest, last = closed.pop(), replace(closed.pop())
            last.add(last_step, rest.duration_ns, rest.joules, rest.clock_ns)
            closed.append(last)
        return [
            EnergyWindow(
                first_step=one.first_step,
                last_step=one.last_step,
                duration_ns=one.duration_ns,
                energy_uj=round(one.joules * 1e6),
                idle_w=self._device.idle_w,
                sm_clock_mhz=one.clock_ns / one.duration_ns * self._device.clock_mhz,
                temperature_c=None,
            )
            for one in closed
            if one.duration_ns
        ]


@dataclass(slots=True)
class _Window:
    """The steps of a window so far."""

    first_step: int
    last_step: int = 0
    duration_ns: int = 0
    joules: float = 0.0
    clock_ns: float = 0.0
    """Sum of clock times duration."""

    def add(self, last_step: int, duration_ns: int, joules: float, clock_ns: float) -> None:
        self.last_step = last_step
        self.duration_ns += duration_ns
        self.joules += joules
        self.clock_ns += clock_ns
