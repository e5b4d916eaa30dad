"""The GPU's executor on a stand-in for CUDA: kernels are interpreted, streams run at once, graphs hold calls."""

import contextlib
import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertslice.kernels import reference, weights, workspace
from expertslice.policies.contract import ByTokens, Control, Pinned, Plan, Setup, SliceLayout, TileVariant
from expertslice.policies.data import load_device
from expertslice.policies.layouts import fallback_plan, one_slice_plan, uniform_slice
from expertslice.runtime import back, cuda, lanes, other, upload
from expertslice.runtime.backend import ExecutorError, RuntimeBackend
from expertslice.runtime.graphs import CaptureRule
from expertslice.runtime.workload import write_logits
from expertslice.traces.schema import MoeSpec, OtherWork, RoutedStep, next_power_of_two

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, it is tried itself")
MODEL = MoeSpec(name="t", num_layers=2, num_experts=4, top_k=2, d_model=16, d_ff=(16,))
TILES = tuple(
    TileVariant(
        name=f"{m}x32", block_m=m, block_n=32, block_k=16, num_warps=4, num_stages=2, smem_bytes=0, regs_per_thread=64
    )
    for m in (16, 32)
)
DEVICE = replace(load_device("a100-sxm4-80gb"), sm_count=4)
SETUP = Setup(device=DEVICE, model=MODEL, variants=TILES, control=Control(delay_steps=0))
TWO = SliceLayout(slices=(uniform_slice("sm_budget", 2, "16x32"), uniform_slice("shared", 2, "32x32")))
GREEN = SliceLayout(slices=tuple(uniform_slice("green_context", 2, "16x32") for _ in range(2)))
MIG = SliceLayout(slices=(uniform_slice("mig", 2, "16x32", instance=0),))


class Stream:
    def __init__(self, priority=0):
        self.priority = priority

    def wait_stream(self, stream):
        pass

    def record_event(self):
        pass

    def wait_event(self, _):
        pass


class Event:
    clock = itertools.count(1)

    def __init__(self, enable_timing=False):
        self.at = None

    def record(self):
        self.at = next(self.clock)

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return float(np.float32(later.at - self.at))


class Graph:
    """Runs again what was captured: the executor's launches are kept by the stand-in for torch.cuda.graph."""

    def __init__(self):
        self.calls = []

    def replay(self):
        for call in self.calls:
            call()


class Torch:
    """Torch without a device: what is made there is made here."""

    def __init__(self, cuda):
        self.cuda = cuda

    def __getattr__(self, name):
        return getattr(torch, name)

    def zeros(self, *shape, dtype, **_):
        return torch.zeros(*shape, dtype=dtype)

    def randn(self, *shape, **_):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0))

    def Generator(self, _):
        return torch.Generator()


def fake_cuda(found):
    @contextlib.contextmanager
    def graph(held, stream):
        if found.full:
            found.full -= 1
            raise RuntimeError("CUDA error: out of memory")
        found.captured += 1
        held.calls.append(found.run)
        yield

    held = SimpleNamespace(
        multi_processor_count=4, major=8, minor=0, L2_cache_size=1 << 14, total_memory=1 << 30, name="stand-in"
    )
    main = Stream()
    return SimpleNamespace(
        Stream=Stream, Event=Event, CUDAGraph=Graph, graph=graph, stream=lambda _: contextlib.nullcontext(),
        current_stream=lambda: main, synchronize=lambda: None, empty_cache=lambda: None,
        _sleep=lambda _: None, mem_get_info=lambda: (100, 200), get_device_properties=lambda _: held,
    )  # fmt: skip


class Stamp:
    """Counts instead of a timer."""

    now = itertools.count(1)

    def __getitem__(self, _):
        return lambda out: out.fill_(next(self.now))


@pytest.fixture
def world(monkeypatch):
    """Put the stand-in in place: so many captures fail as `full` says, `captured` counts the others."""
    found = SimpleNamespace(full=0, captured=0, run=None)
    real_eager, allocate = cuda.CudaExecutor._eager, workspace.Workspace.allocate

    def eager(self, key):
        found.run = real_eager(self, key)
        return found.run

    for module in (back, cuda, lanes, upload):
        monkeypatch.setattr(module, "torch", Torch(fake_cuda(found)))
    for module in (cuda, lanes):
        monkeypatch.setattr(module, "stamp_kernel", Stamp())
    monkeypatch.setitem(other.TILE, "bf16", (16, 16, 16))
    monkeypatch.setattr(cuda.CudaExecutor, "_eager", eager)
    monkeypatch.setattr(cuda, "random_weights", lambda spec, _, seed: weights.random_weights(spec, "cpu", seed))
    monkeypatch.setattr(cuda, "Workspace", SimpleNamespace(allocate=lambda spec, t, _: allocate(spec, t, "cpu")))
    return found


