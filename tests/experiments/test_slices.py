"""The slice experiments on small experts without a GPU: kernels are interpreted, and time is told by the test."""

import contextlib
import itertools
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, it is tried itself")

from expertslice.experiments import slices, slices_arms, slices_beside, slices_load  # noqa: E402
from expertslice.experiments.slices_load import Load, Shape, in_turn, one_tile  # noqa: E402
from expertslice.kernels import reference  # noqa: E402
from expertslice.kernels.spec import LaunchSpec  # noqa: E402
from expertslice.runtime import lanes  # noqa: E402
from expertslice.runtime.partition import PartitionError  # noqa: E402
from expertslice.runtime.timer import Captured  # noqa: E402

SHAPE = Shape(name="s", d_model=16, d_ff=32, num_experts=4, top_k=2, tokens=40, zipf_s=1.0)
TILES = [(LaunchSpec(block_m=m, block_n=32, block_k=16, num_warps=4, num_stages=2, num_ctas=1), 2) for m in (16, 64)]


@pytest.fixture
def here(monkeypatch):
    """Let both experiments run here, each replay slower than the one before."""
    times = itertools.count(100)
    monkeypatch.setattr(torch.cuda, "Stream", Mock)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=2))

    def capture(step, num_sets):
        for p in range(num_sets):
            step(p)
        return Captured(graph=SimpleNamespace(replay=lambda: step(0)), step=step, layers=num_sets)

    def interleave(arms, rounds, _):
        samples = tuple(tuple(1000.0 * (10 + i) + r for r in range(2 * rounds)) for i in range(len(arms)))
        return SimpleNamespace(samples_ns=samples)

    for module in (slices_arms, slices_load, slices_beside):
        monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr(Captured, "time_ns", lambda self: next(times) * 1000.0)
    monkeypatch.setattr(slices_arms, "interleave", interleave)
    monkeypatch.setattr(slices, "tiles", lambda: TILES)
    monkeypatch.setattr(slices, "COLD_SMS", (1,))
    monkeypatch.setattr(slices_beside, "DECODE_SMS", (1,))
    monkeypatch.setattr(slices_beside, "BOUNDED_SMS", (2,))
    monkeypatch.setattr(slices_beside, "STAMPED", 2)
    for module in (slices, slices_beside):
        monkeypatch.setattr(module, "Load", lambda shape, **_: Load(shape, cold=False, device="cpu"))
    monkeypatch.setattr(slices_load, "BOUNDS", (20,))


def streams(*_):
    return [Mock(), Mock()]


def refuse(*_):
    raise PartitionError("no green contexts here")


@pytest.mark.parametrize(("kind", "products"), [("gelu2", 1), ("relu3", 3), ("swiglu", 2)])
def test_a_load_has_the_bits_of_its_definition_under_any_bound(kind, products):
    shape = replace(SHAPE, kind=kind, products=products)
    load = Load(shape, cold=False, device="cpu")
    rows = load.rows_ND[: sum(load.counts_E)]
    expected = []
    for e, part in enumerate(rows.split(load.counts_E)):
        x = part
        for held, epilogue in zip(load._sets[0], load.epilogues, strict=True):
            x = reference.product(x, held.weight[e], epilogue=epilogue)
        expected.append(x)
    expected = torch.cat(expected)
    if products > 1:
        expected = torch.empty_like(expected).index_copy_(0, load._base.row_slot_N[: len(rows)].long(), expected)
    for launch, bound in ((one_tile(TILES[0][0]), None), (one_tile(TILES[0][0], TILES[1][0]), 20)):
        load.out.fill_(float("nan"))
        in_turn(load, load.route(launch, bound, "heavy"))(0)
        assert torch.equal(load.out, expected)
    assert load.flops == 2 * sum(load.counts_E) * sum(held.weight[0].numel() for held in load._sets[0])


def test_loads_are_even_or_skewed_and_each_token_takes_different_experts():
    even = Load(replace(SHAPE, zipf_s=0), cold=False, device="cpu")
    assert even.counts_E == [20] * 4
    skewed = Load(replace(SHAPE, zipf_s=2.0, num_experts=8), cold=False, device="cpu")
    assert max(skewed.counts_E) > 3 * sorted(skewed.counts_E)[3]
    assert max(skewed.counts_E) <= SHAPE.tokens


def test_a_shape_gives_finalists_of_both_sides_and_what_slicing_gained(here):
    rows = slices.measure(SHAPE, 60.0, 6, streams)
    gain = rows[-1]
    assert (gain["arm"], gain["status"]) == ("gain", "ok")
    assert gain["gain_low"] <= gain["gain"] <= gain["gain_high"]
    names = {row["arm"].split()[0] for row in rows}
    assert {"torch", "one"} | {"gain"} <= names
    assert names & {"co-resident", "green"}
    tried = [json.loads(gain[f"tried_{side}_us"]) for side in ("unsliced", "sliced")]
    assert all(len({name.split()[0] for name in side}) > 1 for side in tried)
    assert all(row["status"] == "ok" for row in rows)
    assert all("step" not in row for row in rows)
    assert all(slices.line(row) for row in rows)


