"""What is read of a GPU beside a paired run: whether others use it, and clocks, temperature, throttling of a block."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from ..runtime.meter import EnergyMeter, MeterError

BUSY_PERCENT, LOOKS, PAUSE_S = 5, 10, 0.1
HARMLESS = frozenset({"gpu_idle", "clocks_setting", "display_clock_setting"})
Sensor = Callable[[], dict[str, Any]]


def busy_percent(meter: EnergyMeter, sleep: Callable[[float], object] = time.sleep) -> int:
    """Return the highest share of a second in which kernels of anybody ran, while we run none."""
    most = 0
    for _ in range(LOOKS):
        most = max(most, meter.nvml.nvmlDeviceGetUtilizationRates(meter.handle).gpu)
        sleep(PAUSE_S)
    return most


@contextmanager
def sensor(*, busy_ok: bool) -> Iterator[Sensor]:
    """Yield what reads the GPU now.

    Raises:
        ValueError: others use the GPU and nobody said that this is right, or it cannot be read.
    """
    try:
        with EnergyMeter(0) as meter:
            busy = busy_percent(meter)
            if busy > BUSY_PERCENT and not busy_ok:
                raise ValueError(
                    f"the GPU is {busy} % busy with other work; wait for it to end, or add --busy-gpu and have it "
                    "written into the result"
                )
            yield lambda: {**asdict(meter.snapshot()), "busy_before_percent": busy}
    except MeterError as error:
        raise ValueError(str(error)) from error


def slowed(reading: dict[str, Any]) -> set[str]:
    """Return why the driver held clocks down in a reading."""
    return set(reading.get("throttle_reasons") or ()) - HARMLESS
