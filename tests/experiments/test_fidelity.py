"""Fidelity: the committed records judged again, device models on disk, and profiles without a GPU."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from expertslice.experiments import design, device_model, fidelity
from expertslice.experiments import run as runner
from expertslice.experiments.bench_rows import refuse_other_machine, write_parquet
from expertslice.experiments.calibrate import measured_of, read_profile, usable
from expertslice.experiments.cli import run
from expertslice.experiments.fidelity_records import drawn_counts_LE, of_layer
from expertslice.experiments.pair import PairOptions
from expertslice.experiments.profile import TILES, measure_groups, ways, ways_of_tiles
from expertslice.experiments.run import RunOptions
from expertslice.policies.contract import Setup, SliceLayout
from expertslice.policies.cost import CostModel
from expertslice.policies.data import load_device, load_variants
from expertslice.policies.layouts import one_slice_plan, uniform_slice
from expertslice.policies.validate import validate
from expertslice.traces.schema import MoeSpec

ROOT = Path(fidelity.__file__).resolve().parents[1]
H100 = load_device("h100-sxm5-80gb")
RUN = {
    "device": "NVIDIA H100 80GB HBM3", "driver": "580.1", "versions": {"torch": "2.11", "triton": "3.6"},
    "commit": "abc", "seeds": "none",
}  # fmt: skip
MANIFEST = {"device": RUN["device"], "runs": [RUN]}
ROOM = 0.002
"""By which an error may grow before somebody must look: numpy and scipy differ in the last digits."""


def committed(name):
    return json.loads((ROOT / "docs/results/fidelity/summary.json").read_text())[name]


def refuse_growth(now, then):
    for name in fidelity.PREDICTORS:
        assert now["errors"][name]["mape"] <= then["errors"][name]["mape"] + ROOM
        assert now["errors"][name]["p95"] <= then["errors"][name]["p95"] + 5 * ROOM
    assert now["ranking"]["calibrated"]["tau_b"] >= then["ranking"]["calibrated"]["tau_b"] - 5 * ROOM
    assert now["ranking"]["calibrated"]["same_sign"] >= then["ranking"]["calibrated"]["same_sign"] - 5 * ROOM
    assert abs(now["coverage_90"] - then["coverage_90"]) <= 5 * ROOM
    mape = {name: errors["mape"] for name, errors in now["errors"].items()}
    assert mape["calibrated"] < min(mape["physics"], mape["nearest"], mape["roofline"])


def test_no_error_on_what_is_held_out_of_the_committed_profile_has_grown():
    rows, now = fidelity.profile()
    refuse_growth(now, committed("profile"))
    for regime, errors in committed("profile")["by_regime"].items():
        assert now["by_regime"][regime]["mape"] <= errors["mape"] + ROOM
    held = set(design.DESIGN["held_out"]["shapes"]) | set(design.DESIGN["held_out"]["later_shapes"])
    assert held <= {row["model"] for row in rows}
    assert {row["regime"] for row in rows} == {"unsliced", "one share", "split", "sharing SMs"}


def test_the_committed_device_model_is_what_its_profile_gives():
    kept = device_model.load(fidelity.PROFILE / "model.json")
    rows = usable(read_profile(fidelity.PROFILE)[0])[0]
    assert kept.held_out["points"] == sum(row["held_out"] for row in rows)
    known = {tuple(np.round(point, 9)) for point in kept.truth.points}
    mine = [measured_of(row) for row in rows if not row["held_out"]]
    placed = {tuple(np.round(row.split_ns(H100, kept.truth.constants)[2], 9)) for row in mine}
    assert known <= placed
    assert len(known) < len(placed), "the belief has the rest"


@pytest.mark.slow
def test_no_error_on_the_committed_layers_has_grown():
    rows, now = fidelity.layers()
    refuse_growth(now, committed("layers"))
    for name, errors in now["kernels"].items():
        assert errors["mape"] <= committed("layers")["kernels"][name]["mape"] + ROOM
    assert all(row["calibrated_ns"] >= 0.98 * row["roofline_ns"] for row in rows)
    models = {row["model"] for row in rows}
    assert models == set(design.FOLDS[0]) | set(design.FOLDS[1])
    assert not set(design.FOLDS[0]) & set(design.FOLDS[1])


def test_what_is_held_out_is_the_committed_draw_of_its_seed():
    committed = json.loads(design.PATH.read_text())
    assert committed == design.drawn(design.SEED)
    held = [load for load in design.loads() if load.held_out]
    assert 0 < len(held) < len(list(design.loads()))


def test_counts_are_drawn_once_for_all_and_hold_every_row():
    row = {"model": "olmoe-1b-7b", "kind": "swiglu", "tokens": 64, "skew": "zipf"}
    measured = of_layer(row, "16x64x128w4s4@264 64x128x64w4s6p@132 fused", 10.0)
    assert measured.flags == (1.0, 0.0, 0.0, 1.0)
    assert measured.plan.layout.slices[0].ctas_per_sm == 2
    counts_LE = drawn_counts_LE(measured.model, 64, "zipf")
    assert (counts_LE.sum(axis=1) == 64 * measured.model.top_k).all()
    assert (counts_LE == measured.counts_LE).all()


def profile_rows(factor=1.25, throttled=()):
    """Return what a profile would hold of a device whose kernels take `factor` times what physics says."""
    rows = []
    for i, load in enumerate(design.loads()):
        if load.shape not in design.SHAPES or load.tokens > 1024:
            continue
        counts_LE = drawn_counts_LE(load.spec, load.tokens, load.skew)
        setup = Setup(device=H100, model=load.spec, variants=load_variants())
        for way in ways(setup, counts_LE[0].tolist())[::3]:
            row = {
                "arm": way.name, **asdict(load), "group": "layers", "status": "ok", "throttled": i in throttled,
                "held_out": load.held_out or way.held_out, "tile_order": "expert", "us_q50": 1.0,
                "slices": json.dumps([asdict(one) for one in way.plan.layout.slices]),
                "bounds": list(way.plan.placement.bounds), "counts": counts_LE.ravel().tolist(),
            }  # fmt: skip
            fixed, busy, _ = measured_of(row).split_ns(H100)
            rows.append(row | {"us_q50": (fixed + factor * busy) / 1000})
    return rows


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    write_parquet(folder / "rows.parquet", profile_rows(throttled=(0,)))
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    return folder


@pytest.fixture(scope="module")
def model_path(profile):
    path = profile / "model.json"
    assert run(["calibrate", str(profile), "--out", str(path)]) == 0
    return path


def test_every_way_of_a_profile_is_a_legal_plan():
    for load in design.loads():
        setup = Setup(device=H100, model=load.spec, variants=load_variants())
        counts_E = drawn_counts_LE(load.spec, load.tokens, load.skew)[0].tolist()
        found, others = ways(setup, counts_E), ways_of_tiles(setup, counts_E)
        for way in (*found, *others):
            validate(way.plan, setup)
        assert len({way.name for way in (*found, *others)}) == len(found) + len(others)
        assert any(way.held_out for way in found)
        assert {one.up for way in others for one in way.plan.layout.slices} == {
            one.name for one in load_variants() if one.name not in TILES
        }


def test_a_profile_gives_a_model_that_says_how_far_off_it_is(profile, model_path, capsys):
    assert run(["calibrate", str(profile), "--out", str(model_path)]) == 0
    out = capsys.readouterr().out
    assert "under throttling and are dropped" in out
    assert "held-out error" in out
    model = device_model.load(model_path)
    assert model.held_out["mape"] < 0.05
    assert model.about["judged"] == "held-out loads of the profile"
    assert model.machine == {"device": "NVIDIA H100 80GB HBM3", "driver": "580.1", "torch": "2.11", "triton": "3.6"}
    device_model.save(model_path, model)
    assert device_model.load(model_path) == model


def test_a_model_changed_by_hand_is_refused(model_path, tmp_path, capsys):
    changed = tmp_path / "changed.json"
    changed.write_text(model_path.read_text().replace('"seed": 0', '"seed": 1'))
    assert run(["whatif", "--device-model", str(changed), "--steps", "4"]) == 2
    assert "does not match its checksum" in capsys.readouterr().err
    changed.write_text(model_path.read_text().replace(device_model.FORMAT, "expertslice.device-model/1"))
    assert run(["whatif", "--device-model", str(changed), "--steps", "4"]) == 2
    assert "is a device model of another version of this package; calibrate again" in capsys.readouterr().err
    changed.write_text("[]")
    assert run(["whatif", "--device-model", str(changed), "--steps", "4"]) == 2
    assert "is no device model" in capsys.readouterr().err


def test_another_device_driver_or_version_is_a_loud_mismatch(model_path, capsys):
    model = device_model.load(model_path)
    assert run(["whatif", "--device-model", str(model_path), "--device", "h200-sxm5-141gb", "--steps", "4"]) == 2
    assert "is of h100-sxm5-80gb and h200-sxm5-141gb is asked for" in capsys.readouterr().err
    model.check_machine(model.machine)
    for what in model.machine:
        with pytest.raises(ValueError, match=rf"was measured with {what} .* and this machine has 'other'"):
            model.check_machine({**model.machine, what: "other"})


def test_a_device_model_is_held_against_the_gpu_at_hand_by_all_that_runs_on_it(model_path, monkeypatch):
    def other(path):
        raise ValueError(f"{path.name} is of another machine")

    monkeypatch.setattr(runner, "_check_machine", other)
    for options in (RunOptions(device_model=model_path), PairOptions(device_model=model_path, policies=("static",))):
        assert runner.prepare_to_run(options, "host").world.residual is not None
        with pytest.raises(ValueError, match=r"model.json is of another machine"):
            runner.prepare_to_run(options, "gpu")


def test_a_query_far_outside_is_refused_and_says_what_to_profile(model_path):
    model = device_model.load(model_path)
    row = of_layer(
        {"model": "olmoe-1b-7b", "kind": "relu3", "tokens": 8192, "skew": "zipf"},
        "64x256x64w8s4@5 64x256x64w8s4@5",
        10.0,
    )
    few = replace(row.plan.layout.slices[0], mechanism="sm_budget", sm_count=1, num_ctas=1, ctas_per_sm=1)
    far = replace(row, plan=replace(row.plan, layout=replace(row.plan.layout, slices=(few,))))
    with pytest.raises(ValueError, match="too far; profile slices and loads like that"):
        far.predicted_ns(H100, model.truth)


def test_what_if_and_run_take_a_device_model(model_path, trace_path, config_path, tmp_path, capsys):
    common = [str(trace_path), "--model", str(config_path), "--policy", "unsliced", "--out", str(tmp_path)]
    common += ["--device-model", str(model_path)]
    assert run(["run", *common, "--steps", "3"]) == 0
    capsys.readouterr()
    code = run(["whatif", *common, "--no-report", "--steps", "8", "--jobs", "1", "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert any("device model" in note for note in json.loads(said.out)["notes"])


def test_bad_profiles_are_one_sentence(tmp_path, capsys):
    assert run(["calibrate", str(tmp_path)]) == 2
    assert "holds no rows.parquet and manifest.json" in capsys.readouterr().err
    write_parquet(tmp_path / "rows.parquet", profile_rows()[:5])
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    assert run(["calibrate", str(tmp_path)]) == 2
    assert "calibration takes 40 of 6 or more" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text(json.dumps({**MANIFEST, "device": "Abacus"}))
    assert run(["calibrate", str(tmp_path)]) == 2
    assert "nothing is known of 'Abacus'" in capsys.readouterr().err


def meter_of(*reasons):
    return SimpleNamespace(snapshot=lambda: SimpleNamespace(throttle_reasons=reasons))


def test_a_profile_goes_on_with_what_is_missing_and_flags_throttling(tmp_path):
    calls = []

    def groups(*names):
        return ((name, lambda name=name: calls.append(name) or [{"arm": "a", "status": "ok"}]) for name in names)

    measure_groups(tmp_path, groups("costs", "layers a"), meter_of("gpu_idle"), 60, None, lambda _: None)
    measure_groups(tmp_path, groups("costs", "layers a", "power"), meter_of("hw_slowdown"), 60, None, lambda _: None)
    assert calls == ["costs", "layers a", "power"]
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [(row["group"], row["part"], row["throttled"]) for row in rows] == [
        ("costs", "costs", False), ("layers", "layers a", False), ("power", "power", True),
    ]  # fmt: skip
    refuse_other_machine(tmp_path, RUN)
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    refuse_other_machine(tmp_path, RUN)
    with pytest.raises(ValueError, match=r"holds rows of driver '580.1', this is '590'; give another --out"):
        refuse_other_machine(tmp_path, {**RUN, "driver": "590"})


def test_the_ranking_of_launches_counts_only_what_hardware_separates():
    rows = [{"cell": "a", "source": "s", "measured_ns": ns, "p": p} for ns, p in ((100, 1.0), (100.5, 3.0), (150, 2.0))]
    found = fidelity.ranking(rows, "p")
    assert found["pairs"] == 2
    assert found["same_sign"] == 0.5
    assert found["regret_mean"] == 0
    assert math.isclose(found["tau_b"], 1 / 3)


REFERENCE = ROOT.parent / "shared" / "reference" / "kernel_db"


@pytest.mark.slow
@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the public kernel times lie in ../shared/reference")
def test_the_ratio_of_two_devices_on_public_kernels():

    key = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    times = {}
    for device in ("a100", "h100"):
        (path,) = REFERENCE.glob(f"{device}_sxm__moe__vllm__0.14.0__*.parquet")
        rows = pq.read_table(path).to_pylist()
        times[device] = {
            (*(row[k] for k in key), row["distribution"]): row["latency"]
            for row in rows
            if row["moe_dtype"] == "bfloat16" and row["moe_ep_size"] == 1 and row["kernel_source"] == "vllm_fused_moe"
        }
    shared = sorted(set(times["a100"]) & set(times["h100"]))[::7]
    assert len(shared) >= 50
    off = []
    for tokens, d_model, width, top_k, num_experts, parts, _, how in shared:
        spec = MoeSpec(
            name="k", num_layers=1, num_experts=num_experts, top_k=top_k, d_model=d_model, d_ff=(width // parts,)
        )
        modelled = {}
        counts = drawn_counts_LE(spec, tokens, "zipf")
        for device, facts in (("a100", load_device("a100-sxm4-80gb")), ("h100", H100)):
            variants = load_variants(facts.compute_capability)
            best = min(
                CostModel(device=facts, model=spec, variants=variants).step_ns(
                    one_slice_plan(SliceLayout(slices=(uniform_slice("shared", facts.sm_count, v.name),))), counts
                )
                for v in variants
            )
            modelled[device] = best
        measured = times["a100"][*(tokens, d_model, width, top_k, num_experts, parts, 1), how]
        measured /= times["h100"][*(tokens, d_model, width, top_k, num_experts, parts, 1), how]
        off.append(modelled["a100"] / modelled["h100"] / measured - 1)
    assert np.median(np.abs(off)) <= 0.10
