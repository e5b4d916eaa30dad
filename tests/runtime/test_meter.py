"""The meter on a device of a fake clock: what it says is the device's power and steps, or one sentence."""

import dataclasses
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertslice.runtime.meter import EnergyMeter, MeterError

MS = 1_000_000
COUNTER = "nvmlDeviceGetTotalEnergyConsumption"
OPTIONAL = {
    "nvmlDeviceGetPowerUsage": {"power_w"},
    "nvmlDeviceGetEnforcedPowerLimit": {"limit_w"},
    "nvmlDeviceGetClockInfo": {"sm_clock_mhz"},
    "nvmlDeviceGetTemperature": {"temperature_c"},
}
READS = ["nvmlInit", "nvmlDeviceGetHandleByUUID", COUNTER, *OPTIONAL, "nvmlShutdown"]
READS += ["nvmlDeviceGetCurrentClocksEventReasons"]
powers = st.integers(50, 1000)


def open_meter(world, nvml, device="GPU-1"):
    return EnergyMeter(device, nvml=nvml, fence=world.fence, clock_ns=world.clock_ns, sleep=world.sleep)


def measured(world, nvml, step_ns=10 * MS, host_ns=5_000, **options):
    with open_meter(world, nvml) as meter:
        return meter.measure(lambda: world.enqueue(step_ns, host_ns), **options)


def sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert ". " not in text
    return text


@settings(max_examples=60, deadline=None)
@given(idle_w=powers, start_ms=st.integers(0, 1000), window_s=st.floats(2, 5))
def test_the_energy_of_a_constant_power_is_power_times_time(build, idle_w, start_ms, window_s):
    world, nvml = build(idle_w=idle_w, start_ns=start_ms * MS)
    with open_meter(world, nvml) as meter:
        idle = meter.idle(window_s=window_s)
    assert idle.duration_ns >= window_s * 1e9
    error = idle.duration_error_ns / idle.duration_ns
    assert error < 0.016
    assert idle.power_w == pytest.approx(idle_w, rel=error + 1e-4)


@settings(max_examples=60, deadline=None)
@given(
    idle_w=powers,
    load_w=powers,
    step_us=st.integers(50, 200_000),
    start_ms=st.integers(0, 1000),
    least_steps=st.integers(1, 50),
)
def test_a_busy_device_draws_its_load_and_completes_its_steps(build, idle_w, load_w, step_us, start_ms, least_steps):
    world, nvml = build(idle_w=idle_w, load_w=load_w, start_ns=start_ms * MS)
    found = measured(world, nvml, step_us * 1000, least_steps=least_steps, warm_up_s=1)
    error = found.duration_error_ns / found.duration_ns
    assert found.duration_ns >= 2e9
    assert found.times_starved == 0
    assert found.power_w == pytest.approx(load_w, rel=error + 1e-4)
    assert found.steps >= least_steps
    assert abs(found.steps - found.duration_ns / (step_us * 1000)) <= 1 + found.duration_error_ns / (step_us * 1000)
    assert found.energy_per_step_uj * found.steps == pytest.approx(found.energy_uj)
    assert found.idle_w == pytest.approx(idle_w, rel=0.016)
    assert len(world.busy) == 1, "the device paused"


def test_the_window_begins_and_ends_on_ticks_and_follows_idle_and_warm_up(build):
    world, nvml = build()
    found = measured(world, nvml, warm_up_s=2)
    begin_ns = world.busy[0][0]
    assert world.slept[0][1] == found.idle_settled_s == 1
    assert begin_ns > 3e9, "idle power comes before any step"
    assert found.energy_uj % 1000 == 0
    assert found.settled_s == 2
    assert found.regime == "sustained"
    assert world.now_ns - begin_ns >= found.duration_ns + 2e9
    assert round(found.duration_ns / 1e8) * 1e8 == pytest.approx(found.duration_ns, abs=found.duration_error_ns)


def test_idle_power_is_taken_as_given(build):
    world, nvml = build()
    with open_meter(world, nvml) as meter:
        idle = meter.idle(settle_s=4)
        slept = len(world.slept)
        found = meter.measure(lambda: world.enqueue(MS), idle=idle)
    assert (found.idle_w, found.idle_settled_s) == (idle.power_w, 4)
    assert len(world.slept) == slept


def test_a_device_that_waits_for_its_host_is_said_to(build):
    world, nvml = build(idle_w=100, load_w=500)
    found = measured(world, nvml, 1 * MS, host_ns=2 * MS)
    assert found.times_starved > 0
    assert found.duration_error_ns < 0.025 * found.duration_ns
    assert 100 < found.power_w < 310


def test_samples_give_clock_temperature_and_reasons(build):
    world, nvml = build()
    found = measured(world, nvml, window_s=3)
    clocks = nvml.calls.count("nvmlDeviceGetClockInfo")
    assert (found.sm_clock_mhz, found.least_sm_clock_mhz) == (1980, 1400)
    assert found.temperature_c == 29 + nvml.calls.count("nvmlDeviceGetTemperature")
    assert found.throttle_reasons == ("sw_power_cap",)
    assert clocks <= 4 * (2 + 3 + 3)