@pytest.fixture
def idle_world(world, monkeypatch):
    """The same, where kernels do nothing."""
    monkeypatch.setattr(cuda.CudaExecutor, "_run_layers", lambda *_: None)
    return world


def backend(**options):
    options = {"energy": False} | options
    return RuntimeBackend(cuda.CudaExecutor(max_tokens=16, **options), bucket_of=next_power_of_two)


def draw_steps(num_steps):
    rng = np.random.default_rng(0)
    for step in range(num_steps):
        tokens = int(rng.integers(1, 17))
        ids_TLK = np.stack([[rng.permutation(4)[:2] for _ in range(2)] for _ in range(tokens)]).astype(np.uint16)
        counts = np.stack([np.bincount(ids_TLK[:, layer].ravel(), minlength=4) for layer in range(2)])
        yield RoutedStep(
            step=step, phase="mixed", counts_LE=counts.astype(np.int32), num_tokens=tokens,
            expert_ids_TLK=ids_TLK if step % 2 else None,
        )  # fmt: skip


def submit_all(on, num_steps):
    for step in draw_steps(num_steps):
        on.submit(step)


def ours(caught):
    """Return how many warnings are ours: interpreted kernels add some about rows that are never read."""
    return sum(one.category is UserWarning for one in caught)


def plans():
    pinned = np.array([[0, 1, 1, 0], [1, 1, 0, 0]], dtype=np.int16)
    yield fallback_plan(SETUP)
    yield Plan(layout=TWO, placement=ByTokens(bounds=(3,), slice_ids=(0, 1)), tile_order="heavy")
    yield Plan(layout=TWO, placement=Pinned(slice_of_expert_LE=pinned), steal=True)


def test_steps_under_changing_plans_have_the_bits_of_the_definition(world):
    on, records = backend(loads=[(16, frozenset())]), []
    on.open(SETUP, (TWO,))
    assert world.captured == 2
    before, beside = OtherWork(flops=10, hbm_bytes=40_000), OtherWork(flops=10, hbm_bytes=10, slice_id=1)
    for step, plan in zip(draw_steps(6), itertools.cycle(plans())):
        work = step.step > 2
        on.apply(plan)
        on.submit(replace(step, other_L=((before,), (before, beside)) if work else ()))
        on._check_counts(step.step)
        records += on.drain(wait=True)
        executor, tokens = on.executor, step.num_tokens
        held = executor._weights[1 % len(executor._weights)]
        expected = reference.layer(executor._x_TD[:tokens], executor._logits_LTE[1, :tokens], held, executor._router)
        assert torch.equal(executor._workspaces[1].out_TD[:tokens], expected)
        asked = executor._upload.asked_LPA[1].tolist() if work else None
        last = plan.layout.num_slices
        assert asked is None or (asked[0][:2], asked[last][:2]) == ([40_000, 10], [10, 10])
    assert [record.step for record in records] == list(range(6))
    assert all((record.busy_ns_LS > 0).all() for record in records)
    assert on.close() == []


def test_a_capture_leaves_what_is_on_its_way_back_alone(world):
    on = backend()
    on.open(SETUP, ())
    steps = sorted(draw_steps(8), key=lambda step: -step.num_tokens)
    assert steps[0].num_tokens > 8 > 2 * steps[-1].num_tokens
    for i, step in enumerate((steps[0], steps[-1])):
        on.submit(replace(step, step=i))
    assert world.captured == 2
    on._check_counts(0)
    on._check_counts(1)


def test_what_is_kept_serves_the_next_run_and_gives_the_same_bits(world):
    executor = cuda.CudaExecutor(max_tokens=16, loads=[(16, frozenset())], energy=False, keep=True)
    outs, captured = [], []
    for plan in (fallback_plan(SETUP), *plans()):
        on, records = RuntimeBackend(executor, bucket_of=lambda _: 16), []
        on.open(SETUP, (plan.layout,))
        for step in draw_steps(4):
            on.apply(plan)
            on.submit(step)
        records += on.drain(wait=True)
        assert [record.step for record in records] == list(range(4))
        on._check_counts(3)
        on.close()
        outs.append(executor._workspaces[1].out_TD[: step.num_tokens].clone())
        captured.append(world.captured)
    # Unsliced, unsliced again, two slices, and these stealing from each other.
    assert captured == [1, 1, 2, 3]
    assert all(torch.equal(out, outs[0]) for out in outs)
    held = executor._weights
    executor.open(replace(SETUP, seed=5), ())
    assert executor._weights is held
    executor.open(replace(SETUP, model=replace(MODEL, num_layers=3)), ())
    assert executor._weights is not held
    executor.release()
    assert len(executor._graphs) == 0


