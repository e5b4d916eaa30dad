"""The cache of graphs against a list that is kept by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertslice.runtime.graphs import GraphCache

SIZES = {"a": 10, "b": 20, "c": 30, "d": 45, "e": 200}


@given(asked=st.lists(st.sampled_from(sorted(SIZES)), max_size=40), budget=st.integers(0, 120))
def test_the_most_recently_used_graphs_that_fit_are_there(asked, budget):
    captured, recent = [], []
    cache = GraphCache(budget, lambda key: (captured.append(key) or f"graph {key}", SIZES[key]))
    for key in asked:
        before = len(captured)
        assert cache.get(key) == f"graph {key}"
        assert (len(captured) > before) == (key not in recent)
        if key not in recent:
            recent.append(key)
            while len(recent) > 1 and sum(SIZES[k] for k in recent) > budget:
                recent.pop(0)
        recent.remove(key)
        recent.append(key)
        assert all((k in cache) == (k in recent) for k in SIZES)
        assert cache.held_bytes == sum(SIZES[k] for k in recent)
    cache.clear()
    assert len(cache) == 0


def test_a_capture_that_fails_leaves_the_others():
    def capture(key):
        if key == "bad":
            raise MemoryError
        return key, 1

    cache = GraphCache(10, capture)
    cache.get("good")
    with pytest.raises(MemoryError):
        cache.get("bad")
    assert "good" in cache
    assert "bad" not in cache
    with pytest.raises(ValueError, match="give 0 or more"):
        GraphCache(-1, capture)
