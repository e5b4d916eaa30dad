"""Energy of steps by NVML's cumulative counter, with clocks and temperature beside it. It reads, and sets nothing.

The counter of an H100 moves every 100 ms and a query takes 3 to 15 ms. So a window begins and ends where the counter is
seen to move, lasts 2 s or more and follows a warm-up; steps are enqueued ahead, so that the device works meanwhile.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Self

from .timer import Regime

Step = Callable[[], object]
LEAST_WINDOW_S, MOST_WINDOW_S, LEAST_WARM_UP_S = 2.0, 60.0, 1.0
STILL_NS = 1_000_000_000
"""A counter that stands for ten of its periods is broken."""
AHEAD_NS, MOST_AHEAD = 50_000_000, 1024
"""In flight: more than the slowest query takes, no more launches than the driver queues."""
FILL_NS = 10_000_000
"""Longest enqueuing between two polls: a host that is slower than the device must see the tick in time."""
SAMPLE_NS = 250_000_000
COUNTER = "nvmlDeviceGetTotalEnergyConsumption"
NAMES = "give torch's index, or a UUID or PCI bus id that nvidia-smi lists"
ADVICE = {
    "nvmlInit": "install NVIDIA's driver where this process sees it",
    "nvmlDeviceGetHandleByUUID": NAMES,
    "nvmlDeviceGetHandleByPciBusId": NAMES,
    COUNTER: "take a whole GPU, Volta or newer, no MIG instance, that this user may read",
}
"""What to do where something fails that energy cannot do without; anything else a device may lack."""
LACKING = "NotSupported", "NoPermission", "FunctionNotFound"
REASONS = (
    *("gpu_idle", "clocks_setting", "sw_power_cap", "hw_slowdown", "sync_boost"),
    *("sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "display_clock_setting"),
)
"""Bits of nvmlClocksEventReason* from the lowest (nvml.h)."""


class MeterError(RuntimeError):
    """The device cannot be read; whoever can go on without takes its energy as None."""


def cuda_fence() -> Any:
    """Record an event on torch's current stream: a fence has `query` and `synchronize`."""
    import torch

    event = torch.cuda.Event(blocking=True)
    event.record()
    return event


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A device at one moment; None: it does not say."""

    power_w: float | None
    limit_w: float | None
    sm_clock_mhz: int | None
    temperature_c: int | None
    throttle_reasons: tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Energy between two ticks, after settled_s of the same state; off by duration_error_ns, two polls, at most."""

    settled_s: float
    energy_uj: int
    duration_ns: int
    duration_error_ns: int

    @property
    def power_w(self) -> float:
        return self.energy_uj / self.duration_ns * 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy(Window):
    """Steps without pause, idle power included; None: the device does not say.

    `steps` completed inside, to within one. `times_starved` counts looks that found none in flight: the device waited
    for the host. Samples give the median and least clock, the highest temperature and every throttle reason.
    """

    steps: int
    times_starved: int
    idle_w: float
    idle_settled_s: float
    sm_clock_mhz: float | None
    least_sm_clock_mhz: int | None
    temperature_c: int | None
    throttle_reasons: tuple[str, ...] | None
    regime: Regime

    @property
    def energy_per_step_uj(self) -> float:
        """Return the energy of a step, to one part in `steps`."""
        return self.energy_uj / self.steps

    @property
    def step_ns(self) -> float:
        """Return the sustained time of a step, to one part in `steps`."""
        return self.duration_ns / self.steps