def test_graphs_that_memory_has_no_room_for_are_launched_kernel_by_kernel(idle_world):
    idle_world.full = 3
    on = backend()
    on.open(SETUP, ())
    with pytest.warns(UserWarning, match="its kernels are launched one by one") as caught:
        submit_all(on, 3)
    assert ours(caught) == 1
    assert on.executor.num_eager == 1
    assert len(on.drain(wait=True)) == 3


def test_the_clock_starts_where_the_host_saw_a_stamp_soonest(idle_world, monkeypatch):
    """Stamps lie 1 ms before the host's clock, and the host sees them up to 45 us later than that."""
    late_ns = itertools.cycle([45_000, 9_000, 300, 20_000])
    monkeypatch.setattr(cuda, "time", SimpleNamespace(perf_counter_ns=lambda: next(host_ns) + next(late_ns)))
    host_ns = itertools.count(5_000_000, 1000)
    # A reading of the host's clock follows each stamp.
    monkeypatch.setattr(Stamp, "now", itertools.count(4_000_000, 1000))
    on = backend()
    on.open(SETUP, ())
    assert on.executor._timer_zero_ns - on.executor._zero_ns == -1_000_300
    monkeypatch.setattr(Stamp, "now", itertools.cycle([7_000_000, 7_012_300]))
    on.executor.now_ns = lambda: 0
    on.submit(next(draw_steps(1)))
    (record,) = on.drain(wait=True)
    assert record.start_ns == 7_000_000 - on.executor._timer_zero_ns
    assert record.end_ns - record.start_ns == 12_300


def test_a_rule_says_when_steps_are_captured(idle_world):
    on, captured = backend(rule=CaptureRule(least_calls=2, least_tokens=6)), []
    on.open(SETUP, (TWO,))
    for step in [step for step in draw_steps(60) if step.num_tokens > 8][:3]:
        on.submit(step)
        captured.append(idle_world.captured)
    assert captured == [0, 0, 1]


@pytest.mark.parametrize(("layout", "why"), [(MIG, "a process for each instance"), (GREEN, "green contexts need")])
def test_layouts_that_cannot_be_run_unsliced_with_one_warning(idle_world, layout, why, monkeypatch):
    monkeypatch.setattr(
        cuda, "Partition", lambda **_: (_ for _ in ()).throw(cuda.PartitionError("green contexts need"))
    )
    on = backend(loads=[(16, frozenset())])
    on.open(SETUP, (layout,))
    # As a device would see it whose driver splits otherwise than its facts say.
    on._control._plan = one_slice_plan(layout)
    with pytest.warns(UserWarning, match=why) as caught:
        submit_all(on, 2)
    assert (ours(caught), on.num_fallbacks) == (1, 2)


def test_a_step_too_large_is_one_sentence(idle_world):
    on = backend()
    on.open(SETUP, ())
    with pytest.raises(ExecutorError, match="buffers hold 16, give more"):
        on.submit(RoutedStep(step=0, phase="decode", counts_LE=np.zeros((2, 4), np.int32), num_tokens=40))


def test_energy_that_cannot_be_read_is_said_once(idle_world, monkeypatch):
    class Absent:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            raise ImportError("No module named 'pynvml'")

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(cuda, "EnergyMeter", Absent)
    on = backend(energy=True)
    on.open(SETUP, ())
    for step in draw_steps(3):
        on.submit(step)
    on.drain(wait=True)
    with pytest.warns(UserWarning, match="energy is not measured: No module named 'pynvml'"):
        (window,) = on.close()
    assert (window.first_step, window.last_step, window.energy_uj) == (0, 2, None)


def test_a_launch_of_other_work_does_what_it_is_asked():
    asked = torch.zeros(1, other.PLACES, 3, dtype=torch.int64)
    kernels = other.OtherKernels(asked, "fp32", l2_bytes=1 << 15, sm_count=2)
    kernels._source.copy_(torch.randint(1 << 11, kernels._source.shape, generator=torch.Generator().manual_seed(0)))
    words, start = 3 * other.CHUNK_WORDS + 8, kernels.num_chunks - 1
    step_flops = 2 * kernels.block_m * kernels.block_n * kernels.block_k
    asked[0, 3] = torch.tensor([4 * words - 3, 3 * step_flops - 5, start])
    kernels.launch(0, 3)
    multiplied, read = kernels._sink[3, :2], kernels._sink[3, 2:].long()
    one = kernels._tile[: kernels.block_m * kernels.block_k].view(-1, kernels.block_k)
    product = float((one @ kernels._tile.view(-1, kernels.block_k).T).sum())
    torch.testing.assert_close(multiplied, torch.tensor([2 * product, product]))
    around = torch.roll(kernels._source, -start * other.CHUNK_WORDS)[:words]
    folded = [torch.zeros(other.CHUNK_WORDS, dtype=torch.int32) for _ in range(2)]
    for i, chunk in enumerate(around.split(other.CHUNK_WORDS)):
        folded[i % 2][: len(chunk)] ^= chunk
    assert read.tolist() == [int(one.sum()) for one in folded]


