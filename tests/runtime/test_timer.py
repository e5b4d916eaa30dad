"""The order, the regimes and the statistics of timing, on arms of a fake clock."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from expertslice.runtime.timer import (
    BURST_PLANNED_NS,
    burst_size,
    interleave,
    paired_ratio,
    quantiles,
    sets_to_stay_cold,
)

MS = 1_000_000
times = st.lists(st.floats(1, 1e9), min_size=1, max_size=50)


class Arm:
    """A replay of so many layers on a fake device; `slower(i)` is the factor of its i-th replay."""

    def __init__(self, world, log, name, replay_ns, layers=4, slower=lambda i: 1.0):
        self.world, self.log, self.name, self.replay_ns, self.layers = world, log, name, replay_ns, layers
        self.slower, self.replays = slower, 0

    def enqueue(self):
        took_ns = round(self.replay_ns * self.slower(self.replays))
        self.replays += 1
        self.world.enqueue(took_ns)
        self.log.append((self.name, took_ns, len(self.world.slept)))
        fence = self.world.fence()

        def wait_ns():
            fence.synchronize()
            return took_ns / self.layers

        return wait_ns


def bursts(log):
    """Return the replays after each pause; those before the first are estimates."""
    return [list(g) for slept, g in itertools.groupby(log, key=lambda r: r[2]) if slept]


def order(names, rounds):
    return [*names, *reversed(names)] * rounds


@settings(max_examples=50, deadline=None)
@given(
    replays_ms=st.lists(st.floats(0.1, 8), min_size=1, max_size=4),
    rounds=st.integers(1, 12),
    jitter=st.floats(0, 0.1),
    seed=st.integers(0, 9),
)
def test_bursts_stay_within_their_bounds_and_keep_the_order(build, replays_ms, rounds, jitter, seed):
    world, _ = build()
    log, rng = [], np.random.default_rng(seed)
    arms = [Arm(world, log, i, ms * MS, slower=lambda _: 1 + jitter * rng.random()) for i, ms in enumerate(replays_ms)]
    timed = interleave(arms, rounds, "burst", sleep=world.sleep)
    found = bursts(log)
    assert all(sum(took for _, took, _ in burst) <= 20 * MS for burst in found)
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(world.busy)]
    assert sum(gap >= 100 * MS for gap in gaps) == len(found)
    assert [name for burst in found for name, _, _ in burst[1:]] == order(range(len(arms)), rounds)
    kept = [(name, took / 4) for burst in found for name, took, _ in burst[1:]]
    for i, samples in enumerate(timed.samples_ns):
        assert list(samples) == [ns for name, ns in kept if name == i]
    assert timed.load_s is None


def test_a_burst_is_filled(build):
    world, _ = build()
    log = []
    interleave([Arm(world, log, i, MS) for i in range(2)], 20, "burst", sleep=world.sleep)
    assert [len(burst) for burst in bursts(log)] == [18, 18, 18, 18, 13]


def test_a_burst_that_ran_over_is_timed_again(build):
    world, _ = build()
    log = []
    slow = Arm(world, log, "slow", 2 * MS, slower=lambda i: 1.0 if i < 5 else 1.5)
    timed = interleave([slow], 10, "burst", sleep=world.sleep)
    first, *rest = bursts(log)
    assert sum(took for _, took, _ in first) > 20 * MS
    assert all(sum(took for _, took, _ in burst) <= 18 * MS for burst in rest)
    assert timed.samples_ns == ((0.75 * MS,) * 20,)


def test_replays_too_long_for_a_burst_are_refused(build):
    world, _ = build()
    with pytest.raises(ValueError, match=r"18\.5 ms and a burst"):
        interleave([Arm(world, [], "long", 18.5 * MS)], 1, "burst", sleep=world.sleep)


def test_a_replay_longer_than_half_a_burst_is_a_burst_of_its_own(build):
    world, _ = build()
    log = []
    timed = interleave(
        [Arm(world, log, name, ms * MS) for name, ms in (("a", 12), ("b", 7))], 2, "burst", sleep=world.sleep
    )
    assert [[name for name, _, _ in burst] for burst in bursts(log)] == [
        ["a"],
        ["b", "b"],
        ["a"],
        ["a"],
        ["b", "b"],
        ["a"],
    ]
    assert [len(samples) for samples in timed.samples_ns] == [4, 4]
    assert all(sum(took for _, took, _ in burst) <= 18 * MS for burst in bursts(log))


@settings(max_examples=20, deadline=None)
@given(replays_ms=st.lists(st.floats(0.1, 50), min_size=1, max_size=4), rounds=st.integers(1, 9))
def test_sustained_never_pauses_and_follows_load(build, replays_ms, rounds):
    world, _ = build()
    log = []
    arms = [Arm(world, log, i, ms * MS) for i, ms in enumerate(replays_ms)]
    timed = interleave(arms, rounds, "sustained", load_s=0.5, sleep=world.sleep)
    assert len(world.busy) == 1
    assert not world.slept
    count = 2 * len(arms) * rounds
    assert [name for name, _, _ in log[-count:]] == order(range(len(arms)), rounds)
    assert sum(took for _, took, _ in log[:-count]) >= 0.5e9
    assert [len(samples) for samples in timed.samples_ns] == [2 * rounds] * len(arms)
    assert timed.load_s == 0.5


def test_another_regime_is_refused():
    with pytest.raises(ValueError, match="'fast' is neither"):
        interleave([], 1, "fast")


@given(expected_ns=st.lists(st.floats(0.1 * MS, 20 * MS), min_size=2, max_size=60))
def test_a_burst_holds_all_that_fits(expected_ns):
    assume(expected_ns[0] <= BURST_PLANNED_NS)
    size = burst_size(expected_ns)
    assert np.cumsum(expected_ns)[size - 1] <= BURST_PLANNED_NS
    assert size == len(expected_ns) or np.cumsum(expected_ns)[size] > BURST_PLANNED_NS


@given(
    touched=st.integers(1, 10**9),
    more=st.integers(0, 10**10),
    l2=st.integers(10**6, 10**8),
    memory=st.integers(10**9, 10**11),
    factor=st.integers(1, 8),
)
def test_the_rotation_exceeds_l2_and_fits_memory_or_is_refused(touched, more, l2, memory, factor):
    sizes = {"l2_bytes": l2, "memory_bytes": memory, "factor": factor, "memory_share": 0.5}
    held = touched + more
    least = -(-factor * l2 // touched)
    if least * held > memory // 2:
        with pytest.raises(ValueError, match="lower factor"):
            sets_to_stay_cold(touched, held, **sizes)
        return
    found = sets_to_stay_cold(touched, held, **sizes)
    assert found * touched >= factor * l2
    assert found * held <= memory // 2
    assert found == least + 1 or (least + 1) * held > memory // 2


def test_sets_of_a_layer():
    # OLMoE, one token: 8 of 64 experts of 12.6 MB, an H100's L2 and memory.
    expert = 3 * 2048 * 1024 * 2
    assert sets_to_stay_cold(8 * expert, 64 * expert, l2_bytes=50_000_000, memory_bytes=85_520_809_984) == 3


@given(samples_ns=times, scale=st.floats(0.1, 10))
def test_quantiles_rise_stay_inside_and_scale(samples_ns, scale):
    found = quantiles(samples_ns)
    cuts = [found.q05_ns, found.q20_ns, found.q50_ns, found.q80_ns, found.q95_ns]
    assert cuts == sorted(cuts)
    assert min(samples_ns) <= cuts[0] * (1 + 1e-12)
    assert cuts[-1] <= max(samples_ns) * (1 + 1e-12)
    assert quantiles([ns * scale for ns in samples_ns]).q50_ns == pytest.approx(found.q50_ns * scale)


@pytest.mark.parametrize("truth", [1.0, 1.05])
@pytest.mark.parametrize("rounds", [6, 25, 100])
def test_the_interval_covers_the_true_ratio(truth, rounds):
    rng = np.random.default_rng([rounds, round(100 * truth)])
    trials, covered = 600, 0
    for _ in range(trials):
        # Rounds share a drift, samples are skewed: the ratio of like arms has the median of the truth.
        drift_S = np.repeat(rng.lognormal(0, 0.2, rounds), 2)
        below_S, above_S = (drift_S * rng.lognormal(0, 0.05, 2 * rounds) for _ in range(2))
        found = paired_ratio(truth * above_S, below_S)
        covered += found.low <= truth <= found.high
        assert found.low <= found.median <= found.high
    assert covered / trials > 0.95 - 3 * (0.05 * 0.95 / trials) ** 0.5


@given(samples_ns=st.lists(st.floats(1, 1e6), min_size=12, max_size=40).filter(lambda s: len(s) % 2 == 0))
def test_an_arm_over_itself_is_one_and_turning_the_ratio_turns_its_interval(samples_ns):
    same = paired_ratio(samples_ns, samples_ns)
    assert (same.median, same.low, same.high) == (1, 1, 1)
    other = samples_ns[::-1]
    one, turned = paired_ratio(samples_ns, other), paired_ratio(other, samples_ns)
    assert one.rounds == len(samples_ns) // 2
    assert one.low == pytest.approx(1 / turned.high)
    assert one.high == pytest.approx(1 / turned.low)


@pytest.mark.parametrize("counts", [(10, 10), (12, 14)])
def test_too_few_or_unlike_rounds_are_refused(counts):
    with pytest.raises(ValueError, match="6 or more"):
        paired_ratio(*([1.0] * count for count in counts))
