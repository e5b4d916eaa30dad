"""`expertslice bench` without a GPU: the arms compute one layer, and every arm becomes a row whatever happens to it."""

import contextlib
import itertools
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from expertslice.experiments import bench, bench_contenders, bench_measure, bench_peers, bench_plots, bench_rows
from expertslice.experiments.bench_arms import Batch, draw_logits
from expertslice.experiments.bench_contenders import ARMS, Contender
from expertslice.experiments.bench_hf import AbsentError
from expertslice.experiments.bench_peers import PEERS
from expertslice.experiments.bench_rows import Point
from expertslice.experiments.cli import run
from expertslice.policies.data import load_device
from expertslice.runtime.meter import MeterError, Snapshot
from expertslice.runtime.timer import Captured, Ratio, Timed
from expertslice.traces.schema import MoeSpec

torch = pytest.importorskip("torch")

H100 = "NVIDIA H100 80GB HBM3"
SPEC = MoeSpec(name="t", num_layers=1, num_experts=8, top_k=2, d_model=64, d_ff=(32,), kind="swiglu")
POINT = Point(model="small", kind="swiglu", skew="zipf", tokens=32)
RUN_HERE = ("sequential", "sequential_graph", "torch_grouped", "torch_grouped_graph")


def batch_on_cpu(spec=SPEC, num_tokens=33, num_sets=2):
    from expertslice.kernels.weights import random_weights

    x_TD = draw_logits(spec, num_tokens, spec.d_model // spec.num_experts, "uniform", 4, "cpu").movedim(0, 1)
    return Batch(
        spec=spec,
        x_TD=x_TD.flatten(1).bfloat16(),
        logits_PTE=draw_logits(spec, num_tokens, num_sets, "zipf", 3, "cpu"),
        sets=[random_weights(spec, "cpu", seed) for seed in range(num_sets)],
    )


class Graph:
    """A graph on a device that takes so long for a replay, and counts them."""

    def __init__(self, step, layer_ns):
        self.step, self.layer_ns, self.replays = step, layer_ns, 0

    def replay(self):
        self.replays += 1


class Arm(Captured):
    """A captured arm whose clock is a formula."""

    def time_ns(self):
        self.graph.replay()
        return getattr(self.graph, "layer_ns", 9e6)


class Meter:
    """A meter of a device whose every step takes 2 mJ."""

    nvml = SimpleNamespace(nvmlSystemGetDriverVersion=lambda: "1.2")
    broken = False

    def __init__(self, _=0):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def snapshot(self):
        return Snapshot(power_w=100.0, limit_w=700.0, sm_clock_mhz=1980, temperature_c=40, throttle_reasons=())

    def idle(self):
        return "idle"

    def measure(self, step, *, idle, warm_up_s):
        if self.broken:
            raise MeterError("the counter stands still; measure elsewhere")
        step()
        names = ("power_w", "idle_w", "sm_clock_mhz", "temperature_c", "times_starved")
        return SimpleNamespace(
            energy_per_step_uj=2000.0, step_ns=64_000.0, throttle_reasons=("sw_power_cap",), **dict.fromkeys(names, 5)
        )


@pytest.fixture
def device(monkeypatch):
    """Stand for an H100: layers run on the CPU, times are formulas, and a point takes 100 s."""

    def capture(step, num_sets):
        step(0)
        return Arm(graph=Graph(step, 20e3), step=step, layers=num_sets)

    def interleave(arms, rounds, regime):
        samples = [[arm.graph.layer_ns * (1 + i / 1000) for i in range(2 * rounds)] for arm in arms]
        return Timed(regime=regime, load_s=None, samples_ns=tuple(map(tuple, samples)))

    def ours(batch):
        return Contender(step=ARMS["sequential"](batch).step, about={"launch": "tile", "launch_source": "tuned"})

    def cold_batches(points, seconds):
        for point in itertools.islice(points, int(seconds // 100)):
            yield point, batch_on_cpu(replace(SPEC, kind=point.kind))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: H100)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**12, 10**12))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for name in ("ours", "ours_modelled", "ours_paper"):
        monkeypatch.setitem(ARMS, name, ours)
    monkeypatch.setattr(bench_measure, "capture", capture)
    monkeypatch.setattr(bench_measure, "interleave", interleave)
    monkeypatch.setattr(bench_measure, "Captured", Arm)
    monkeypatch.setattr(bench_measure.time, "sleep", lambda _: None)
    monkeypatch.setattr(bench_measure.alone, "__kwdefaults__", {"sleep": lambda _: None})
    monkeypatch.setattr(bench, "EnergyMeter", Meter)
    monkeypatch.setattr(bench, "cold_batches", cold_batches)
    monkeypatch.setattr(bench, "precompile_searched", lambda points, course: None)
    return SimpleNamespace(ours=ours)


