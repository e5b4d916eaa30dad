"""A profile's layers and parts without a GPU: kernels are interpreted, and time is told by the test."""

import contextlib
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, it is tried itself")

from expertslice.experiments import design, profile, profile_parts  # noqa: E402
from expertslice.experiments.bench_arms import Batch, draw_logits  # noqa: E402
from expertslice.experiments.calibrate import measured_of  # noqa: E402
from expertslice.experiments.design import Load  # noqa: E402
from expertslice.kernels import reference  # noqa: E402
from expertslice.kernels.spec import RouterSpec  # noqa: E402
from expertslice.kernels.weights import random_weights  # noqa: E402
from expertslice.policies.contract import Setup, SliceLayout, TileVariant  # noqa: E402
from expertslice.policies.data import load_device, load_variants  # noqa: E402
from expertslice.policies.layouts import uniform_slice  # noqa: E402
from expertslice.runtime import lanes  # noqa: E402
from expertslice.runtime.partition import PartitionError  # noqa: E402

SMALL = TileVariant(
    name="16x32", block_m=16, block_n=32, block_k=16, num_warps=4, num_stages=2, smem_bytes=0, regs_per_thread=64
)
TILES = SMALL, replace(SMALL, name="32x32", block_m=32)
DEVICE = replace(load_device("a100-sxm4-80gb"), sm_count=8, sm_partition_min=4, sm_partition_step=4)


class Quiet:
    def __getitem__(self, _):
        return lambda *_args, **_options: None


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", Mock)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(lanes, "stamp_kernel", Quiet())
    ticks = itertools.count(1)

    def capture(step, num_sets):
        for p in range(num_sets):
            step(p)
        graph = SimpleNamespace(replay=lambda: step(0))
        return SimpleNamespace(graph=graph, layers=num_sets, time_ns=lambda: 1000.0 * next(ticks))

    def interleave(arms, rounds, regime):
        assert regime == "burst"
        return SimpleNamespace(samples_ns=tuple((1e6 * (i + 1),) * 2 * rounds for i in range(len(arms))))

    for module in (profile, profile_parts):
        monkeypatch.setattr(module, "capture", capture)
        monkeypatch.setattr(module, "interleave", interleave)


def refused(layout):
    if layout.slices[0].mechanism == "green_context":
        raise PartitionError("no green contexts here")
    return [Mock() for _ in layout.slices]


def test_a_load_is_measured_under_every_way_that_fits_with_the_bits_of_the_definition(here, monkeypatch):
    monkeypatch.setattr(design, "SHAPES", {"t": (16, 16, 4, 2)})
    for name, value in (("TILES", ("16x32", "32x32")), ("SHARING", ("16x32", "32x32")), ("GRIDS", (2, 99))):
        monkeypatch.setattr(profile, name, value)
    monkeypatch.setattr(profile, "FIRST_SMS", (4,))
    load = Load(shape="t", tokens=24, skew="zipf")
    spec = replace(load.spec, dtype="fp32")
    setup = Setup(device=DEVICE, model=spec, variants=TILES)
    sets = [random_weights(spec, "cpu", seed) for seed in range(2)]
    batch = Batch(spec=spec, x_TD=torch.randn(24, 16), logits_PTE=draw_logits(spec, 24, 2, "zipf", 0, "cpu"), sets=sets)
    rows = profile.measure_load(load, batch, setup, refused, 3)
    by_status = {status: [row for row in rows if row["status"] == status] for status in ("ok", "refused", "wrong bits")}
    assert not by_status["wrong bits"]
    assert any(row["arm"].startswith("together") for row in by_status["ok"])
    assert any("no green contexts here" in row["reason"] for row in by_status["refused"])
    assert all(row["us_q50"] > 0 and row["samples"] == 6 for row in by_status["ok"])
    for row in rows:
        counts_PE = np.array(row["counts"]).reshape(2, 4)
        assert (counts_PE.sum(axis=1) == 48).all()
        assert len(json.loads(row["slices"])) == len(row["bounds"]) + 1
    monkeypatch.setattr("expertslice.experiments.calibrate.load_variants", lambda: TILES)
    assert measured_of(by_status["ok"][0]).predicted_ns(DEVICE) > 0
    ids = reference.route(batch.logits_PTE[0], RouterSpec.of(spec))[0]
    assert np.bincount(ids.flatten(), minlength=4).tolist() == rows[0]["counts"][:4]