def test_what_is_asked_reads_on_where_the_last_read_ended():
    chunk = 4 * other.CHUNK_WORDS
    work = OtherWork(flops=1, hbm_bytes=chunk + 1), OtherWork(flops=2, hbm_bytes=chunk, slice_id=5)
    asked, ends = other.asked_LPA((work, work), 2, 2, 7)
    assert asked[:, other.BEFORE].tolist() == [[chunk + 1, 1, 7], [chunk + 1, 1, 10]]
    assert asked[:, 2].tolist() == [[chunk, 2, 9], [chunk, 2, 12]]
    assert ends == 13
    assert other.places_of(other.slice_ids_of((work,)), 2) == {other.BEFORE, 2}


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_one_copy_brings_every_step_its_own_inputs(data):
    num_layers, num_words, top_k, most = 2, 5, 3, 9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upload, "torch", Torch(fake_cuda(SimpleNamespace(full=0, captured=0, run=None))))
        sent = upload.Upload(4, asked=(num_layers, 2, 3), plans=(num_layers, num_words), ids=num_layers * most * top_k)
    plans = [object() for _ in range(3)]
    for step in range(12):
        tokens, which = data.draw(st.integers(0, most)), data.draw(st.integers(0, 2))
        ids_LTK = np.full((num_layers, tokens, top_k), step) + np.arange(top_k)
        words_LW = np.full((num_layers, num_words), 100 + which, np.int32)
        asked_LPA = np.full((num_layers, 2, 3), step, np.int64) if data.draw(st.booleans()) else None
        fill = partial(np.copyto, src=words_LW)
        sent.send(step % 4, ids_LTK, plan=plans[which], fill=fill, asked_LPA=asked_LPA)
        assert np.array_equal(sent.ids_N[: ids_LTK.size].view(ids_LTK.shape).numpy(), ids_LTK)
        assert sent.slot.tolist() == [step % 4]
        assert np.array_equal(sent.plans_LW.numpy(), words_LW)
        assert sent.num_tokens.tolist() == [tokens]
        assert asked_LPA is None or np.array_equal(sent.asked_LPA.numpy(), asked_LPA)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_logits_on_the_device_are_those_of_the_ids_and_nothing_else_is_written(data):
    num_layers, top_k, most = 2, data.draw(st.integers(1, 4)), 9
    num_experts = data.draw(st.integers(top_k, 70))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upload, "torch", Torch(fake_cuda(SimpleNamespace(full=0, captured=0, run=None))))
        sent = upload.Upload(2, asked=(1,), plans=(1,), ids=num_layers * most * top_k)
    rng, tokens = np.random.default_rng(data.draw(st.integers(0, 99))), data.draw(st.integers(0, most))
    ids_LTK = np.argsort(rng.random((num_layers, tokens, num_experts)), axis=2)[..., :top_k]
    sent.send(1, ids_LTK, plan=None, fill=lambda _: None, asked_LPA=None)
    logits_LTE = torch.full((num_layers, most, num_experts), float("nan"), dtype=torch.bfloat16)
    sent.write_logits(logits_LTE, most, top_k)
    expected_LTE = torch.full_like(logits_LTE, float("nan"))
    write_logits(expected_LTE[:, :tokens], torch.from_numpy(ids_LTK))
    assert torch.equal(logits_LTE.nan_to_num(77), expected_LTE.nan_to_num(77))


def test_a_step_comes_back_into_its_slot_alone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(back, "torch", Torch(fake_cuda(SimpleNamespace(full=0, captured=0, run=None))))
        held = back.Back(3, 100, 20)
    for slot in (2, 0):
        held.counts_LE.copy_(torch.arange(2000).view(100, 20) + slot)
        held.stamps_LS2.copy_(torch.arange(held.stamps_LS2.numel()).view(held.stamps_LS2.shape) + slot)
        held.begin.fill_(10 + slot)
        held.end.fill_(20 + slot)
        held.bring(torch.tensor([slot], dtype=torch.int32))
        held.ends(slot)
    for slot in (2, 0):
        assert held.is_there(slot, wait=True)
        assert np.array_equal(held.counts(slot), np.arange(2000).reshape(100, 20) + slot)
        step_2, stamps_LS2 = held.stamps(slot, 3)
        assert step_2.tolist() == [10 + slot, 20 + slot]
        assert np.array_equal(stamps_LS2, np.arange(3200).reshape(100, 16, 2)[:, :3] + slot)
    assert not held.counts(1).any()