def course(**changes):
    settings = {
        "arms": ("ours", *RUN_HERE, *PEERS), "regimes": ("burst",), "rounds": 6, "energy": False,
        "device": load_device("h100-sxm5-80gb"),
    }  # fmt: skip
    return bench_measure.Course(**(settings | changes))


def by_arm(rows, regime="burst"):
    return {row["arm"]: row for row in rows if row["regime"] == regime}


@pytest.mark.parametrize("kind", ["swiglu", "relu3", "gelu2"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_the_arms_compute_the_layer(kind, renormalise):
    batch = batch_on_cpu(replace(SPEC, kind=kind, renormalise=renormalise))
    expected = bench_measure._expected(batch)
    assert set(expected) == {0, 1}
    for name in RUN_HERE:
        found = bench_measure.agreement(ARMS[name](batch), expected)
        assert found["status"] == "ok", (name, found)
        assert found["same_bits"] or not name.startswith("sequential")


@pytest.mark.parametrize("spread", [None, bench_contenders.one_by_one])
def test_graphs_of_experts_replay_on_rows_copied_in(spread, monkeypatch):
    from expertslice.kernels import reference

    captured = []

    class Expert:
        """Redoes what the last capture did, into the tensor that it returned."""

        def __init__(self):
            captured.append(self)

        def replay(self):
            self.out.copy_(real(*self.arguments))

    @contextlib.contextmanager
    def graph(held, *, pool, stream):
        # Graphs that run at once share no memory, and keep to the stream that they were captured on.
        assert (pool, stream) == (("pool", None) if spread is None else (None, "stream"))
        yield
        held.arguments, held.out = calls[-1]

    def expert(*arguments):
        calls.append((arguments, real(*arguments)))
        return calls[-1][1]

    calls, real = [], reference.expert
    monkeypatch.setattr(reference, "expert", expert)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Expert)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    batch = batch_on_cpu(num_tokens=120)
    contender = bench_contenders.expert_graphs(batch, spread)
    expected, graphs = bench_measure._expected(batch), len(captured)
    assert 0 < graphs < 2 * SPEC.num_experts
    assert {len(one.arguments[0]) for one in captured} <= {32, 64, 128}
    assert bench_measure.agreement(contender, expected)["status"] == "ok"
    assert len(captured) == graphs
    assert not contender.in_graph


def test_the_compiled_arm_is_one_graph(monkeypatch):
    compile_it = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_it(f, backend="eager", **options))
    batch = batch_on_cpu()
    found = bench_measure.agreement(ARMS["torch_grouped_compiled"](batch), bench_measure._expected(batch))
    assert found["status"] == "ok"


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("name", ["hf_eager", "hf_grouped_mm", "hf_batched_mm"])
def test_the_experts_of_hugging_face_compute_the_layer_on_our_weights(name, renormalise, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**9))
    batch = batch_on_cpu(replace(SPEC, renormalise=renormalise))
    contender = ARMS[name](batch)
    assert bench_measure.agreement(contender, bench_measure._expected(batch))["status"] == "ok"
    assert contender.in_graph == (name != "hf_eager")


