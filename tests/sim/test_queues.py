"""The stream that the backend runs on, against queueing theory."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import simpy

from expertslice.sim.queues import Stream

NUM_JOBS = 60_000
SERVICE_NS = 1000.0


def draws(mean_ns: float, seed: int) -> Iterator[int]:
    for value in np.random.default_rng(seed).exponential(mean_ns, NUM_JOBS):
        yield round(float(value))


def stream_waits(load: float, services: Iterator[int], lanes: int = 1) -> tuple[list[int], float]:
    """Return the wait of every job, and the mean number waiting over time."""
    env = simpy.Environment()
    stream = Stream(env, lanes)
    waits: list[int] = []
    area, last = 0.0, 0

    def count(change: int, waiting: list[int] = [0]) -> None:  # noqa: B006
        nonlocal area, last
        area += waiting[0] * (env.now - last)
        last = env.now
        waiting[0] += change

    def job(arrived: int, service: int):
        waits.append(env.now - arrived)
        count(-1)
        yield env.timeout(service)

    def arrivals():
        for gap, service in zip(draws(SERVICE_NS / load / lanes, 1), services, strict=True):
            yield env.timeout(gap)
            count(1)
            stream.submit(job(env.now, service))

    env.process(arrivals())
    env.run()
    return waits, area / env.now


def test_mm1_mean_wait():
    waits, _ = stream_waits(0.6, draws(SERVICE_NS, 2))
    assert np.mean(waits) == pytest.approx(0.6 / 0.4 * SERVICE_NS, rel=0.05)


def test_md1_mean_wait_is_half_of_mm1():
    waits, _ = stream_waits(0.6, iter([round(SERVICE_NS)] * NUM_JOBS))
    assert np.mean(waits) == pytest.approx(0.6 / 0.4 / 2 * SERVICE_NS, rel=0.05)


def test_littles_law():
    waits, mean_waiting = stream_waits(0.7, draws(SERVICE_NS, 2))
    assert mean_waiting == pytest.approx(np.mean(waits) * 0.7 / SERVICE_NS, rel=0.02)


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_mmc_mean_wait(lanes: int):
    load = 0.8
    offered = load * lanes
    tail = offered**lanes / math.factorial(lanes) / (1 - load)
    waits_at_all = tail / (sum(offered**n / math.factorial(n) for n in range(lanes)) + tail)
    expected = waits_at_all * SERVICE_NS / lanes / (1 - load)
    waits, _ = stream_waits(load, draws(SERVICE_NS, 2), lanes)
    assert np.mean(waits) == pytest.approx(expected, rel=0.08)


def test_a_stream_keeps_the_order_of_submission():
    env = simpy.Environment()
    stream = Stream(env)
    ended: list[tuple[str, int]] = []

    def job(name: str, duration: int):
        yield env.timeout(duration)
        ended.append((name, env.now))

    make: Callable[[str, int], simpy.Event] = lambda name, duration: stream.submit(job(name, duration))  # noqa: E731
    make("a", 30)
    done = make("b", 1)
    env.run(until=done)
    assert ended == [("a", 30), ("b", 31)]
    assert stream.waiting == 0
