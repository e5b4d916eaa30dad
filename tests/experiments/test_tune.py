"""The search of launches, on clocks of formulas."""

import zlib
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertslice.experiments.cli import run
from expertslice.experiments.tune import (
    FUSED_BYTES,
    FUSED_ROWS,
    KEPT,
    LEAST_GATHERED_ROWS,
    NARROW_ROWS,
    RANGES,
    SKEWS,
    candidates,
    heights,
    mean_ns,
    search,
    starts,
    tiles_for,
    unsliced,
)
from expertslice.kernels.launches import rows_per_expert
from expertslice.traces.models import load_model

MODELS = ("small", "large", "qwen3-30b-a3b", "mixtral-8x7b")
shapes = st.tuples(st.sampled_from(MODELS), st.sampled_from([1, 30, 300, 3000]))


def never():
    return False


@settings(deadline=None, max_examples=30)
@given(shape=shapes, seed=st.integers(0, 99))
def test_the_search_ends_with_the_best_that_it_timed_and_overlaps_if_that_pays(shape, seed):
    spec, num_tokens = load_model(shape[0]), shape[1]

    def clock(launch):
        chosen = launch.slices[0]
        costs = [1 + hash((tile, i, seed)) % 1000 for i, tile in enumerate((chosen.up, chosen.down))]
        return dict.fromkeys(SKEWS, sum(costs) * (0.99 if launch.dependent else 1.0))

    best, found = search(spec, num_tokens, clock, sm_count=132, expired=never)
    assert mean_ns(found[best]) == min(map(mean_ns, found.values()))
    assert {*starts(spec, num_tokens, 132)} <= {*found}
    assert best.dependent
    # No other tile of those timed is better for one product alone.
    if not best.fused:
        tiles = {one.slices[0] for one in found if one.slices[0].up == one.slices[0].down}
        leaders = sorted(
            (one for one in tiles if not one.up.pingpong), key=lambda one: mean_ns(clock(unsliced(one.up, one.up)))
        )
        pair = unsliced(leaders[0].up, leaders[0].down)
        assert mean_ns(found[best]) <= mean_ns(clock(pair))


@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=st.integers(0, 999))
def test_what_a_search_times_was_compiled_ahead(shape, seed):
    spec, num_tokens = load_model(shape[0]), shape[1]

    def clock(launch):
        return dict.fromkeys(SKEWS, zlib.crc32(f"{seed} {launch}".encode()) % 97 + 1)

    _, found = search(spec, num_tokens, clock, sm_count=132, expired=never)
    ahead = candidates(spec, num_tokens, 132)
    for launch in found:
        chosen = launch.slices[0]
        if launch.fused:
            alike = [one.slices[0] for one in ahead if one.fused]
            assert any(one.up == chosen.up and one.down.block_n == chosen.down.block_n for one in alike), launch
        else:
            alike = [one.slices[0] for one in ahead if not one.fused and one.gathered == launch.gathered]
            assert chosen.up in {one.up for one in alike}, launch
            assert chosen.down in {one.down for one in alike}, launch


def test_what_was_best_nearby_is_timed_first():
    known = unsliced(tiles_for(load_model("large"), 256, 132)[-1], tiles_for(load_model("large"), 256, 132)[-1])
    best, found = search(
        load_model("large"), 256, lambda _: dict.fromkeys(SKEWS, 5.0), sm_count=132, expired=lambda: True, known=[known]
    )
    assert list(found) == [known] == [best]


def test_both_skews_count():
    spec = load_model("large")
    uniform_best, balanced = starts(spec, 256, 132)[:2]
    times = {uniform_best: {"uniform": 10.0, "zipf": 100.0}, balanced: {"uniform": 12.0, "zipf": 50.0}}
    best, _ = search(spec, 256, times.get, sm_count=132, expired=never)
    assert best == balanced


def test_time_that_is_over_still_gives_a_launch_and_times_no_more():
    timed = []

    def clock(launch):
        timed.append(launch)
        return dict.fromkeys(SKEWS, 5.0)

    best, found = search(load_model("small"), 64, clock, sm_count=132, expired=lambda: True)
    assert timed == [best] == list(found)


def test_a_device_that_holds_nothing_is_refused():
    with pytest.raises(ValueError, match="no launch of 'small' fits this device"):
        search(load_model("small"), 64, lambda _: None, sm_count=132, expired=never)


@given(shape=shapes)
def test_candidates_are_distinct_and_possible(shape):
    spec, num_tokens = load_model(shape[0]), shape[1]
    found = candidates(spec, num_tokens, 132)
    assert len(set(found)) == len(found) > KEPT
    hit, rows = rows_per_expert(spec, num_tokens)
    few = rows <= FUSED_ROWS or hit * spec.expert_bytes() < FUSED_BYTES
    assert any(launch.fused for launch in found) == (few and min(heights(rows)) < 128)
    narrow = [one for one in found if one.slices[0].down.block_n < one.slices[0].up.block_n and one.fused]
    assert bool(narrow) == (few and rows <= NARROW_ROWS)
    assert any(launch.gathered for launch in found) == (rows >= LEAST_GATHERED_ROWS)


def test_a_machine_without_a_gpu_is_told_so(capsys):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    assert run(["tune", "small"]) == 2
    assert "tune needs a CUDA device" in capsys.readouterr().err


@pytest.fixture
def fake_device(monkeypatch):
    """Return what was timed on a device whose clock is a formula: (tokens, launches) of every range."""
    torch = pytest.importorskip("torch")
    from expertslice.experiments import tune_shape as tuning
    from expertslice.kernels import weights

    timed = []

    def clock_of(batches):
        (num_tokens,) = {batch[0] for batch in batches.values()}
        timed.append(num_tokens)
        return lambda launch: dict.fromkeys(batches, 1.0 + launch.slices[0].up.block_m)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Fake GPU 7")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(weights, "random_weights", lambda spec, device, seed: seed)
    monkeypatch.setattr(tuning, "precompile", lambda loads: None)
    monkeypatch.setattr(tuning, "num_sets", lambda spec, num_tokens: 2)
    monkeypatch.setattr(tuning, "batch_of", lambda spec, num_tokens, skew, sets: (num_tokens, skew))
    monkeypatch.setattr(tuning, "clock_of", clock_of)
    return timed


def test_tuning_that_was_stopped_goes_on_where_it_was(fake_device, tmp_path):
    from expertslice.experiments.tune_shape import tune_shape
    from expertslice.kernels.tuned import load

    spec, lines = load_model("small"), []

    def stop_at_third(line):
        lines.append(line)
        if len(lines) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_shape(spec, seconds=9, folder=tmp_path, say=stop_at_third)
    path = tune_shape(spec, seconds=9, folder=tmp_path, say=lines.append)
    held = load(path)
    assert path.parent.name == "fake-gpu-7"
    assert [r.most_tokens for r in held.ranges] == list(RANGES) == fake_device
    assert len(lines) == len(RANGES)
    assert held.launch_for(1).slices[0].up.block_m == 16
    tune_shape(spec, seconds=9, folder=tmp_path, say=lines.append)
    assert fake_device == list(RANGES)