class Experts(torch.nn.Module):
    """Stands for the experts of transformers, with their layout and call."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gate_up_proj = self.down_proj = None

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for (t, k), e in zip(itertools.product(*map(range, top_k_index.shape)), top_k_index.flatten(), strict=True):
            gate, up = (self.gate_up_proj[e] @ hidden_states[t]).chunk(2)
            out[t] += top_k_weights[t, k] * (self.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
        return out


@pytest.fixture
def transformers(monkeypatch):
    """Put a module in the place of transformers; return what it was asked for."""
    asked = []

    def model(config):
        block = SimpleNamespace(mlp=SimpleNamespace(experts=Experts(config)))
        return SimpleNamespace(layers=[block], set_experts_implementation=asked.append)

    module = SimpleNamespace(Qwen3MoeConfig=SimpleNamespace, Qwen3MoeModel=model)
    monkeypatch.setitem(sys.modules, "transformers", module)
    return asked


def test_hugging_face_is_given_our_weights_and_the_implementation(transformers):
    batch = batch_on_cpu()
    contender = ARMS["hf_grouped_mm"](batch)
    assert transformers == ["grouped_mm"]
    assert bench_measure.agreement(contender, bench_measure._expected(batch))["status"] == "ok"


def test_what_hugging_face_cannot_do_is_said(monkeypatch):
    with pytest.raises(AbsentError, match="of kind relu3"):
        ARMS["hf_eager"](batch_on_cpu(replace(SPEC, kind="relu3")))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**5, 10**6))
    with pytest.raises(AbsentError, match="batched_mm copies an expert for every row"):
        ARMS["hf_batched_mm"](batch_on_cpu())
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AbsentError, match=r"install expertslice\[hf\]"):
        ARMS["hf_eager"](batch_on_cpu())


def test_every_arm_is_a_row_whatever_happens(device, monkeypatch):
    def breaks(batch):
        raise RuntimeError("\n CUDA error: out of luck\nand a page of advice")

    def half_right(batch):
        step = ARMS["sequential"](batch).step
        return Contender(step=lambda p: step(p) if p == 0 else step(p) * float("nan"))

    monkeypatch.setitem(ARMS, "torch_grouped_graph", breaks)
    monkeypatch.setitem(ARMS, "sequential_graph", half_right)
    monkeypatch.setitem(sys.modules, "transformers", None)
    arms = ("ours", *RUN_HERE, "hf_eager", *PEERS)
    rows = by_arm(bench_measure.measure(POINT, batch_on_cpu(), course(arms=arms), Meter(), None))
    assert list(rows) == [*arms]
    assert rows["torch_grouped_graph"]["reason"] == "RuntimeError: CUDA error: out of luck"
    assert rows["sequential_graph"]["status"] == "wrong"
    assert "us_q50" not in rows["sequential_graph"]
    assert rows["hf_eager"]["status"] == rows["vllm"]["status"] == "absent"
    assert "timed together" in rows["vllm"]["reason"]
    assert rows["ours"]["status"] == "ok"


def test_graphs_are_timed_in_turn_and_what_the_host_launches_alone(device, monkeypatch):
    def slow(step, num_sets):
        return Arm(graph=Graph(step, 20e6), step=step, layers=num_sets)

    batch = batch_on_cpu()
    rows = by_arm(bench_measure.measure(POINT, batch, course(), Meter(), None))
    assert {name: row["timed"] for name, row in rows.items() if "timed" in row} == {
        "ours": "in turn", "sequential_graph": "in turn", "torch_grouped_graph": "in turn", "sequential": "alone",
        "torch_grouped": "alone",
    }  # fmt: skip
    assert rows["torch_grouped_graph"]["over_ours_low"] == pytest.approx(1)
    assert rows["torch_grouped"]["over_ours"] == pytest.approx(9e6 / 20e3, rel=0.01)
    assert "over_ours_low" not in rows["torch_grouped"]
    assert rows["ours"]["of_floor"] == pytest.approx(rows["ours"]["floor_us"] / rows["ours"]["us_q50"])
    monkeypatch.setattr(bench_measure, "capture", slow)
    rows = by_arm(bench_measure.measure(POINT, batch, course(), Meter(), None))
    assert rows["ours"]["timed"] == "alone"


def test_the_host_goes_through_all_weight_sets():
    seen = []
    arm = bench_measure._captured(Contender(step=seen.append, in_graph=False), 3)
    for _ in range(7):
        arm.graph.replay()
    assert seen == [0, 1, 2, 0, 1, 2, 0]
    assert arm.layers == 1


def test_energy_is_that_of_sustained_load_and_of_a_token(device, monkeypatch):
    both = course(regimes=("burst", "sustained"), energy=True)
    rows = bench_measure.measure(POINT, batch_on_cpu(), both, Meter(), "idle")
    assert set(by_arm(rows, "sustained")) == set(both.arms) - set(PEERS)
    assert by_arm(rows, "sustained")["ours"]["energy_per_token_uj"] == 2000 / (2 * 32)
    assert by_arm(rows, "sustained")["ours"]["energy_us"] == 32
    assert by_arm(rows, "sustained")["sequential"]["energy_per_token_uj"] == 2000 / 32
    assert "energy_us" not in by_arm(rows)["ours"]
    monkeypatch.setattr(Meter, "broken", True)
    row = by_arm(bench_measure.measure(POINT, batch_on_cpu(), both, Meter(), "idle"), "sustained")["ours"]
    assert "energy_per_token_uj" not in row
    assert row["energy_reason"].startswith("the counter stands still")


def test_the_bridge_goes_over_torchs_grouped_product():
    about, records = bench_peers.records()
    assert len(records) == 54
    assert all(min(row[name] for name in about["columns"][3:]) > 0 for row in records.values())
    record = records["small", "zipf", 32]
    rows = bench_peers.bridged(PEERS, POINT, H100, Ratio(median=4.0, low=3.9, high=4.1, rounds=12))
    assert [row["arm"] for row in rows] == list(PEERS)
    assert rows[0]["over_ours"] == pytest.approx(record["vllm_us"] / record["torch_grouped_us"] * 4)
    assert rows[0]["over_ours_low"] < rows[0]["over_ours"] < rows[0]["over_ours_high"]
    ratio = Ratio(median=4.0, low=3.9, high=4.1, rounds=12)
    for point, gpu, reason in (
        (replace(POINT, tokens=33), H100, "no record of this load"),
        (replace(POINT, kind="relu3"), H100, "no record of this load"),
        (POINT, "NVIDIA H200", "its records are of"),
    ):
        assert {reason in row["reason"] for row in bench_peers.bridged(PEERS, point, gpu, ratio)} == {True}


def test_the_command_leaves_rows_a_manifest_and_figures(device, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    out, given = tmp_path / "out", ["--kind", "swiglu", "--rounds", "6", "--tokens", "1,32", "--seconds", "380"]
    assert run(["bench", "small", "medium", *given, "--out", str(out), "--commit", "abc"]) == 0
    assert "torch_grouped_graph" in capsys.readouterr().out
    held = pq.read_table(out / "rows.parquet").to_pylist()
    assert {(row["model"], row["tokens"], row["skew"]) for row in held} == {
        ("small", 1, "uniform"), ("small", 1, "zipf"), ("small", 32, "uniform"),
    }  # fmt: skip
    assert len(held) == 3 * (len(ARMS) + len(PEERS))
    assert {row["status"] for row in held} == {"ok", "absent", "bridged"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["commit"], manifest["device"], manifest["driver"]) == ("abc", H100, "1.2")
    assert manifest["command"].startswith("expertslice")
    figures = [out / f"{name}.{kind}" for name in ("roofline", "ratios") for kind in ("svg", "png")]
    assert all(path.stat().st_size > 1000 for path in figures)

    before = [path.read_bytes() for path in figures]
    assert run(["bench", "--plot", str(out)]) == 0
    assert [path.read_bytes() for path in figures] == before


def test_a_run_goes_on_where_another_ended(device, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_plots, "draw", lambda folder: [])
    common = ["bench", "small", "--arms", "ours,vllm", "--tokens", "1,32", "--out", str(tmp_path)]
    assert run([*common, "--seconds", "380"]) == 0
    held = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert run(common) == 2
    assert "holds rows already; go on with --resume" in capsys.readouterr().err
    assert run([*common, "--resume", str(tmp_path / "rows.jsonl"), "--seconds", "900"]) == 0
    again = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert (again[: len(held)], len(held), len(again)) == (held, 3 * 2, 4 * 2)


def test_rows_stay_until_their_point_is_measured_again(device, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_plots, "draw", lambda folder: [])
    path = tmp_path / "rows.jsonl"
    common = ["bench", "small", "--tokens", "1,32", "--skew", "zipf", "--out", str(tmp_path)]
    assert run([*common, "--arms", "sequential", "--seconds", "900"]) == 0
    before = bench.read_rows(path)
    # Time for one of two points, now with another arm.
    more = ["--arms", "sequential,torch_grouped", "--resume", str(path), "--seconds", "150"]
    assert run([*common, *more]) == 0
    after = bench.read_rows(path)
    assert [row for row in after if row["tokens"] == 32] == [row for row in before if row["tokens"] == 32]
    assert [row["arm"] for row in after if row["tokens"] == 1] == ["sequential", "torch_grouped"]


def test_rows_of_another_machine_are_not_gone_on_with(device, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_plots, "draw", lambda folder: [])
    command = ["bench", "small", "--arms", "sequential", "--tokens", "1", "--out", str(tmp_path)]
    assert run(command) == 0
    path, held = tmp_path / "manifest.json", (tmp_path / "rows.jsonl").read_text()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"driver": "0.9"}))
    assert run([*command, "--tokens", "1,32", "--resume", str(tmp_path / "rows.jsonl")]) == 2
    assert "holds rows of driver '0.9', this is '1.2'" in capsys.readouterr().err
    assert (tmp_path / "rows.jsonl").read_text() == held


def test_a_run_without_a_pair_still_draws_what_it_has(device, tmp_path):
    options = ["--arms", "sequential", "--rounds", "2", "--tokens", "32", "--skew", "zipf", "--out", str(tmp_path)]
    assert run(["bench", "small", *options]) == 0
    assert (tmp_path / "roofline.svg").exists()
    assert not (tmp_path / "ratios.svg").exists()


def test_points_that_lack_an_arm_are_measured_again():
    options = SimpleNamespace(arms=("ours", "sequential", "vllm"), regimes=("burst", "sustained"))
    points = [replace(POINT, tokens=n) for n in (1, 2)]
    rows = [
        {**{name: getattr(point, name) for name in ("model", "kind", "skew", "tokens")}, "arm": arm, "regime": regime}
        for point in points
        for arm, regime in itertools.product(options.arms, options.regimes)
        if arm != "vllm" or regime == "burst"
    ]
    assert bench.missing_of(points, rows, options) == []
    assert bench.missing_of(points, rows[:-1], options) == points[1:]
    assert bench.missing_of(points, [], options) == points


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["small", "--tokens", "32,many"], "--tokens is '32,many'; give numbers from 1"),
    (["small", "--tokens", "0"], "--tokens names 0; give numbers from 1"),
    (["small", "--arms", "ours,vlm"], "vllm"),
    (["small", "--skew", "zpf"], "zipf"),
    (["small2"], "small"),
    (["small", "--energy"], "give --regime sustained or both"),
    (["deepseek-v3"], "route by softmax"),
    (["small", "--device", "h1000"], "h100-sxm5-80gb"),
    ([], "name one from `expertslice models`"),
    (["--plot", "nowhere"], "nowhere holds no rows.parquet"),
    (["small", "--resume", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    (["small", "--seconds", "1", "--tokens", "1"], "no point was measured within --seconds"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(arguments, sentence, device, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_a_stop_says_what_is_kept(device, tmp_path, capsys, monkeypatch):
    def stop(points, seconds):
        yield next(iter(points)), batch_on_cpu()
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "cold_batches", stop)
    assert run(["bench", "small", "--arms", "ours", "--out", str(tmp_path)]) == 130
    assert f"go on with --resume {tmp_path / 'rows.jsonl'}" in capsys.readouterr().err
    assert len(bench_rows.read_rows(tmp_path / "rows.jsonl")) == 1


def test_a_device_of_which_nothing_is_known_is_refused_or_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Fake GPU")
    settings = {"arms": None, "regimes": ("burst",), "rounds": 6, "energy": False}
    with pytest.raises(ValueError, match="nothing is known of 'Fake GPU'; give --device, one of a100"):
        bench.course_of(**settings, device=None)
    assert bench.course_of(**settings, device="h100-sxm5-80gb").device == load_device("h100-sxm5-80gb")
    assert {load_device(name).name for name in bench.DEVICES.values()} == set(bench.DEVICES.values())


def test_only_shapes_without_shipped_launches_are_searched_and_compiled_ahead(monkeypatch, tmp_path):
    from expertslice.experiments import precompile as ahead

    asked = []
    monkeypatch.setattr(ahead, "precompile", asked.extend)
    tuned = tmp_path / "tuned.json"
    tuned.touch()
    monkeypatch.setattr(bench, "tuned_path", lambda spec: tuned if spec.d_model == 512 else tmp_path / "none")
    points = [replace(POINT, model=model, skew=skew) for model in ("small", "medium") for skew in ("uniform", "zipf")]
    bench.precompile_searched(points, course())
    assert [(spec.d_model, tokens) for spec, tokens in asked] == [(1024, 32)]


@pytest.mark.parametrize("second", ['{"arm":', "5", '{"model": "small"}'])
def test_rows_of_a_broken_file_are_refused(tmp_path, second):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"arm": "ours"}\n' + second)
    with pytest.raises(ValueError, match="line 2 is no row of a benchmark's arm"):
        bench_rows.read_rows(path)


def test_parquet_has_a_column_for_every_name(tmp_path):
    bench_rows.write_parquet(tmp_path / "rows.parquet", [{"a": 1}, {"a": 2, "b": 0.5}])
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == [{"a": 1, "b": None}, {"a": 2, "b": 0.5}]


def test_where_a_shape_is_tuned_the_shipped_launch_is_taken(monkeypatch):
    from expertslice.kernels import tuned

    shipped = SimpleNamespace(launch_for=lambda tokens: f"launch of {tokens}")
    monkeypatch.setattr(bench_contenders, "tuned_path", lambda spec: SimpleNamespace(exists=lambda: True))
    monkeypatch.setattr(bench_contenders, "our_step", lambda batch, launch: launch)
    monkeypatch.setattr(bench_contenders, "describe", str.upper)
    monkeypatch.setattr(tuned, "load", lambda path: shipped)
    found = bench_contenders.ours(batch_on_cpu())
    assert found.step == "launch of 33"
    assert found.about == {"launch": "LAUNCH OF 33", "launch_source": "tuned"}


def test_where_it_is_not_the_best_launch_found_is_taken_and_the_modelled_one_is_an_arm(monkeypatch, tmp_path):
    held = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: held)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(bench_contenders, "tuned_path", lambda spec: tmp_path / "none")
    monkeypatch.setattr(bench_contenders, "our_step", lambda batch, launch: launch)
    timed = []

    def clock_of(batches):
        return lambda launch: timed.append(launch) or dict.fromkeys(batches, 100.0 - len(timed))

    monkeypatch.setattr(bench_contenders, "clock_of", clock_of)
    found = bench_contenders.ours(batch_on_cpu())
    assert found.step == timed[-1]
    assert found.about["launch_source"] == "searched on this batch"
    modelled = bench_contenders.ours_modelled(batch_on_cpu())
    assert modelled.step == timed[0]
    assert modelled.about["launch_source"] == "modelled"
    paper = bench_contenders.ours_paper(batch_on_cpu())
    assert paper.about["launch_source"] == "the paper's tiles"
    assert paper.about["launch"].startswith("64x64x32")
