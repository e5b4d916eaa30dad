"""How running segments divide what they share."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from splits import COLD, HOT, WIDE

from expertslice.policies.contract import SliceLayout
from expertslice.policies.data import load_device
from expertslice.policies.fluid import Fluid, Theft
from expertslice.policies.layouts import uniform_slice
from expertslice.policies.rates import Segment, gap, rates, water_level
from expertslice.policies.shares import Shares
from expertslice.policies.tiles import TileConstants
from expertslice.traces.schema import MoeSpec

DEVICE = load_device("h100-sxm5-80gb")
HARD, SOFT = TileConstants(), TileConstants(overlap=0.3, stream_ns=300.0, read_part=0.95)
MODEL = MoeSpec(name="m", num_layers=1, num_experts=8, top_k=2, d_model=512, d_ff=(1024,))


def shares(
    *tiles: str,
    mechanism: str = "sm_budget",
    sms: int = 132,
    priorities: tuple[int, ...] = (),
    constants: TileConstants = HARD,
) -> Shares:
    slices = tuple(
        replace(uniform_slice(mechanism, sms, tile), stream_priority=priorities[i] if priorities else 0)
        for i, tile in enumerate(tiles)
    )
    variants = {v.name: v for v in (HOT, COLD, WIDE)}
    return Shares(SliceLayout(slices=slices), variants, DEVICE, MODEL, constants)


def stream(solo_ns: float, per_ns: float, kernel: int = 0) -> Segment:
    return Segment(solo_ns, 0.0, 0.0, 0.0, per_ns, kernel)


def test_two_equal_kernels_sharing_bandwidth_take_exactly_twice_as_long():
    both = shares(COLD.name, COLD.name)
    one = stream(100_000.0, both.read_cap(3))
    fluid = Fluid(both)
    assert fluid.run([[one], [one]]) == 200_000


def test_two_equal_kernels_sharing_pipes_take_exactly_twice_as_long():
    both = shares(COLD.name, HOT.name)
    one = Segment(50_000.0, 1.0, 0.0, 0.0, 0.0, 0)
    fluid = Fluid(both)
    assert fluid.run([[one], [one]]) == 100_000


def test_slices_that_own_their_sms_do_not_share_pipes():
    apart = shares(COLD.name, HOT.name, mechanism="green_context", sms=64)
    one = Segment(50_000.0, 0.5, 0.0, 0.3, 0.0, 0)
    fluid = Fluid(apart)
    assert fluid.run([[one], [one]]) == 50_000


def test_who_asks_for_less_than_a_fair_part_gets_all_of_it():
    both = shares(COLD.name, HOT.name)
    cap = both.read_cap(3)
    speeds = rates([0, 1], [stream(1.0, 0.3 * cap), stream(1.0, cap)], both)
    assert speeds is not None
    assert speeds[0] == 1.0
    assert speeds[1] == pytest.approx(0.7)


def test_bandwidth_left_by_a_kernel_that_ends_goes_to_the_others():
    both = shares(COLD.name, COLD.name)
    cap = both.read_cap(3)
    fluid = Fluid(both)
    assert fluid.run([[stream(100_000.0, cap)], [stream(50_000.0, cap)]]) == 150_000
    assert fluid.busy_ns == [150_000, 100_000]


def test_a_gap_occupies_nothing():
    both = shares(COLD.name, COLD.name)
    cap = both.read_cap(3)
    fluid = Fluid(both)
    assert fluid.run([[stream(100_000.0, cap)], [gap(100_000.0)]]) == 100_000
    assert fluid.busy_ns == [100_000, 0]


def test_streams_that_do_not_fit_together_run_one_after_another_by_priority():
    queued = shares(WIDE.name, WIDE.name, WIDE.name, mechanism="shared", priorities=(0, 0, -1))
    fluid = Fluid(queued)
    assert fluid.run([[stream(10.0, 0.0)]] * 3) == 30
    assert fluid.first_ns == [0, 20, 10]


def test_streams_on_few_sms_run_side_by_side_whatever_their_tiles():
    fluid = Fluid(shares(WIDE.name, WIDE.name, mechanism="shared", sms=66))
    assert fluid.run([[stream(10.0, 0.0)]] * 2) == 10


demands = st.lists(st.floats(0.0, 2.0), min_size=1, max_size=6)


@given(demands, st.data())
def test_a_water_level_fills_the_capacity_and_no_more(wanted: list[float], data: st.DataObject):
    weights = data.draw(st.lists(st.floats(0.1, 10.0), min_size=len(wanted), max_size=len(wanted)))
    level = water_level(wanted, weights, 1.0)
    given_out = sum(min(d, w * level) for d, w in zip(wanted, weights, strict=True))
    assert given_out == pytest.approx(min(1.0, sum(wanted)))


part = st.floats(0.0, 1.0)
segments = st.lists(
    st.builds(lambda p, q, f, d: Segment(1.0, p, q, f, d * 3.1e3, 0), part, part, part, part), min_size=2, max_size=4
)


@given(segments)
def test_rates_never_exceed_what_there_is_and_waste_nothing(running: list[Segment]):
    layout = shares(*[COLD.name] * len(running))
    ids = list(range(len(running)))
    speeds = rates(ids, running, layout) or [1.0] * len(running)
    caps = (1.0, 1.0, 1.0, layout.read_cap((1 << len(running)) - 1))
    used = [sum(s[f] * y for s, y in zip(running, speeds, strict=True)) for f in range(1, 5)]
    assert all(0.0 < y <= 1.0 + 1e-12 for y in speeds)
    assert all(u <= cap * (1 + 1e-9) for u, cap in zip(used, caps, strict=True))
    for segment, speed in zip(running, speeds, strict=True):
        full = [f for f in range(4) if segment[f + 1] > 0 and used[f] >= caps[f] * (1 - 1e-6)]
        assert speed >= 1 - 1e-9 or full


def test_slices_that_end_together_steal_nothing_from_each_other():
    both = shares(COLD.name, COLD.name)
    one = stream(10.0, 0.0)
    fluid = Fluid(both, lambda *_: Theft(one, 10.0, 1.0))
    assert fluid.run([[one], [one]]) == 10


@given(
    parts=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=3),
    sms=st.sampled_from((8, 16, 40)),
    more=st.floats(0.0, 0.5),
)
def test_reads_that_wait_for_one_another_never_exceed_the_memory_and_never_gain_from_more_beside_them(parts, sms, more):
    tiles = (COLD.name, HOT.name, WIDE.name)[: len(parts)]
    beside = shares(*tiles, mechanism="green_context", sms=sms, constants=SOFT)
    ids, most = range(len(parts)), beside.read_per_ns_S
    asked = [part * own for part, own in zip(parts, most, strict=True)]
    speeds = rates(ids, [stream(1.0, ask) for ask in asked], beside) or [1.0] * len(parts)
    assert all(0 < speed <= 1 for speed in speeds)
    moved = sum(ask * speed for ask, speed in zip(asked, speeds, strict=True))
    assert moved <= beside.read(sum(beside.reach_S)) * 1.01
    asked[0] = min(1.0, parts[0] + more) * most[0]
    then = rates(ids, [stream(1.0, ask) for ask in asked], beside) or [1.0] * len(parts)
    assert all(after <= before + 1e-3 for before, after in zip(speeds[1:], then[1:], strict=True))


def test_two_that_only_read_take_twice_as_long_where_each_alone_reaches_the_limit():
    both = shares(WIDE.name, WIDE.name, constants=SOFT)
    one = stream(100_000.0, both.read_per_ns_S[0])
    assert Fluid(both).run([[one], [one]]) == pytest.approx(200_000, rel=0.01)
    assert rates([0], [one], both) is None
    assert rates([0, 1], [one, Segment(1.0, 0.0, 0.0, 0.0, 0.0, 0)], both) is None