def test_a_snapshot_reads_once(build):
    world, nvml = build(load_w=600)
    with open_meter(world, nvml) as meter:
        snapshot = meter.snapshot()
    assert dataclasses.asdict(snapshot) == {
        "power_w": 600,
        "limit_w": 700,
        "sm_clock_mhz": 1400,
        "temperature_c": 30,
        "throttle_reasons": ("sw_power_cap",),
    }
    assert COUNTER not in nvml.calls


def test_no_throttle_reason_is_not_a_missing_one(build):
    world, nvml = build()
    nvml.reason_bits = 0
    assert measured(world, nvml).throttle_reasons == ()


@pytest.mark.parametrize("name", READS)
def test_each_read_that_fails_is_one_sentence(build, errors, name):
    world, nvml = build()
    nvml.fails = {name: errors["other"]}
    with pytest.raises(MeterError) as error:
        measured(world, nvml)
    assert name in sentence(error)
    assert nvml.calls.count("nvmlShutdown") == (name != "nvmlInit")


@pytest.mark.parametrize("fault", ["lacks", "forbids", "unknown"])
@pytest.mark.parametrize("name", OPTIONAL)
def test_what_a_device_lacks_is_none(build, errors, name, fault):
    world, nvml = build()
    nvml.fails = {name: errors[fault]}
    with open_meter(world, nvml) as meter:
        snapshot = dataclasses.asdict(meter.snapshot())
        found = meter.measure(lambda: world.enqueue(MS))
    assert {key for key, value in snapshot.items() if value is None} == OPTIONAL[name]
    missing = {key for key, value in dataclasses.asdict(found).items() if value is None}
    assert missing == {key for key in ("sm_clock_mhz", "least_sm_clock_mhz", "temperature_c") if found_in(key, name)}


def found_in(key, name):
    return next(iter(OPTIONAL[name])) in key


def test_older_drivers_are_asked_by_the_older_name(build, errors):
    world, nvml = build()
    nvml.fails = {"nvmlDeviceGetCurrentClocksEventReasons": errors["unknown"]}
    assert measured(world, nvml).throttle_reasons == ("hw_slowdown",)
    nvml.fails |= {"nvmlDeviceGetCurrentClocksThrottleReasons": errors["unknown"]}
    assert measured(world, nvml).throttle_reasons is None


@pytest.mark.parametrize("fault", ["lacks", "forbids"])
def test_a_device_without_the_counter_says_what_to_do(build, errors, fault):
    world, nvml = build()
    nvml.fails = {COUNTER: errors[fault]}
    with pytest.raises(MeterError) as error:
        measured(world, nvml)
    assert "whole GPU" in sentence(error)
    assert nvml.calls[-1] == "nvmlShutdown"


@settings(max_examples=20, deadline=None)
@given(at_ms=st.integers(500, 5000))
def test_a_counter_that_falls_is_refused(build, at_ms):
    world, nvml = build()
    nvml.counter_mj = lambda at_ns: world.energy_mj(at_ns) % world.energy_mj(at_ms * MS)
    with pytest.raises(MeterError) as error:
        measured(world, nvml)
    assert "fell" in sentence(error)


@settings(max_examples=20, deadline=None)
@given(at_ms=st.integers(0, 7000))
def test_a_counter_that_stands_is_refused(build, at_ms):
    world, nvml = build()
    nvml.counter_mj = lambda at_ns: world.energy_mj(min(at_ns, at_ms * MS))
    with pytest.raises(MeterError) as error:
        measured(world, nvml)
    assert "stood" in sentence(error)
    assert world.now_ns < at_ms * MS + 6e9


def test_steps_that_take_minutes_are_refused(build):
    world, nvml = build()
    with pytest.raises(MeterError) as error:
        measured(world, nvml, 5_000 * MS)
    assert "least_steps" in sentence(error)


@pytest.mark.parametrize("options", [{"warm_up_s": 0.5}, {"window_s": 1.9}, {"window_s": 61}])
def test_too_short_a_measurement_is_refused(build, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        measured(*build(), **options)


def test_a_device_is_found_by_uuid_or_bus_id_and_an_index_is_that_of_torch(build, monkeypatch):
    _, nvml = build()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: types.SimpleNamespace(uuid=f"of-{i}"))
    handles = []
    for device in ("GPU-7", "00000000:01:00.0", 3):
        with EnergyMeter(device, nvml=nvml) as meter:
            handles.append(meter._handle)
    assert handles == [("uuid", "GPU-7"), ("pci", "00000000:01:00.0"), ("uuid", "GPU-of-3")]


def test_a_step_that_fails_closes_nvml(build):
    world, nvml = build()

    def step():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), open_meter(world, nvml) as meter:
        meter.measure(step)
    assert nvml.calls[-1] == "nvmlShutdown"