def test_bandwidth_and_neighbours_are_rows_with_what_they_moved(here, monkeypatch):
    launched = []
    monkeypatch.setattr(
        profile_parts,
        "other",
        lambda _: SimpleNamespace(launch=lambda layer, place, sms: launched.append((place, sms))),
    )
    device = load_device("h100-sxm5-80gb")
    rows = profile_parts.bandwidth(device, 2)
    assert {(row["work"], row["sms"]) for row in rows} == {
        (w, n) for w in ("read", "multiply") for n in profile_parts.SMS
    }
    assert {place for place, _ in launched} == {profile_parts.READS, profile_parts.MULTIPLIES}
    assert all(row["per_s"] > 0 for row in rows)
    launched.clear()
    wide = []
    rows = profile_parts.neighbours(device, lambda layout: wide.append(layout) or [Mock(), Mock()], 2)
    assert {tuple(one.sm_count for one in layout.slices) for layout in wide} == {
        (n, 128 - n) for n in profile_parts.APART_SMS
    }
    assert (0, 132) in launched
    assert {row["arm"] for row in rows} >= {"same SMs", "apart 16+112", "read alone 16", "multiply alone 112"}


def test_costs_name_what_cost_models_need(here, monkeypatch):
    monkeypatch.setattr(profile_parts, "REPEATS", 2)
    zeros = torch.zeros

    def on_host(*shape, device=None, pin_memory=None, dtype=None):
        return zeros(*shape, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", on_host)

    class Event:
        def __init__(self, **_):
            pass

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, _):
            return 0.01

    monkeypatch.setattr(torch.cuda, "Event", Event)
    rows = profile_parts.costs(lambda layout: [Mock() for _ in layout.slices])
    assert {row["arm"] for row in rows} >= {
        "graph node", "32 nodes on 4 branches", "kernel launch, host", "graph launch, host", "upload, waited for",
        "green context creation", "change of layout, both replays", "same layout twice, both replays",
    }  # fmt: skip
    assert all(row["us_q50"] >= 0 for row in rows)


def test_power_is_measured_on_half_and_on_all_sms(here, monkeypatch):
    monkeypatch.setattr(profile_parts, "other", lambda _: SimpleNamespace(launch=lambda *_: None))
    energy = SimpleNamespace(
        power_w=500.0, idle_w=100.0, sm_clock_mhz=1700.0, duration_ns=2_000_000_000, steps=1000, energy_uj=10**9,
        throttle_reasons=("sw_power_cap",),
    )  # fmt: skip
    meter = SimpleNamespace(idle=lambda: SimpleNamespace(power_w=100.0), measure=lambda *_, **__: energy)
    rows = profile_parts.power(load_device("h100-sxm5-80gb"), meter)
    assert [row["arm"] for row in rows] == [
        "idle",
        *(f"{w} {n}" for w in ("read", "multiply", "both") for n in (66, 132)),
    ]
    assert rows[1]["sustained_us"] == 2000.0


def test_all_tiles_and_routings_of_a_profile_are_compiled_ahead(monkeypatch):
    asked = []
    monkeypatch.setattr(profile, "precompile_launches", asked.extend)
    device = load_device("h100-sxm5-80gb")
    profile.compile_ahead(Setup(device=device, model=next(design.loads()).spec, variants=load_variants(90)))
    tiles = {(launch.slices[0].up.block_m, launch.slices[0].up.block_n) for _, _, launch in asked}
    assert tiles == {(one.block_m, one.block_n) for one in load_variants(90)}
    loads = list(design.loads())
    assert {(spec.num_experts, tokens) for spec, tokens, _ in asked} >= {
        (load.spec.num_experts, load.tokens) for load in loads
    }


def test_one_slice_runs_where_the_step_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", Mock)
    one, two = (SliceLayout(slices=tuple(uniform_slice("shared", 4, "16x32") for _ in range(n))) for n in (1, 2))
    assert profile.Streams()(one) == [None]
    assert len(profile.Streams()(two)) == 2
