"""Laws of the paper's allocation algorithm."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertslice.policies.allocator import SlicePool, allocate, place_longest_first, release

requests = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(0, 5)),
    max_size=25,
)
pools = st.builds(
    SlicePool,
    utilisation_S=st.lists(st.floats(0, 1, width=16), min_size=4, max_size=8).map(tuple),
    capacity=st.integers(1, 3),
)


def held(pool):
    return [slice_id for a in pool.allocations for slice_id in a.slice_ids]


@given(pools, requests)
def test_no_slice_is_held_beyond_its_capacity(pool, wanted):
    for expert, required, priority in wanted:
        pool, _ = allocate(pool, expert, required, priority)
        taken = held(pool)
        assert all(taken.count(s) <= pool.capacity for s in taken)
        assert len({a.expert_id for a in pool.allocations}) == len(pool.allocations)
        assert all(len(set(a.slice_ids)) == len(a.slice_ids) for a in pool.allocations)


@given(pools, requests)
def test_only_strictly_lower_priorities_are_evicted(pool, wanted):
    for expert, required, priority in wanted:
        before = pool
        pool, granted = allocate(pool, expert, required, priority)
        gone = {a.expert_id: a.priority for a in before.allocations if a not in pool.allocations}
        assert all(lost < priority for lost in gone.values())
        kept = [a.priority for a in pool.allocations if a in before.allocations]
        if gone:
            assert min((p for p in kept if p < priority), default=priority) >= max(gone.values())
        if granted is None:
            assert pool == before


@given(pools, requests, st.integers(1, 4), st.integers(0, 9))
def test_existing_allocation_is_returned_unchanged(pool, wanted, required, priority):
    for expert, count, weight in wanted:
        pool, _ = allocate(pool, expert, count, weight)
    for existing in pool.allocations:
        assert allocate(pool, existing.expert_id, required, priority) == (pool, existing)


@given(pools, requests)
def test_same_requests_same_pool(pool, wanted):
    def run(state):
        for expert, required, priority in wanted:
            state, _ = allocate(state, expert, required, priority)
        return state

    assert run(pool) == run(replace(pool))


def test_least_utilised_slices_first_and_ties_by_id():
    pool = SlicePool(utilisation_S=(0.5, 0.1, 0.5, 0.1))
    pool, first = allocate(pool, 7, 3, 1.0)
    assert first.slice_ids == (1, 3, 0)
    assert pool.free_slices() == (2,)


def test_evicts_the_lowest_priority_first():
    pool = SlicePool(utilisation_S=(0.0, 0.0, 0.0))
    for expert, priority in ((0, 3.0), (1, 1.0), (2, 2.0)):
        pool, _ = allocate(pool, expert, 1, priority)
    pool, granted = allocate(pool, 9, 2, 2.5)
    assert {a.expert_id for a in pool.allocations} == {0, 9}
    assert granted.slice_ids == (1, 2)
    assert allocate(pool, 5, 1, 2.5)[1] is None, "equal priority evicts nobody"


def test_a_request_that_fails_evicts_nobody():
    pool = SlicePool(utilisation_S=(0.0, 0.0))
    pool, _ = allocate(pool, 0, 1, 1.0)
    pool, _ = allocate(pool, 1, 1, 9.0)
    assert allocate(pool, 2, 2, 5.0) == (pool, None)


def test_refuses_what_no_pool_can_serve():
    with pytest.raises(ValueError, match="asks for 3 slices; the pool has 2"):
        allocate(SlicePool(utilisation_S=(0.0, 0.0)), 0, 3, 1.0)
    with pytest.raises(ValueError, match="both must be at least 1"):
        SlicePool(utilisation_S=())


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 4))
def test_placing_all_at_once_is_allocating_one_by_one(loads, num_slices):
    pool = SlicePool(utilisation_S=(0.0,) * num_slices, capacity=len(loads))
    for expert in sorted(range(len(loads)), key=lambda e: (-loads[e], e)):
        pool, granted = allocate(pool, expert, 1, float(loads[expert]))
        raised = list(pool.utilisation_S)
        raised[granted.slice_ids[0]] += loads[expert]
        pool = replace(pool, utilisation_S=tuple(raised))
    placed_LE = place_longest_first(np.asarray([loads, loads], float), np.ones(num_slices))
    expected = [a.slice_ids[0] for a in sorted(pool.allocations, key=lambda a: a.expert_id)]
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


def test_release_frees_slices():
    pool, _ = allocate(SlicePool(utilisation_S=(0.0,)), 0, 1, 1.0)
    assert pool.free_slices() == ()
    assert release(pool, 0).free_slices() == (0,)
    assert release(pool, 5) == pool
