"""How busy SMs, tensor units and DRAM were over a stretch of time, by NVML's GPM counters: two samples, no daemon."""

import time
from contextlib import ExitStack
from typing import Any, Self

from .meter import EnergyMeter, MeterError

METRICS = {
    "SMs": "NVML_GPM_METRIC_SM_UTIL",
    "occupancy": "NVML_GPM_METRIC_SM_OCCUPANCY",
    "tensor units": "NVML_GPM_METRIC_ANY_TENSOR_UTIL",
    "DRAM": "NVML_GPM_METRIC_DRAM_BW_UTIL",
}
LEAST_NS = 100_000_000
"""Of a stretch of time that counters can tell of."""


class Utilisation:
    """Samples a device from `begin` on; what it does not tell is None, and `reason` says why where it tells nothing."""

    def __init__(self, meter: EnergyMeter) -> None:
        self._meter, self._owned, self._begun_ns = meter, ExitStack(), 0
        self.reason: str | None = None

    def __enter__(self) -> Self:
        try:
            self._owned.enter_context(self._meter)
            nvml = self._meter.nvml
            if not nvml.nvmlGpmQueryDeviceSupport(self._meter.handle).isSupportedDevice:
                self.reason = "utilisation counters need Hopper or newer"
                return self
            self._samples = [self._allocated(nvml) for _ in range(2)]
        except (MeterError, ImportError) as error:
            self.reason = str(error)
        except self._meter.nvml.NVMLError as error:
            self.reason = f"utilisation counters cannot be read: {error}"
        self.begin()
        return self

    def begin(self) -> None:
        """Begin the stretch of time anew; entering began it."""
        self._sample(0)
        self._begun_ns = time.perf_counter_ns()

    def _sample(self, which: int) -> None:
        if self.reason:
            return
        try:
            self._meter.nvml.nvmlGpmSampleGet(self._meter.handle, self._samples[which])
        except self._meter.nvml.NVMLError as error:
            self.reason = f"utilisation counters cannot be read: {error}"

    def _allocated(self, nvml: Any) -> Any:
        sample = nvml.nvmlGpmSampleAlloc()
        self._owned.callback(nvml.nvmlGpmSampleFree, sample)
        return sample

    def __exit__(self, *_: object) -> None:
        self._owned.close()

    def read(self) -> dict[str, float | None]:
        """Return the mean share of each since the stretch began."""
        nothing: dict[str, float | None] = dict.fromkeys(METRICS)
        took_ns = time.perf_counter_ns() - self._begun_ns
        self._sample(1)
        if not self.reason and took_ns < LEAST_NS:
            self.reason = f"steps of {took_ns / 1e6:.0f} ms in all; utilisation counters take {LEAST_NS / 1e6:.0f} ms"
        if self.reason:
            return nothing
        nvml = self._meter.nvml
        try:
            asked = nvml.c_nvmlGpmMetricsGet_t()
            asked.version, asked.numMetrics = nvml.NVML_GPM_METRICS_GET_VERSION, len(METRICS)
            asked.sample1, asked.sample2 = self._samples
            for metric, name in zip(asked.metrics, METRICS.values(), strict=False):
                metric.metricId = getattr(nvml, name)
            nvml.nvmlGpmMetricsGet(asked)
        except nvml.NVMLError as error:
            self.reason = f"utilisation counters cannot be read: {error}"
            return nothing
        return {
            name: metric.value / 100 if metric.nvmlReturn == 0 else None
            for name, metric in zip(METRICS, asked.metrics, strict=False)
        }