@dataclass(slots=True)
class _Ahead:
    """Steps in flight, a fence behind each."""

    step: Step
    fence: Callable[[], Any]
    clock_ns: Callable[[], int]
    fences: deque[Any] = field(default_factory=deque)
    depth: int = 2
    finished: int = 0
    times_starved: int = 0

    def keep(self) -> int:
        """Return how many steps have finished, and fill up without waiting for the device."""
        while self.fences and self.fences[0].query():
            self.fences.popleft()
            self.finished += 1
        finished, begin_ns = self.finished, self.clock_ns()
        self.times_starved += not self.fences
        while len(self.fences) < self.depth and self.clock_ns() - begin_ns < FILL_NS:
            self.step()
            self.fences.append(self.fence())
        return finished

    def pause(self) -> None:
        """Fill up, wait until half has finished, and keep more in flight if that took too little."""
        begin_ns = self.clock_ns()
        self.keep()
        self.fences[(len(self.fences) - 1) // 2].synchronize()
        if self.clock_ns() - begin_ns < AHEAD_NS // 2:
            self.depth = min(2 * self.depth, MOST_AHEAD)


@dataclass(slots=True)
class EnergyMeter:
    """The counter of a device (torch's index, a UUID or a PCI bus id), read inside a `with` statement.

    `nvml`, `fence`, `clock_ns` and `sleep` stand for pynvml, CUDA's events and the host's clock. What cannot be read is
    a MeterError of one sentence; what a device lacks, and energy can do without, is None.
    """

    device: int | str = 0
    _: KW_ONLY
    nvml: Any = None
    fence: Callable[[], Any] = cuda_fence
    clock_ns: Callable[[], int] = time.monotonic_ns
    sleep: Callable[[float], object] = time.sleep
    _handle: Any = field(default=None, init=False)
    _moved: tuple[int, int] = field(default=(-1, 0), init=False)
    """The counter when last seen to move, mJ, and when that was, ns."""

    def __enter__(self) -> Self:
        name = self.device
        if self.nvml is None:
            import pynvml

            self.nvml = pynvml
        if isinstance(name, int):
            import torch

            # NVML's own numbers disregard CUDA_VISIBLE_DEVICES and CUDA's order.
            name = f"GPU-{torch.cuda.get_device_properties(name).uuid}"
        self._ask("nvmlInit")
        try:
            self._handle = self._ask(f"nvmlDeviceGetHandleBy{'PciBusId' if ':' in name else 'UUID'}", name)
        except MeterError:
            self.nvml.nvmlShutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ask("nvmlShutdown")

    @property
    def handle(self) -> Any:
        return self._handle

    def snapshot(self) -> Snapshot:
        """Return clock, temperature, power and reasons now; the power of an H100 is the mean of its last second."""
        power_mw = self._ask("nvmlDeviceGetPowerUsage", self._handle)
        limit_mw = self._ask("nvmlDeviceGetEnforcedPowerLimit", self._handle)
        # Drivers before 535 know the reasons by their older name.
        names = (f"nvmlDeviceGetCurrentClocks{kind}Reasons" for kind in ("Event", "Throttle"))
        bits = next((bits for name in names if (bits := self._ask(name, self._handle)) is not None), None)
        return Snapshot(
            power_w=None if power_mw is None else power_mw / 1000,
            limit_w=None if limit_mw is None else limit_mw / 1000,
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", self._handle, self.nvml.NVML_CLOCK_SM),
            temperature_c=self._ask("nvmlDeviceGetTemperature", self._handle, self.nvml.NVML_TEMPERATURE_GPU),
            throttle_reasons=None if bits is None else tuple(n for i, n in enumerate(REASONS) if bits >> i & 1),
        )

    def idle(self, *, settle_s: float = 1.0, window_s: float = 2.0) -> Window:
        """Wait for the current stream, then `settle_s`, and return what is drawn with nothing to do, heat included."""
        self.fence().synchronize()
        self.sleep(settle_s)
        found, _, _ = self._window(lambda: 0, lambda: self.sleep(0.05), window_s, 0)
        return Window(**found, settled_s=settle_s)

    def measure(
        self,
        step: Step,
        *,
        idle: Window | None = None,
        warm_up_s: float = 3,
        window_s: float = 2,
        least_steps: int = 100,
    ) -> Energy:
        """Return the energy of `step`, which enqueues work on the current stream, over both window_s and least_steps.

        Idle power is measured first unless given. Steps of 50 us or more keep the device busy through queries. A loaded
        H100 shows ticks within 0.03 s: 1.4 % of 2 s, 0.6 % of 5 s; products repeated within 0.7 %.

        Raises:
            MeterError: the counter cannot be read, falls or stands still, or the steps take a minute.
        """
        if warm_up_s < LEAST_WARM_UP_S:
            raise ValueError(f"warm_up_s is {warm_up_s}; give {LEAST_WARM_UP_S} or more, until clock and power settle")
        idle = idle or self.idle()
        ahead = _Ahead(step, self.fence, self.clock_ns)
        warm_ns = self.clock_ns() + round(warm_up_s * 1e9)
        while self.clock_ns() < warm_ns:
            ahead.pause()
        ahead.times_starved = 0
        found, steps, samples = self._window(ahead.keep, ahead.pause, window_s, least_steps)
        ahead.fences[-1].synchronize()
        clocks = [s.sm_clock_mhz for s in samples if s.sm_clock_mhz is not None]
        reasons = [s.throttle_reasons for s in samples if s.throttle_reasons is not None]
        return Energy(
            **found,
            regime="sustained",
            settled_s=warm_up_s,
            steps=steps,
            times_starved=ahead.times_starved,
            idle_w=idle.power_w,
            idle_settled_s=idle.settled_s,
            sm_clock_mhz=statistics.median(clocks) if clocks else None,
            least_sm_clock_mhz=min(clocks, default=None),
            temperature_c=max((s.temperature_c for s in samples if s.temperature_c is not None), default=None),
            throttle_reasons=tuple(sorted(set().union(*reasons))) if reasons else None,
        )

    def _window(
        self, keep: Callable[[], int], pause: Step, window_s: float, least_steps: int
    ) -> tuple[dict[str, int], int, list[Snapshot]]:
        if not LEAST_WINDOW_S <= window_s <= MOST_WINDOW_S:
            raise ValueError(f"window_s is {window_s}; a tick of 0.1 s asks for {LEAST_WINDOW_S} to {MOST_WINDOW_S}")
        samples: list[Snapshot] = []
        begin_mj, begin_ns, begin_error_ns, begin_steps = self._tick(keep)
        while (passed_ns := self.clock_ns() - begin_ns) < window_s * 1e9 or keep() - begin_steps < least_steps:
            if passed_ns > MOST_WINDOW_S * 1e9:
                raise MeterError(f"fewer than {least_steps} steps ended in {MOST_WINDOW_S} s; lower least_steps")
            # On this thread, since another would hold the interpreter just when steps must be enqueued; and four times
            # a second, since every query of the counter keeps host and device's own processor for milliseconds.
            if passed_ns > SAMPLE_NS * (len(samples) + 1):
                self._energy_mj()
                samples.append(self.snapshot())
            pause()
        end_mj, end_ns, end_error_ns, end_steps = self._tick(keep)
        energy_uj, error_ns = (end_mj - begin_mj) * 1000, max(begin_error_ns, end_error_ns)
        found = {"energy_uj": energy_uj, "duration_ns": end_ns - begin_ns, "duration_error_ns": error_ns}
        return found, end_steps - begin_steps, samples

    def tick(self, pause: Callable[[], object]) -> tuple[int, int]:
        """Poll until the counter moves, pausing between looks; return what it then says, mJ, and when, ns."""
        energy_mj, at_ns, _, _ = self._tick(lambda: pause() is None)
        return energy_mj, at_ns

    def _tick(self, keep: Callable[[], int]) -> tuple[int, int, int, int]:
        """Poll until the counter moves; return it, when, by how much that may be late, and the steps finished."""
        asked_ns, still_mj = self.clock_ns(), self._energy_mj()
        while True:
            keep()
            before_ns, asked_ns = asked_ns, self.clock_ns()
            energy_mj = self._energy_mj()
            seen_ns = self.clock_ns()
            if energy_mj != still_mj:
                return energy_mj, seen_ns, seen_ns - before_ns, keep()

    def _energy_mj(self) -> int:
        energy_mj, now_ns = self._ask(COUNTER, self._handle), self.clock_ns()
        moved_mj, moved_ns = self._moved
        if energy_mj < moved_mj:
            raise MeterError(f"the energy counter fell from {moved_mj} to {energy_mj} mJ, a reset; measure again")
        if energy_mj > moved_mj:
            self._moved = energy_mj, now_ns
        elif now_ns - moved_ns > STILL_NS:
            raise MeterError(f"the energy counter stood at {energy_mj} mJ for over 1 s; measure on another device")
        return energy_mj

    def _ask(self, name: str, *args: Any) -> Any:
        lacking = tuple(getattr(self.nvml, f"NVMLError_{why}") for why in LACKING)
        try:
            return getattr(self.nvml, name)(*args)
        except self.nvml.NVMLError as error:
            if name not in ADVICE and isinstance(error, lacking):
                return None
            advice = ADVICE.get(name, "see whether nvidia-smi still reads it")
            raise MeterError(f"{name} failed on device {self.device}: {error}; {advice}") from error
