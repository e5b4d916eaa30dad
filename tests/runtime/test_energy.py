"""Energy of a run: windows of two seconds or more cover steps once, and what cannot be read is None."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertslice.runtime.energy import EnergyLog, Tick, Windows
from expertslice.runtime.meter import MeterError, Snapshot

S = 1_000_000_000


def tick(at_ns, energy_uj):
    return Tick(at_ns=at_ns, energy_uj=energy_uj, sm_clock_mhz=1700, temperature_c=40)


@given(
    gaps=st.lists(st.integers(2 * S, 3 * S), max_size=6),
    rest=st.integers(S // 10, 2 * S - 1),
    steps=st.lists(st.integers(1, S), max_size=60),
)
def test_windows_follow_one_another_and_hold_each_step_that_ends_between_their_ticks(gaps, rest, steps):
    at, ticks = 0, [tick(0, 0)]
    for gap in [*gaps, rest]:
        at += gap
        ticks.append(tick(at, at // 1000 * 300))
    ends, now = [], 0
    for duration in steps:
        now += duration
        ends.append(now)
    windows = Windows()
    events = [(t.at_ns, 0, t) for t in ticks] + [(end, 1, step) for step, end in enumerate(ends)]
    for _, kind, what in sorted(events, key=lambda e: e[:2]):
        if kind:
            windows.ended(what, ends[what])
        else:
            windows.tick(what)
    found = windows.all(100.0)
    inside = [step for step, end in enumerate(ends) if 0 < end <= at]
    held = [step for one in found for step in range(one.first_step, one.last_step + 1)]
    assert held == inside
    for one in found:
        assert one.energy_uj == one.duration_ns // 1000 * 300
    assert all(one.duration_ns >= 2 * S for one in found[:-1])


class Meter:
    """A counter on the host's clock, which may fail after some looks."""

    def __init__(self, fails_after=99):
        self.left = fails_after

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.left = -1

    def idle(self):
        return type("Idle", (), {"power_w": 90.0})

    def tick(self, pause):
        pause()
        self.left -= 1
        if self.left < 0:
            raise MeterError("the counter is gone")
        return time.perf_counter_ns() // 1_000_000, time.perf_counter_ns()

    def snapshot(self):
        return Snapshot(power_w=None, limit_w=None, sm_clock_mhz=None, temperature_c=None, throttle_reasons=None)


def run(meter, seconds=0.05):
    log, zero = EnergyLog(meter), time.perf_counter_ns()
    log.measure_idle()
    log.start(zero)
    end = time.monotonic() + seconds
    for step in range(1000):
        time.sleep(0.005)
        log.ended(step, time.perf_counter_ns() - zero)
        if time.monotonic() > end:
            break
    return log.close(), step


def test_a_short_run_has_one_short_window():
    (window,), last = run(Meter())
    assert window.last_step == last
    assert 0 < window.duration_ns < 2e9
    assert abs(window.energy_uj - window.duration_ns // 1000) < 3000
    assert window.idle_w == 90.0
    assert window.sm_clock_mhz != window.sm_clock_mhz


def test_a_counter_that_fails_is_said_once_and_energy_is_none():
    with pytest.warns(UserWarning, match="energy is not measured: the counter is gone") as caught:
        (window,), last = run(Meter(fails_after=0))
    assert len(caught) == 1
    assert (window.first_step, window.last_step, window.energy_uj) == (0, last, None)
