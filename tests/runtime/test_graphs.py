"""The cache of graphs against a list that is kept by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertslice.runtime.graphs import CAPTURE_RULES, Calls, CaptureRule, GraphCache

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


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 64)), max_size=60), st.integers(0, 4), st.booleans())
def test_graphs_are_captured_after_calls_large_enough_and_if_asked_without_another_between(steps, least, stable):
    rule = CaptureRule(least_calls=least, least_tokens=32, stable=stable)
    calls, seen = Calls(rule), []
    for key, tokens in steps:
        since = seen
        if stable:
            start = max((i + 1 for i, (other, _) in enumerate(seen) if other != key), default=0)
            since = seen[start:]
        enough = sum(1 for other, count in since if other == key and count >= 32) >= least
        assert calls.captures(key, tokens) == (tokens >= 32 and enough)
        seen.append((key, tokens))


def test_the_papers_rule_is_a_preset_and_the_default_captures_at_once():
    assert Calls(CAPTURE_RULES["all"]).captures("a", 0)
    paper = Calls(CAPTURE_RULES["paper"])
    assert [paper.captures("a", 32) for _ in range(11)] == [False] * 10 + [True]
    with pytest.raises(ValueError, match="neither may be negative"):
        CaptureRule(least_calls=-1)
