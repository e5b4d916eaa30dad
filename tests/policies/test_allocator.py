"""Laws of the paper's allocation algorithm."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertslice.policies.allocator import allocate, free_slices, place_longest_first

requests = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(0, 5)),
    max_size=25,
)
pools = st.builds(
    partial,
    st.just(allocate),
    utilisation_S=st.lists(st.floats(0, 1, width=16), min_size=4, max_size=8).map(tuple),
    capacity=st.integers(1, 3),
)


def serve(allocate, wanted):
    """Yield who holds what before and after each request, and the request."""
    held = {}
    for expert, required, priority in wanted:
        before, held = held, allocate(held, expert, required, priority)
        yield before, held, expert, priority


def last(allocate, wanted):
    return [{}, *(after for _, after, *_ in serve(allocate, wanted))][-1]


@given(pools, requests)
def test_no_slice_is_held_beyond_its_capacity(pool, wanted):
    for _, held, *_ in serve(pool, wanted):
        taken = [slice_id for a in held.values() for slice_id in a.slice_ids]
        assert all(taken.count(s) <= pool.keywords["capacity"] for s in taken)
        assert all(len(set(a.slice_ids)) == len(a.slice_ids) for a in held.values())


@given(pools, requests)
def test_only_strictly_lower_priorities_are_evicted(pool, wanted):
    for before, held, expert, priority in serve(pool, wanted):
        gone = [a.priority for e, a in before.items() if e not in held]
        assert all(lost < priority for lost in gone)
        kept = [a.priority for e, a in before.items() if e in held]
        if gone:
            assert min((p for p in kept if p < priority), default=priority) >= max(gone)
        if expert not in held:
            assert held == before


@given(pools, requests, st.integers(1, 4), st.integers(0, 9))
def test_existing_allocation_is_returned_unchanged(pool, wanted, required, priority):
    held = last(pool, wanted)
    for expert in held:
        assert pool(held, expert, required, priority) == held


@given(pools, requests)
def test_requests_change_nothing_that_was_given(pool, wanted):
    held = last(pool, wanted)
    before = dict(held)
    pool(held, 10, 4, 9)
    assert held == before
    assert last(pool, wanted) == held


def test_least_utilised_slices_first_and_ties_by_id():
    utilisation_S = (0.5, 0.1, 0.5, 0.1)
    held = allocate({}, 7, 3, 1.0, utilisation_S=utilisation_S)
    assert held[7].slice_ids == (1, 3, 0)
    assert free_slices(held, utilisation_S) == [2]


def test_evicts_the_lowest_priority_first():
    three = partial(allocate, utilisation_S=(0.0, 0.0, 0.0))
    held = three(last(three, [(0, 1, 3.0), (1, 1, 1.0), (2, 1, 2.0)]), 9, 2, 2.5)
    assert set(held) == {0, 9}
    assert held[9].slice_ids == (1, 2)
    assert 5 not in three(held, 5, 1, 2.5), "equal priority evicts nobody"


def test_a_request_that_fails_evicts_nobody():
    two = partial(allocate, utilisation_S=(0.0, 0.0))
    held = last(two, [(0, 1, 1.0), (1, 1, 9.0)])
    assert two(held, 2, 2, 5.0) == held


def test_refuses_what_can_never_be_served():
    for utilisation_S in ((0.0, 0.0), ()):
        with pytest.raises(ValueError, match=f"asks for 3 slices; there are {len(utilisation_S)}"):
            allocate({}, 0, 3, 1.0, utilisation_S=utilisation_S)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 4))
def test_placing_all_at_once_is_allocating_one_by_one(loads, num_slices):
    held, used_S = {}, [0.0] * num_slices
    for expert in sorted(range(len(loads)), key=lambda e: (-loads[e], e)):
        held = allocate(held, expert, 1, float(loads[expert]), utilisation_S=used_S, capacity=len(loads))
        used_S[held[expert].slice_ids[0]] += loads[expert]
    placed_LE = place_longest_first(np.asarray([loads, loads], float), np.ones(num_slices))
    expected = [held[expert].slice_ids[0] for expert in range(len(loads))]
    assert placed_LE.tolist() == [expected, expected]


@given(st.lists(st.integers(0, 50), min_size=4, max_size=12))
def test_placement_keeps_to_capacity_and_to_grahams_bound(loads):
    capacity = -(-len(loads) // 3)
    ids_E = place_longest_first(np.asarray([loads], float), np.ones(3), capacity=capacity)[0]
    assert np.bincount(ids_E, minlength=3).max() <= capacity
    free_E = place_longest_first(np.asarray([loads], float), np.ones(3))[0]
    finish = np.bincount(free_E, loads, 3).max()
    # For any list schedule on three machines: 5/3 of what no schedule can beat.
    assert finish <= max(sum(loads) / 3, *loads) * 5 / 3


def test_faster_and_idler_slices_take_more():
    load_LE = np.ones((1, 9))
    assert np.bincount(place_longest_first(load_LE, np.asarray([2.0, 1.0]))[0]).tolist() == [6, 3]
    busy = place_longest_first(load_LE, np.ones(2), busy_LS=np.asarray([[3.0, 0.0]]))[0]
    assert np.bincount(busy).tolist() == [3, 6]
    with pytest.raises(ValueError, match="9 experts do not fit 2 slices of 4"):
        place_longest_first(load_LE, np.ones(2), capacity=4)
