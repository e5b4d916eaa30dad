"""Device time of captured steps: cold weights, two regimes, quantiles, paired ratios. Torch only inside functions.

burst: at most 20 ms busy, then at least 100 ms idle: the clock that a short request meets. sustained: no idle, after
seconds of load: the power cap is reached and the clock gives way. Interleaved arms share that clock;
`EnergyMeter.measure` gives the sustained time of one arm alone.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Regime = Literal["burst", "sustained"]
Sleep = Callable[[float], object]
BURST_BUSY_NS = 20_000_000
BURST_PLANNED_NS = 18_000_000
"""A burst is filled to this by the slowest replays seen: times spread."""
BURST_IDLE_NS = 100_000_000
LEAST_GRAPH_NS = 400_000
"""A graph shorter than this is repeated inside itself: events resolve about half a microsecond."""
MOST_AHEAD = 8
"""Replays in flight when sustained, so that the device never waits for the host."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Captured:
    """A graph over so many layers, with the step whose buffers its kernels use."""

    graph: Any
    step: Callable[[int], Any]
    layers: int

    def enqueue(self) -> Callable[[], float]:
        """Enqueue a replay; the call returned waits for it and returns its device time per layer, ns."""
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()

        def wait_ns() -> float:
            end.synchronize()
            return start.elapsed_time(end) * 1e6 / self.layers

        return wait_ns

    def time_ns(self) -> float:
        """Return the device time of one replay per layer; on an idle device 3 to 13 us a replay are launch (H100)."""
        return self.enqueue()()