def test_a_search_climbs_from_where_it_starts_to_the_best_split_and_bound():
    load = Load(replace(SHAPE, zipf_s=1.5, num_experts=8), cold=False, device="cpu")
    cuts = sorted({n for n in load.counts_E if n})[1:]
    tile = TILES[0]
    start = slices.Arm(how="green", cold=tile, hot=tile, bound=cuts[0], sms=16)

    def attempt(arm):
        return {"arm": arm.name, "spec": arm, "status": "ok", "quick_us": abs(arm.sms - 52) + abs(arm.bound - cuts[-1])}

    near = partial(slices.neighbours, load=load, ranking={20: ([tile], [tile])}, sm_count=132)
    found, tried = slices.search([start], near, attempt, 60.0)
    best = found[0]["spec"]
    assert (best.sms, best.bound) == (52, cuts[-1])
    assert len(tried) == len(found) == len({row["arm"] for row in found})
    assert all(4 <= row["spec"].sms <= 128 for row in found)
    assert slices.search([start], near, lambda _: None, 60.0) == ([], {})


def test_bounds_beside_move_one_count_and_leave_both_sides_experts():
    load = Load(replace(SHAPE, zipf_s=1.5, num_experts=8), cold=False, device="cpu")
    counts = sorted({n for n in load.counts_E if n})
    for bound in range(counts[0] + 1, counts[-1] + 1):
        cold = [n for n in counts if n < bound]
        for other in load.bounds_beside(bound):
            moved = [n for n in counts if n < other]
            assert abs(len(moved) - len(cold)) == 1
            assert 0 < len(moved) < len(counts)


def test_wrong_bits_are_reported_and_arms_that_cannot_be_are_left(here, monkeypatch):
    real = slices.in_turn

    def wrong(load, queues):
        step = real(load, queues)

        def broken(p):
            step(p)
            load.out[:1] += (queues.launch.slices[0].up.block_m == 64) * 1.0

        return broken

    monkeypatch.setattr(slices, "in_turn", wrong)
    rows = slices.measure(SHAPE, 60.0, 6, refuse)
    assert {row["status"] for row in rows} == {"ok", "wrong bits"}
    assert all("us_q50" not in row for row in rows if row["status"] == "wrong bits")
    kinds = {row["arm"].split()[0] for row in rows}
    assert "co-resident" in kinds
    assert "green" not in kinds


def test_a_mix_gives_every_way_its_best_launch_and_a_frontier(here, monkeypatch):
    now = itertools.count(1)

    class Stamp:
        def __getitem__(self, _):
            return lambda out: out.fill_(1000 * next(now))

    monkeypatch.setattr(lanes, "stamp_kernel", Stamp())
    monkeypatch.setattr(slices_beside.time, "sleep", lambda _: None)
    monkeypatch.setattr(slices_beside, "tiles", lambda: [(TILES[0][0], 1), (replace(TILES[0][0], block_m=128), 1)])
    mix = slices_beside.Mix(decode=replace(SHAPE, tokens=8, zipf_s=0, kind="swiglu"), m=16, n=32, k=16)
    rows = slices_beside.measure_mix(mix, 6, streams)
    names = [row["arm"] for row in rows]
    assert {"one after the other", "plain streams", "decode first", "dense first", "bounded 2", "green 1"} <= {*names}
    assert rows[-1]["gain"] > 0
    assert {row["decode_launch"] for row in rows[:-1]} == {"16x32x16w4s2 x1"}
    assert {row["dense_launch"] for row in rows[:-1]} <= {"torch.mm", "128x32x16w4s2 x1"}
    assert all(row["decode_us_q50"] == row["dense_us_q50"] == 1.0 for row in rows[:-1] if not row["join"])
    assert all(row["status"] == "ok" for row in rows)


@pytest.mark.parametrize("join", [0.0, 0.25, 0.5, -0.25, -0.5])
def test_a_part_that_joins_the_other_leaves_the_bits_and_is_done_once(here, join, monkeypatch):
    monkeypatch.setattr(slices_beside.Parts, "_stamped", lambda self, at, step: step)
    monkeypatch.setattr(slices_beside, "DENSE_ROWS", 16)
    mix = slices_beside.Mix(decode=replace(SHAPE, tokens=8, zipf_s=0, kind="swiglu"), m=64, n=32, k=16)
    parts = slices_beside.Parts(*(slices_beside.Load(shape) for shape in (mix.decode, mix.dense)))
    way = slices_beside.Way(name="green 1", side="sliced", sms=1, dense_sms=1, streams=lambda: streams(1))

    def outputs(join):
        return slices_beside._outputs(parts, way.step(parts, lambda sms: TILES[0][0], None, join))

    for found, plain in zip(outputs(join), outputs(0.0), strict=True):
        assert not plain.isnan().any()
        assert torch.equal(found, plain)


def test_tiles_that_share_an_sm_are_those_that_fit():
    def tile(m, warps, stages):
        return LaunchSpec(block_m=m, block_n=128, block_k=64, num_warps=warps, num_stages=stages, num_ctas=1)

    assert slices.shares_sm(tile(64, 4, 3), tile(128, 8, 4))
    assert not slices.shares_sm(tile(128, 8, 4), tile(128, 8, 4))


def test_both_sides_choose_from_the_tiles_of_launches_and_some_share_an_sm():
    from expertslice.experiments.slices_arms import tile_name, tiles

    chosen = tiles()
    assert len({tile_name(tile) for tile, _ in chosen}) == len(chosen) > 10
    pairs = itertools.combinations([tile for tile, _ in chosen], 2)
    assert any(slices.shares_sm(cold, hot) for cold, hot in pairs if cold.block_m < hot.block_m)
