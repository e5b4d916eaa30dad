"""The profiler against numbers that are worked out by hand, and NVML's utilisation counters against a stand-in."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertslice.experiments.watch import Watch
from expertslice.policies.contract import ByTokens, Plan, Setup, SliceLayout, StepRecord
from expertslice.policies.data import load_device, load_variants
from expertslice.policies.layouts import fallback_plan, uniform_slice
from expertslice.runtime import utilisation
from expertslice.runtime.meter import EnergyMeter
from expertslice.runtime.profiler import Profiler, table
from expertslice.runtime.utilisation import METRICS, Utilisation
from expertslice.traces.schema import MoeSpec, RoutedStep

DEVICE = load_device("h100-sxm5-80gb")
MODEL = MoeSpec(name="t", num_layers=1, num_experts=3, top_k=1, d_model=1024, d_ff=(1024,))
SETUP = Setup(device=DEVICE, model=MODEL, variants=load_variants(90))
TILE = SETUP.variants[0].name
TWO = SliceLayout(slices=(uniform_slice("green_context", 32, TILE), uniform_slice("green_context", 96, TILE)))
PLAN = Plan(layout=TWO, placement=ByTokens(bounds=(8,), slice_ids=(0, 1)))


def record(step, plan, start_ns, end_ns, busy_ns):
    return StepRecord(
        step=step, plan_id=plan.plan_id, bucket=1, submit_ns=0, start_ns=start_ns, end_ns=end_ns,
        start_ns_LS=np.zeros((1, len(busy_ns)), np.int64), busy_ns_LS=np.array([busy_ns]), reconfigure_ns=0,
        capture_ns=0, control_stall_ns=0, hbm_bytes=0, flops=0, fallback=None,
    )  # fmt: skip


def profiled(*counts):
    profiler = Profiler(SETUP)
    profiler.decided(PLAN)
    for step, counts_E in enumerate(counts):
        profiler.submitted(
            RoutedStep(step=step, phase="mixed", counts_LE=np.array([counts_E], np.int32), num_tokens=sum(counts_E))
        )
        plan, busy_ns = (PLAN, [500, 250]) if step else (fallback_plan(SETUP), [900])
        profiler.finished(record(step, plan, 2000 * step, 2000 * step + 1000, busy_ns))
    return profiler


def test_rates_classes_and_sm_time_are_those_of_the_run():
    found = profiled([0, 10, 2000], [0, 20, 0]).profile()
    assert found["span_ns"] == 3000
    assert found["tokens_per_s_LE"].tolist() == [[0, 1e7, pytest.approx(2000 / 3000 * 1e9)]]
    assert found["class_LE"] == [["idle", "cold", "hot"]]
    one, two = found["layouts"]
    assert [s["busy_share"] for s in one["slices"] + two["slices"]] == [0.9, 0.5, 0.25]
    assert [s["sm_ns"] for s in two["slices"]] == [500 * 32, 250 * 96]
    assert 0 < found["recommended"]["cold_sms"] < 132
    text = "\n".join(table(found | {"utilisation": {"SMs": 0.5, "DRAM": None}}))
    assert "1 idle, 1 cold, 1 hot" in text
    assert "utilisation: SMs 50%" in text
    assert "DRAM" not in text


def test_without_both_kinds_one_slice_is_recommended():
    assert profiled([1, 1, 1]).profile()["recommended"] == {"slices": 1, "why": "all experts are cold"}
    empty = Profiler(SETUP).profile()
    assert empty["recommended"]["why"] == "all experts are idle"
    assert "not known, no GPU" in table(empty | {"utilisation": {}, "utilisation_reason": "no GPU"})[-1]


@given(st.integers(1, 200), st.integers(300, 100_000))
def test_more_hot_work_never_asks_for_more_sms_for_the_cold(cold, hot):
    def sms(hot):
        return profiled([cold, 0, hot]).profile()["recommended"]["cold_sms"]

    assert sms(2 * hot) <= sms(hot)
    assert sms(hot) % DEVICE.sm_partition_step == 0


class Gpm:
    """The counters of NVML: each sample is a number, a metric their difference times its id."""

    class NVMLError(Exception):
        pass

    NVMLError_NotSupported = NVMLError_NoPermission = NVMLError_FunctionNotFound = NVMLError
    NVML_GPM_METRICS_GET_VERSION = 1
    NVML_GPM_METRIC_SM_UTIL, NVML_GPM_METRIC_SM_OCCUPANCY = 2, 3
    NVML_GPM_METRIC_ANY_TENSOR_UTIL, NVML_GPM_METRIC_DRAM_BW_UTIL = 5, 10

    def __init__(self, *, supported=True, fails=None):
        self.supported, self.fails, self.held, self.clock, self.shut = supported, fails, [], 0, 0

    def nvmlInit(self):
        pass

    def nvmlShutdown(self):
        self.shut += 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return uuid

    def nvmlGpmQueryDeviceSupport(self, handle):
        return SimpleNamespace(isSupportedDevice=self.supported)

    def nvmlGpmSampleAlloc(self):
        self.held.append(sample := SimpleNamespace(at=None))
        return sample

    def nvmlGpmSampleFree(self, sample):
        self.held.remove(sample)

    def nvmlGpmSampleGet(self, handle, sample):
        if self.fails == self.clock:
            raise self.NVMLError("insufficient permissions")
        self.clock += 1
        sample.at = self.clock

    def c_nvmlGpmMetricsGet_t(self):
        return SimpleNamespace(metrics=[SimpleNamespace() for _ in range(8)])

    def nvmlGpmMetricsGet(self, asked):
        assert (asked.version, asked.numMetrics) == (1, len(METRICS))
        for metric in asked.metrics[: asked.numMetrics]:
            metric.value = (asked.sample2.at - asked.sample1.at) * metric.metricId
            metric.nvmlReturn = 3 if metric.metricId == 10 else 0


def test_utilisation_is_what_lies_between_two_samples(monkeypatch):
    monkeypatch.setattr(utilisation, "LEAST_NS", 0)
    nvml = Gpm()
    with Utilisation(EnergyMeter("GPU-1", nvml=nvml)) as used:
        found = used.read()
        used.begin()
        assert used.read() == found
    assert found == {"SMs": 0.02, "occupancy": 0.03, "tensor units": 0.05, "DRAM": None}
    assert (nvml.held, nvml.shut) == ([], 1)


@pytest.mark.parametrize(
    ("options", "why"),
    [({"supported": False}, "need Hopper"), ({"fails": 0}, "insufficient"), ({"fails": 1}, "insufficient")],
)
def test_counters_that_cannot_be_read_are_none_with_a_reason(options, why, monkeypatch):
    monkeypatch.setattr(utilisation, "LEAST_NS", 0)
    nvml = Gpm(**options)
    with Utilisation(EnergyMeter("GPU-1", nvml=nvml)) as used:
        assert set(used.read().values()) == {None}
    assert why in used.reason
    assert (nvml.held, nvml.shut) == ([], 1)


def test_a_stretch_too_short_for_counters_is_said_to_be():
    with Utilisation(EnergyMeter("GPU-1", nvml=Gpm())) as used:
        assert set(used.read().values()) == {None}
    assert "counters take 100 ms" in used.reason


def test_counters_tell_of_the_steps_alone():
    """From the first step's submission to the last one's record, without opening and closing."""
    clock = iter(range(100))
    seen = []

    class Counters:
        reason = None

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def begin(self):
            seen.append(("begin", next(clock)))

        def read(self):
            seen.append(("read", next(clock)))
            return {"SMs": 0.5}

    watch, plan = Watch(SETUP, counters=False), fallback_plan(SETUP)
    watch._counters = Counters()
    counts_LE = np.full((MODEL.num_layers, MODEL.num_experts), 2, dtype=np.int32)
    given = [RoutedStep(step=i, phase="decode", counts_LE=counts_LE, num_tokens=8) for i in range(3)]
    next(clock)
    with watch:
        watch.decided(None, plan)
        for _ in watch.steps(iter(given)):
            next(clock)
        for step in range(len(given)):
            watch.finished(record(step, plan, 10 * step, 10 * step + 5, [1]))
        next(clock)
    assert seen == [("begin", 1), ("read", 5)]
    assert watch.lines()[-1] == "utilisation: SMs 50%"


def test_experts_of_fp32_turn_hot_later():
    wide = replace(SETUP, model=replace(MODEL, dtype="fp32"))
    assert Profiler(wide).ridge_tokens == 2 * Profiler(SETUP).ridge_tokens
