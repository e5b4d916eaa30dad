"""`expertslice reproduce` without a GPU: arms compute one layer, targets resume, and every row is kept."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from expertslice.experiments import bench_measure, reproduce, reproduce_arms, reproduce_probes, reproduce_tokens
from expertslice.experiments.bench_arms import Batch, draw_logits
from expertslice.experiments.bench_rows import Point
from expertslice.experiments.cli import run
from expertslice.experiments.reproduce import TARGETS, Task, missing_of, tasks_of
from expertslice.experiments.reproduce_arms import FACTORS, FASTMOE, TABLE, TUTEL, cells, impossible
from expertslice.policies.data import load_device
from expertslice.runtime.meter import MeterError, Snapshot
from expertslice.runtime.timer import Captured, Timed
from expertslice.traces.schema import MoeSpec

torch = pytest.importorskip("torch")

H100 = "NVIDIA H100 80GB HBM3"
SPEC = MoeSpec(name="t", num_layers=1, num_experts=4, top_k=2, d_model=32, d_ff=(48,), kind="relu3")
POINT = Point(model="small", kind="relu3", skew="uniform", tokens=256)


def batch_on_cpu(spec=SPEC, num_tokens=21, num_sets=2):
    from expertslice.kernels.spec import TORCH_DTYPE
    from expertslice.kernels.weights import random_weights

    generator = torch.Generator().manual_seed(4)
    return Batch(
        spec=spec,
        x_TD=torch.randn(num_tokens, spec.d_model, generator=generator).to(TORCH_DTYPE[spec.dtype]),
        logits_PTE=draw_logits(spec, num_tokens, num_sets, "zipf", 3, "cpu"),
        sets=[random_weights(spec, "cpu", seed) for seed in range(num_sets)],
    )


@pytest.fixture
def host(monkeypatch):
    """Stand for a device of 16 SMs whose streams run one after another."""
    ran = []

    def beside(parts, streams):
        def step(p):
            assert len(parts) == len(streams)
            for part, stream in zip(parts, streams, strict=True):
                ran.append(stream)
                part(p)

        return step

    monkeypatch.setattr(reproduce_arms, "beside", beside)
    monkeypatch.setattr(reproduce_arms, "sm_count", lambda: 16)
    monkeypatch.setattr(reproduce_arms, "pool", lambda: tuple(range(reproduce_arms.NUM_STREAMS)))
    monkeypatch.setattr(reproduce_arms, "splits", lambda: lambda *sms: tuple(f"{n} SMs" for n in sms))
    return ran


def right(name, batch):
    return bench_measure.agreement(TABLE[name](batch), bench_measure._expected(batch))


@pytest.mark.parametrize("kind", ["relu3", "swiglu", "gelu2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", [FASTMOE, TUTEL])
def test_stand_ins_compute_the_layer(host, name, kind, dtype):
    found = right(name, batch_on_cpu(replace(SPEC, kind=kind, dtype=dtype, renormalise=kind != "gelu2")))
    assert found["status"] == "ok", found
    assert not TABLE[name](batch_on_cpu()).in_graph


def test_the_stand_in_for_fastmoe_spreads_experts_over_the_pool(host):
    TABLE[FASTMOE](batch_on_cpu()).step(0)
    assert host == list(range(reproduce_arms.NUM_STREAMS))


def test_every_combination_is_an_arm_or_has_a_reason():
    for cell in itertools.product(*FACTORS.values()):
        assert ("/".join(cell) in cells()) == (impossible(*cell) is None)
    assert len(cells()) == 25
    assert set(cells()) < set(TABLE)


@pytest.mark.parametrize("name", [
    "loop/eager/none/many", "loop/layer/none/many", "loop/eager/SMs/many", "loop/layer/SMs/many",
    "paper/eager/tiles/one", "paper/layer/SMs/many", "ours/layer/tiles/many", "ours/eager/SMs/many",
])  # fmt: skip
def test_cells_compute_the_layer(host, name):
    # Triton's interpreter computes bf16 wrongly, and its programs run one after another.
    batch = batch_on_cpu(replace(SPEC, dtype="fp32"), num_sets=1)
    found = right(name, batch)
    assert found["status"] == "ok", found
    assert TABLE[name](batch).in_graph == (name.split("/")[1] == "layer")
    if "SMs" in name:
        assert {*host} == {"8 SMs"}
    elif name.endswith("many"):
        assert {*host} <= set(range(reproduce_arms.NUM_STREAMS))
    else:
        assert not host


def test_hot_experts_get_sms_by_their_share_of_rows(monkeypatch):
    monkeypatch.setattr(reproduce_arms, "sm_count", lambda: 132)
    batch = batch_on_cpu(num_tokens=64)
    one_hot = replace(batch, logits_PTE=torch.tensor([9.0, 8.0, 0.0, 0.0]).expand(2, 64, 4))
    bound, sms = reproduce_arms.hot_share(one_hot)
    # All rows are those of hot experts: the others are left a group.
    assert (bound, sms) == (32, 120)
    assert 8 <= reproduce_arms.hot_share(batch)[1] <= 120


def test_parts_of_a_layer_add_up_to_it(monkeypatch):
    from expertslice.kernels import reference
    from expertslice.kernels.spec import RouterSpec
    from expertslice.kernels.workspace import Workspace

    batch, held = batch_on_cpu(replace(SPEC, dtype="fp32"), num_sets=1), []
    allocate = Workspace.allocate
    monkeypatch.setattr(Workspace, "allocate", lambda *a: held.append(allocate(*a)) or held[-1])
    steps = reproduce_arms.parts_of(batch)
    expected = reference.layer(batch.x_TD, batch.logits_PTE[0], batch.sets[0], RouterSpec.of(batch.spec))
    for name in ("ours routing and experts", "ours aggregation", "loop routing", "loop experts"):
        steps[name](0)
    torch.testing.assert_close(held[0].out_TD, expected)
    torch.testing.assert_close(steps["loop aggregation"](0), expected)


def test_our_model_writes_the_same_under_every_policy(monkeypatch):
    from expertslice.experiments.own_model.model import ModelConfig

    monkeypatch.setattr(reproduce_tokens, "NUM_NEW", 2)
    monkeypatch.setattr(reproduce_tokens, "PROMPT_LEN", 5)
    cfg = ModelConfig(num_layers=2, num_experts=4, top_k=2, d_model=32, d_ff=16, num_heads=2)
    rows = reproduce_tokens.generations("h100-sxm5-80gb", where="cpu", how="reference", cfg=cfg)
    assert {row["arm"] for row in rows} > {"definition", "ours", "ours, hot_cold", "ours, static"}
    assert all(row["same_loss"] and row["same_tokens"] for row in rows)
    assert not any(row.get("policy_errors") for row in rows)


class Meter:
    """A meter of a device whose every step takes 2 mJ and 100 us."""

    nvml = SimpleNamespace(
        nvmlSystemGetDriverVersion=lambda: "1.2", NVML_CLOCK_MEM=2, nvmlDeviceGetMaxClockInfo=lambda *_: 2500,
        nvmlDeviceGetMemoryBusWidth=lambda _: 4000,
    )  # fmt: skip
    handle = None
    broken = False

    def __init__(self, _=0):
        pass

    def __enter__(self):
        if self.broken:
            raise MeterError("nothing can be read; measure elsewhere")
        return self

    def __exit__(self, *_):
        pass

    def snapshot(self):
        return Snapshot(power_w=100.0, limit_w=700.0, sm_clock_mhz=1980, temperature_c=40, throttle_reasons=())

    def idle(self):
        return "idle"

    def measure(self, step, *, idle, warm_up_s):
        step()
        names = ("power_w", "idle_w", "sm_clock_mhz", "temperature_c", "times_starved")
        return SimpleNamespace(
            energy_per_step_uj=2000.0, step_ns=100_000.0, throttle_reasons=(), **dict.fromkeys(names, 5)
        )


class Used:
    """Counters of a device half of whose bandwidth is used."""

    reason = None

    def __init__(self, meter):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self):
        return {"SMs": 0.9, "occupancy": 0.2, "tensor units": 0.1, "DRAM": 0.5}


def bench_of(meter):
    return reproduce_probes.Bench(device=load_device("h100-sxm5-80gb"), meter=meter, idle="idle")


@pytest.fixture
def clocks(host, monkeypatch):
    """Stand for captures, clocks and counters: arm i takes 20 (i + 1) us."""

    def capture(step, num_sets):
        return Captured(graph=SimpleNamespace(replay=lambda: step(0)), step=step, layers=1)

    monkeypatch.setattr(Captured, "time_ns", lambda self: 20e3)
    for module in (bench_measure, reproduce_probes):
        monkeypatch.setattr(module, "capture", capture)
        monkeypatch.setattr(
            module, "interleave",
            lambda arms, rounds, regime: Timed(
                regime=regime, load_s=None, samples_ns=tuple((20e3 * (i + 1),) * 2 * rounds for i in range(len(arms)))
            ),
        )  # fmt: skip
    monkeypatch.setattr(bench_measure.alone, "__kwdefaults__", {"sleep": lambda _: None})
    monkeypatch.setattr(bench_measure.time, "sleep", lambda _: None)
    monkeypatch.setattr(reproduce_probes, "EnergyMeter", Meter)
    monkeypatch.setattr(reproduce_probes, "Utilisation", Used)
    monkeypatch.setitem(TABLE, "ours", TABLE["sequential_graph"])
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: H100)


def test_under_load_an_arm_has_energy_and_what_is_busy(clocks):
    rows = {row["arm"]: row for row in reproduce_probes.load(POINT, batch_on_cpu(), bench_of(Meter()))}
    assert set(rows) == {*reproduce_probes.UNDER_LOAD, reproduce_probes.grouped_by_torch(POINT)}
    assert rows["ours"]["energy_per_token_uj"] == pytest.approx(2000 / 256)
    assert (rows["ours"]["busy_sms"], rows["ours"]["busy_dram"]) == (0.9, 0.5)
    assert rows[TUTEL]["useful_share"] == pytest.approx(rows[TUTEL]["floor_us"] / 100)


def test_bandwidth_of_experts_is_that_of_both_less_routing(clocks, monkeypatch):
    steps = dict.fromkeys(
        ("loop routing", "ours routing", "ours routing and experts", "ours aggregation"), lambda p: None
    )
    monkeypatch.setattr(reproduce_probes, "parts_of", lambda batch: steps)
    seconds = {"ours routing": 0.1, "ours routing and experts": 0.9}

    def under_load(arm, num_tokens, bench):
        name = names.pop(0)
        return {"busy_dram": seconds.get(name, 0.5), "energy_us": 10.0 if name == "ours routing" else 100.0}

    names = list(steps)
    monkeypatch.setattr(reproduce_probes, "under_load", under_load)
    batch = batch_on_cpu()
    rows = {row["arm"]: row for row in reproduce_probes.parts(POINT, batch, bench_of(Meter()))}
    peak = 2 * 2500e6 * 4000 / 8
    experts = rows["ours experts"]
    assert experts["dram_bytes"] == pytest.approx(peak * (0.9 * 100 - 0.1 * 10) * 1e-6)
    assert experts["dram_share"] == pytest.approx(89 / 90)
    least = reproduce_probes.least_bytes(batch)
    assert experts["least_share"] == pytest.approx(least["experts"] / 20e-6 / peak)
    # 21 tokens' logits cannot fill the bandwidth in the time of one node.
    assert rows["ours routing"]["limit_share"] == pytest.approx(
        least["routing"] / peak / (load_device("h100-sxm5-80gb").graph_node_ns / 1e9)
    )


def test_a_capture_costs_time_and_memory(clocks, monkeypatch):
    free = iter([1000, 400])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free), 0))
    found = reproduce_probes.captured_cost(list, call_ns=1e3, weights_bytes=6000)
    assert (found["bytes"], found["of_weights"]) == (600, 0.1)
    assert found["of_calls"] == pytest.approx(found["seconds"] * 1e6)


def test_arms_are_timed_in_fp32_too(clocks):
    point = replace(POINT, dtype="fp32")
    names = ("ours", "sequential", "sequential_graph", FASTMOE, TUTEL)
    rows = reproduce_probes._in_bursts(names, point, batch_on_cpu(replace(SPEC, dtype="fp32")), bench_of(Meter()))
    assert [row["arm"] for row in rows] == [*names]
    assert all(row["status"] == "ok" and row["dtype"] == "fp32" and row["us_q50"] for row in rows)


def test_the_simulator_says_the_same_twice_and_something_of_every_device():
    rows = reproduce_probes.simulated(POINT)
    assert rows == reproduce_probes.simulated(POINT)
    by_arm = {row["arm"]: row for row in rows}
    assert by_arm["h100-sxm5-80gb"]["us_q50"] < by_arm["a100-sxm4-80gb"]["us_q50"]
    assert all(0 < row["dram_share"] <= 1 for row in rows)


@pytest.fixture
def device(monkeypatch):
    """Stand for a free H100 on which a task takes 100 s and gives two rows."""

    def cold_batches(points, seconds):
        return ((point, None) for point in itertools.islice(points, int(seconds // 100)))

    def probe(point, batch, bench):
        measured.append(point)
        return [{"arm": arm, "status": "ok", "us_q50": 5.0} for arm in ("ours", "sequential")]

    class Reading:
        def __enter__(self):
            return lambda: {"busy_before_percent": 0}

        def __exit__(self, *_):
            pass

    def sensor(*, busy_ok):
        if not (busy_ok or free):
            raise ValueError("the GPU is busy; add --busy-gpu")
        return Reading()

    measured, free = [], [True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: H100)
    monkeypatch.setattr(reproduce, "EnergyMeter", Meter)
    monkeypatch.setattr(reproduce, "sensor", sensor)
    monkeypatch.setattr(reproduce, "cold_batches", cold_batches)
    monkeypatch.setattr(reproduce, "precompile", lambda todo: None)
    for name in reproduce.PROBES:
        monkeypatch.setitem(reproduce.PROBES, name, probe)
    return SimpleNamespace(measured=measured, free=free)


def test_a_target_is_gone_on_with_and_its_rows_are_kept(device, tmp_path, capsys):
    command = ["reproduce", "table2", "--out", str(tmp_path), "--commit", "abc"]
    assert run([*command, "--seconds", "380"]) == 0
    assert f"3 of {len(TARGETS['table2'])} tasks are done" in capsys.readouterr().out
    first = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert run([*command, "--seconds", "5000"]) == 0
    assert len(device.measured) == len(set(device.measured)) == len(TARGETS["table2"])
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert rows[: len(first)] == first
    assert {(row["probe"], row["commit"]) for row in rows} == {("load", "abc")}
    runs = json.loads((tmp_path / "manifest.json").read_text())["runs"]
    assert [(one["device"], one["tasks"]) for one in runs] == [
        (H100, len(device.measured)),
        (H100, len(device.measured) - 3),
    ]
    # Figure 1 asks for what table 2 has measured.
    assert run(["reproduce", "figure1", "--out", str(tmp_path), "--commit", "abc"]) == 0
    assert len(device.measured) == len(TARGETS["table2"])


def test_all_is_every_target_once():
    every = tasks_of("all")
    assert len(every) == len(set(every))
    assert set(every) == {task for one in TARGETS.values() for task in one}
    rows = [{"probe": "load", **{name: getattr(POINT, name) for name in Point.__dataclass_fields__}, "arm": "ours"}]
    assert missing_of((Task(probe="load", point=POINT), Task(probe="arms", point=POINT)), rows) == (
        Task(probe="arms", point=POINT),
    )


def test_simulated_rows_need_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "table5", TARGETS["table5"][:1])
    assert run(["reproduce", "table5", "--simulated", "--out", str(tmp_path)]) == 0
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert {row["probe"] for row in rows} == {"simulated"}


@pytest.mark.parametrize(("arguments", "change", "sentence"), [
    (["tabel1"], None, "table1"),
    (["table1"], "busy", "add --busy-gpu"),
    (["table1"], "unknown", "nothing is known of 'Fake GPU'; reproduce runs on NVIDIA H100"),
    (["table1"], "none", "reproduce needs a CUDA device"),
    (["table1"], "other", "holds rows of device 'NVIDIA H200'"),
    (["table1"], "older", "holds rows of torch '1.0'"),
    (["table1"], "meter", "measure elsewhere"),
    (["table1", "--seconds", "1"], None, "nothing was measured within --seconds"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(arguments, change, sentence, device, tmp_path, capsys, monkeypatch):
    if change == "busy":
        device.free.clear()
    elif change == "unknown":
        monkeypatch.setattr(reproduce, "device_name", lambda: "Fake GPU")
    elif change == "none":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elif change == "meter":
        monkeypatch.setattr(Meter, "broken", True)
    elif change in ("other", "older"):
        was = {"device": "NVIDIA H100 80GB HBM3", "driver": "1.2", "versions": {"torch": "1.0"}}
        run_before = was | ({"device": "NVIDIA H200"} if change == "other" else {})
        (tmp_path / "rows.jsonl").write_text("")
        (tmp_path / "manifest.json").write_text(json.dumps({"device": run_before["device"], "runs": [run_before]}))
    assert run(["reproduce", *arguments, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_the_processor_is_named(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: Quick 9000\nflags\t: a\n")
    assert reproduce.cpu_name(path) == "Quick 9000"
    assert reproduce.cpu_name(tmp_path / "none")


def test_a_stop_keeps_what_is_finished(device, tmp_path, capsys, monkeypatch):
    def stop(points, seconds):
        yield points[0], None
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "cold_batches", stop)
    assert run(["reproduce", "table4", "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