def capture(step: Callable[[int], Any], num_sets: int) -> Captured:
    """Capture a graph of `step` over all weight sets in rotation, repeated until it is long enough to time."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for p in range(num_sets):
            step(p)
    torch.cuda.current_stream().wait_stream(stream)
    once = _captured(step, num_sets, 1)
    repeats = math.ceil(LEAST_GRAPH_NS / (min(once.time_ns() for _ in range(3)) * num_sets))
    return _captured(step, num_sets, repeats) if repeats > 1 else once


def _captured(step: Callable[[int], Any], num_sets: int, repeats: int) -> Captured:
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_sets * repeats):
            step(i % num_sets)
    return Captured(graph=graph, step=step, layers=num_sets * repeats)


def sets_to_stay_cold(
    touched_bytes: int, set_bytes: int, *, l2_bytes: int, memory_bytes: int, factor: int = 4, memory_share: float = 0.6
) -> int:
    """Return how many weight sets exceed L2 `factor` times, where a step reads so many bytes of one set.

    It is one more where memory allows: then the other sets alone exceed it, whatever the order of reads within a step.
    ValueError: that share of memory holds too few.
    """
    least, held = -(-factor * l2_bytes // touched_bytes), int(memory_bytes * memory_share) // set_bytes
    if held < least:
        allowed = f"{memory_share:.0%} of memory holds {held} of {set_bytes} bytes"
        raise ValueError(f"it takes {least} weight sets to exceed L2 {factor} times and {allowed}; lower factor")
    return min(least + 1, held)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """Samples of each arm, ns per layer, two a round in the order A B .. B A; load_s is None in bursts."""

    regime: Regime
    load_s: float | None
    samples_ns: tuple[tuple[float, ...], ...]


def interleave(
    arms: Sequence[Captured], rounds: int, regime: Regime, *, load_s: float = 3.0, sleep: Sleep = time.sleep
) -> Timed:
    """Time arms in the order A B .. B A: in bursts, or without idle after `load_s` busy seconds of them in turn."""
    if regime not in ("burst", "sustained"):
        raise ValueError(f"regime {regime!r} is neither 'burst' nor 'sustained'; name one")
    order = [*range(len(arms)), *reversed(range(len(arms)))]
    busy_ns = 0.0
    for i, sample_ns in _steady(arms, itertools.cycle(order)) if regime == "sustained" else ():
        busy_ns += sample_ns * arms[i].layers
        if busy_ns >= load_s * 1e9:
            break
    samples: list[list[float]] = [[] for _ in arms]
    visits = order * rounds
    for i, sample_ns in _bursts(arms, visits, sleep) if regime == "burst" else _steady(arms, visits):
        samples[i].append(sample_ns)
    load = load_s if regime == "sustained" else None
    return Timed(regime=regime, load_s=load, samples_ns=tuple(map(tuple, samples)))


def _steady(arms: Sequence[Captured], visits: Iterable[int]) -> Iterator[tuple[int, float]]:
    ahead: deque[tuple[int, Callable[[], float]]] = deque()
    for i in visits:
        ahead.append((i, arms[i].enqueue()))
        if len(ahead) > MOST_AHEAD:
            oldest, wait_ns = ahead.popleft()
            yield oldest, wait_ns()
    yield from ((i, wait_ns()) for i, wait_ns in ahead)


def burst_size(expected_ns: Sequence[float]) -> int:
    """Return how many of these replays, in this order, fill one burst; ValueError where the first is too long."""
    size = int(np.searchsorted(np.cumsum(expected_ns), BURST_PLANNED_NS, side="right"))
    if size < 1:
        raise ValueError(f"a replay takes {expected_ns[0] / 1e6:.1f} ms and a burst 18 ms at most; capture fewer steps")
    return size


def _bursts(arms: Sequence[Captured], visits: Sequence[int], sleep: Sleep) -> Iterator[tuple[int, float]]:
    slowest_ns = [max(arm.enqueue()() for _ in range(3)) * arm.layers for arm in arms]
    done = 0
    while done < len(visits):
        # The first replay after idle takes 45 us more than the next (H100), so one that is not counted leads, unless a
        # replay fills more than half a burst: then those are half a per cent of it.
        lead = [visits[done - 1]] if slowest_ns[visits[done - 1]] + slowest_ns[visits[done]] <= BURST_PLANNED_NS else []
        led = [*lead, *visits[done:]]
        burst = led[: burst_size([slowest_ns[i] for i in led])]
        sleep(BURST_IDLE_NS / 1e9)
        samples_ns = [wait_ns() for wait_ns in [arms[i].enqueue() for i in burst]]
        took_ns = [sample_ns * arms[i].layers for i, sample_ns in zip(burst, samples_ns, strict=True)]
        for i, replay_ns in zip(burst, took_ns, strict=True):
            slowest_ns[i] = max(slowest_ns[i], replay_ns)
        # What ran over was no burst: it is timed again, planned by what it took.
        if sum(took_ns) <= BURST_BUSY_NS:
            counted = slice(len(lead), None)
            yield from zip(burst[counted], samples_ns[counted], strict=True)
            done += len(burst[counted])


@dataclass(frozen=True, slots=True)
class Quantiles:
    """The 5, 20, 50, 80 and 95 % quantiles of samples, interpolated linearly."""

    q05_ns: float
    q20_ns: float
    q50_ns: float
    q80_ns: float
    q95_ns: float


def quantiles(samples_ns: Sequence[float]) -> Quantiles:
    """Return the quantiles of samples."""
    return Quantiles(*np.quantile(samples_ns, (0.05, 0.2, 0.5, 0.8, 0.95)).tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Median over rounds of one arm's time over another's, with its 95 % interval."""

    median: float
    low: float
    high: float
    rounds: int


def paired_ratio(above_ns: Sequence[float], below_ns: Sequence[float]) -> Ratio:
    """Return the ratio of the samples of two arms, two a round; ValueError below 6 rounds, which have no interval.

    The interval is of order statistics: it covers 95 % or more, whatever the distribution of independent rounds. It is
    of these two graphs: two captures of one step differed by 0.15 % (H100), so less than that says nothing of a kernel.
    """
    from scipy.stats import binom

    above_R, below_R = (np.reshape(samples_ns, (-1, 2)).sum(axis=1) for samples_ns in (above_ns, below_ns))
    if len(above_R) != len(below_R) or len(above_R) < 6:
        raise ValueError(
            f"{len(above_R)} and {len(below_R)} rounds; a paired interval takes 6 or more, alike in number"
        )
    ratio_R = np.sort(above_R / below_R)
    rank = int(binom.ppf(0.025, len(ratio_R), 0.5))
    low, high = float(ratio_R[rank - 1]), float(ratio_R[-rank])
    return Ratio(median=float(np.median(ratio_R)), low=low, high=high, rounds=len(ratio_R))
