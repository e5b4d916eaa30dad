"""The simulated backend: it agrees with the closed form, keeps the contract's timing, and repeats to the byte."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from splits import COLD, HOT

from expertslice.policies.contract import ByTokens, Control, Plan, Setup, SliceLayout, StepRecord
from expertslice.policies.cost import CostModel, floor_ns
from expertslice.policies.layouts import co_resident_layout, one_slice_plan, unsliced_layout
from expertslice.policies.loop import PolicyError, drive
from expertslice.policies.oracle import Oracle, candidate_plans
from expertslice.sim.backend import SimBackend
from expertslice.sim.power import Power
from expertslice.traces.schema import MoeSpec, OtherWork, RoutedStep

Runner = Callable[..., list[StepRecord]]
Steps = Callable[..., Iterator[RoutedStep]]
EVERY_PLAN = ("unsliced", "streams", "sm_budget", "stealing", "green_context", "green_stealing", "mig")
FREE = Control(delay_steps=0, plan_ns=0)


def digest(records: list[StepRecord]) -> str:
    text = [
        repr((r.step, r.plan_id, r.submit_ns, r.start_ns, r.end_ns, r.start_ns_LS.tolist(), r.busy_ns_LS.tolist()))
        for r in records
    ]
    return hashlib.sha256("".join(text).encode()).hexdigest()


@pytest.mark.parametrize("name", EVERY_PLAN)
@pytest.mark.parametrize("num_tokens", [1, 300, 4000])
def test_undisturbed_simulation_equals_the_closed_form(
    name: str,
    num_tokens: int,
    plans: dict[str, Plan],
    truth: CostModel,
    setup: Setup,
    run: Runner,
    steps: Steps,
    fixed: Any,
):
    setup = replace(setup, control=FREE)
    for record, step in zip(
        run(fixed(plans[name]), truth, setup, steps(setup.model, 3, num_tokens)),
        steps(setup.model, 3, num_tokens),
        strict=True,
    ):
        work = truth.work(plans[name], step.counts_LE)
        layers = [work.layer_times(layer) for layer in range(len(step.counts_LE))]
        assert record.end_ns - record.start_ns - record.reconfigure_ns == sum(times.ns for times in layers)
        assert record.busy_ns_LS.tolist() == [times.busy_ns_S for times in layers]


@pytest.mark.parametrize("name", EVERY_PLAN)
def test_no_step_beats_its_floor_and_slices_are_busy_within_it(
    name: str, plans: dict[str, Plan], truth: CostModel, setup: Setup, run: Runner, steps: Steps, fixed: Any
):
    for record in run(fixed(plans[name]), truth, setup, steps(setup.model, 4, 2000)):
        floor = floor_ns(hbm_bytes=record.hbm_bytes, flops=record.flops, device=setup.device, dtype="bf16")
        assert record.end_ns - record.start_ns >= floor
        assert (record.busy_ns_LS.sum(axis=0) <= record.end_ns - record.start_ns).all()
        assert (record.start_ns_LS >= record.start_ns).all()
        assert record.submit_ns <= record.start_ns


def test_other_work_is_carried_out_beside_a_slice(
    plans: dict[str, Plan], truth: CostModel, setup: Setup, run: Runner, steps: Steps, fixed: Any
):
    work = OtherWork(flops=10**9, hbm_bytes=50_000_000, slice_id=0)
    plain = run(fixed(plans["green_context"]), truth, setup, steps(setup.model, 3, 2000))
    beside = run(fixed(plans["green_context"]), truth, setup, steps(setup.model, 3, 2000, other=(work,)))
    assert beside[-1].busy_ns_LS[:, 0].sum() > plain[-1].busy_ns_LS[:, 0].sum()
    assert beside[-1].flops - plain[-1].flops == setup.model.num_layers * work.flops
    assert beside[-1].hbm_bytes - plain[-1].hbm_bytes == setup.model.num_layers * work.hbm_bytes


def test_stealing_helps_a_slice_that_has_too_much(plans: dict[str, Plan], truth: CostModel):
    counts_LE = np.array([[2000] * 8 + [1] * 8], dtype=np.int32)
    steals = plans["green_stealing"]
    keeps = replace(steals, steal=False)
    assert truth.step_ns(steals, counts_LE) < 0.95 * truth.step_ns(keeps, counts_LE)


def test_mig_pays_for_the_way_through_the_host(plans: dict[str, Plan], truth: CostModel):
    counts_LE = np.array([[10] * 8 + [500] * 8], dtype=np.int32)
    near = replace(plans["mig"], placement=ByTokens(bounds=(), slice_ids=(0,)))
    remote, local = (truth.work(plan, counts_LE).layer_times(0) for plan in (plans["mig"], near))
    assert remote.start_ns_S[1] - local.start_ns_S[1] > truth.device.host_hop_ns


def test_a_plan_takes_effect_exactly_when_it_is_due(
    plans: dict[str, Plan], truth: CostModel, setup: Setup, run: Runner, steps: Steps, fixed: Any
):
    setup = replace(setup, control=Control(delay_steps=3, count_lag_steps=2))
    policy = fixed(plans["sm_budget"])
    records = run(policy, truth, setup, steps(setup.model, 6, 500))
    ran = [record.plan_id == plans["sm_budget"].plan_id for record in records]
    assert ran == [False] * 3 + [True] * 3
    assert [record.fallback is None for record in records] == ran
    assert records[3].reconfigure_ns > 0
    assert [record.reconfigure_ns for record in records[4:]] == [0, 0]
    assert [len(obs.counts_HLE) for obs in policy.seen] == [0, 0, 1, 2, 3, 4]
    assert [obs.plan_id for obs in policy.seen] == [record.plan_id for record in records]


def test_counts_seen_are_those_of_the_steps_before_the_lag(
    plans: dict[str, Plan], truth: CostModel, setup: Setup, run: Runner, steps: Steps, fixed: Any
):
    setup = replace(setup, control=Control(count_lag_steps=2, history_steps=3))
    policy = fixed(plans["unsliced"])
    run(policy, truth, setup, steps(setup.model, 8, 500))
    seen = [step.counts_LE for step in steps(setup.model, 8, 500)]
    for n, obs in enumerate(policy.seen):
        expected = seen[max(0, n - 4) : max(0, n - 1)]
        assert len(obs.counts_HLE) == len(expected)
        assert all((a == b).all() for a, b in zip(obs.counts_HLE, expected, strict=True))


def test_a_slow_control_plane_stalls_the_device(
    plans: dict[str, Plan], truth: CostModel, setup: Setup, run: Runner, steps: Steps, fixed: Any
):
    def stalls(**control: int) -> list[int]:
        timed = replace(setup, control=Control(**control))
        return [r.control_stall_ns for r in run(fixed(plans["unsliced"]), truth, timed, steps(setup.model, 12, 500))]

    # A decision is taken while its step runs: only what outlasts the step stalls the next.
    assert all(1_000_000 < stall < 2_000_000 for stall in stalls(plan_ns=2_000_000)[1:])
    assert all(stall >= 2_000_000 for stall in stalls(plan_ns=2_000_000, delay_steps=0))
    assert sum(stalls(plan_ns=2_000_000, every_steps=4)) < sum(stalls(plan_ns=2_000_000)) / 3
    assert max(stalls(plan_ns=50_000)) == 0


def test_an_undeclared_layout_stalls_once_for_its_capture(
    plans: dict[str, Plan], truth: CostModel, setup: Setup, run: Runner, steps: Steps, fixed: Any
):
    records = run(fixed(plans["sm_budget"], declared=False), truth, setup, steps(setup.model, 4, 500))
    assert [r.capture_ns for r in records] == [0, setup.device.capture_ns, 0, 0]
    declared = run(fixed(plans["sm_budget"]), truth, setup, steps(setup.model, 4, 500))
    assert all(r.capture_ns == 0 for r in declared)


def test_switching_costs_what_the_mechanism_costs(
    plans: dict[str, Plan], truth: CostModel, setup: Setup, run: Runner, steps: Steps, fixed: Any
):
    device = setup.device
    paid = {name: run(fixed(plans[name]), truth, setup, steps(setup.model, 2, 500))[1].reconfigure_ns for name in plans}
    assert paid["sm_budget"] == device.upload_ns + device.layout_switch_ns
    assert paid["green_context"] == paid["sm_budget"] + device.green_context_switch_ns
    assert paid["mig"] == paid["sm_budget"] + device.mig_relayout_ns


def test_a_policy_that_foresees_pays_nothing_and_acts_at_once(
    plans: dict[str, Plan], truth: CostModel, setup: Setup, run: Runner, steps: Steps, fixed: Any
):
    policy = fixed(plans["green_context"], declared=False, foresees=True)
    records = run(policy, truth, setup, steps(setup.model, 4, 500))
    assert {r.plan_id for r in records} == {plans["green_context"].plan_id}
    assert {(r.capture_ns, r.reconfigure_ns, r.control_stall_ns) for r in records} == {(0, 0, 0)}
    assert all(b.start_ns == a.end_ns for a, b in pairwise(records))
    first = next(steps(setup.model, 1, 500))
    assert (policy.seen[0].coming_LE == first.counts_LE).all()


def test_steps_wait_for_their_arrival_and_queue_behind_each_other(
    plans: dict[str, Plan], truth: CostModel, setup: Setup, run: Runner, steps: Steps, fixed: Any
):
    sparse = run(fixed(plans["unsliced"]), truth, setup, steps(setup.model, 4, 500, every_ns=50_000_000))
    assert all(r.start_ns >= r.step * 50_000_000 for r in sparse)
    assert all(r.control_stall_ns < 50_000_000 for r in sparse)
    policy = fixed(plans["unsliced"])
    dense = run(policy, truth, replace(setup, control=Control(every_steps=8)), steps(setup.model, 9, 500, every_ns=1))
    assert all(b.start_ns >= a.end_ns for a, b in pairwise(dense))
    assert dense[-2].start_ns - dense[-2].submit_ns > 500_000


def test_empty_steps_empty_layers_and_one_hot_loads_run(
    plans: dict[str, Plan], truth: CostModel, setup: Setup, run: Runner, fixed: Any
):
    def steps() -> Iterator[RoutedStep]:
        for step, tokens in enumerate((0, 700, 0)):
            counts_LE = np.zeros((setup.model.num_layers, setup.model.num_experts), dtype=np.int32)
            counts_LE[1:, 3:7] = tokens
            yield RoutedStep(step=step, phase="decode", counts_LE=counts_LE, num_tokens=tokens)

    for name in EVERY_PLAN:
        records = run(fixed(plans[name]), truth, setup, steps())
        assert [record.bucket for record in records] == [1, 1024, 1]
        assert records[0].flops == records[0].hbm_bytes == 0
        assert records[0].end_ns > records[0].start_ns


def test_plans_that_the_device_cannot_hold_are_refused(
    plans: dict[str, Plan], truth: CostModel, setup: Setup, steps: Steps, fixed: Any
):
    bad = replace(plans["sm_budget"], placement=ByTokens(bounds=(), slice_ids=(5,)))
    with pytest.raises(PolicyError, match="slice 5"):
        drive(fixed(bad), SimBackend(truth), steps(setup.model, 2, 500), setup, on_record=lambda _: None)


def test_the_oracle_bounds_every_plan_of_its_set(truth: CostModel, setup: Setup, run: Runner, steps: Steps, fixed: Any):
    def step_ns(policy: Any, seen: Setup) -> list[int]:
        return [r.end_ns - r.start_ns for r in run(policy, truth, seen, steps(setup.model, 6, 700))]

    bound = step_ns(Oracle(), replace(setup, belief=truth))
    for plan in candidate_plans(setup):
        assert all(a <= b for a, b in zip(bound, step_ns(fixed(plan), setup), strict=True))


def test_a_fault_of_the_backend_is_not_blamed_on_the_policy(
    plans: dict[str, Plan], truth: CostModel, setup: Setup, steps: Steps, fixed: Any, monkeypatch: pytest.MonkeyPatch
):
    def broken(self: SimBackend, plan: Plan) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(SimBackend, "apply", broken)
    with pytest.raises(RuntimeError, match="ours"):
        drive(
            fixed(plans["unsliced"]), SimBackend(truth), steps(setup.model, 2, 500), setup,
            on_record=lambda _: None, on_policy_error="unsliced",
        )  # fmt: skip


def test_a_belief_cannot_be_the_truth(truth: CostModel):
    with pytest.raises(ValueError, match="roofline"):
        SimBackend(replace(truth, detail="roofline"))


def test_a_model_of_other_shape_is_refused(truth: CostModel, setup: Setup):
    other = replace(setup, model=replace(setup.model, num_experts=8))
    with pytest.raises(ValueError, match="model"):
        SimBackend(truth).open(other, ())


def test_steps_of_other_shape_are_refused(truth: CostModel, setup: Setup):
    backend = SimBackend(truth)
    backend.open(setup, ())
    with pytest.raises(ValueError, match="counts"):
        backend.submit(RoutedStep(step=0, phase="mixed", counts_LE=np.zeros((1, 2), dtype=np.int32)))


def test_a_run_that_breaks_off_still_closes(
    plans: dict[str, Plan], truth: CostModel, setup: Setup, steps: Steps, fixed: Any, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Power, "spend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drive(fixed(plans["unsliced"]), SimBackend(truth), steps(setup.model, 4, 100), setup, on_record=lambda _: None)


def test_one_backend_can_be_opened_again(
    plans: dict[str, Plan], truth: CostModel, setup: Setup, steps: Steps, fixed: Any
):
    backend = SimBackend(truth)
    runs: list[list[StepRecord]] = []
    for _ in range(2):
        records: list[StepRecord] = []
        drive(fixed(plans["stealing"]), backend, steps(setup.model, 4, 900), setup, on_record=records.append)
        runs.append(records)
    assert digest(runs[0]) == digest(runs[1])


REPEAT = """
import sys
from expertslice.policies.contract import Setup, ByTokens, Plan
from expertslice.policies.cost import CostModel
sys.path.insert(0, sys.argv[1])
import conftest, test_backend
device = conftest.load_device("h100-sxm5-80gb")
model = conftest.MoeSpec(name="test", num_layers=3, num_experts=16, top_k=4, d_model=1024, d_ff=(2048,))
setup = Setup(device=device, model=model, variants=conftest.VARIANTS)
truth = CostModel(device=device, model=model, variants=conftest.VARIANTS)
for plan in conftest.make_plans(setup).values():
    steps = conftest.draw_steps(model, 10, 1500)
    print(test_backend.digest(conftest.run_all(conftest.Fixed(plan), truth, setup, steps)))
"""


def test_equal_seeds_give_equal_bytes_in_every_process():
    outputs = [
        subprocess.run(
            [sys.executable, "-c", REPEAT, str(Path(__file__).parent)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "12345")
    ]
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0].split())) == len(EVERY_PLAN)


def test_memory_does_not_grow_with_the_number_of_steps(
    plans: dict[str, Plan], truth: CostModel, setup: Setup, steps: Steps, fixed: Any
):
    tracemalloc = pytest.importorskip("tracemalloc")

    def peak(num_steps: int) -> int:
        tracemalloc.start()
        model = setup.model
        drive(
            fixed(plans["sm_budget"]), SimBackend(truth), steps(model, num_steps, 500), setup, on_record=lambda _: None
        )
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    class Forgets(list[Any]):
        def append(self, item: Any) -> None:
            return

    fixed = _forgetful(fixed, Forgets)
    peak(40)
    assert peak(400) < 1.05 * peak(40) + 20_000


def _forgetful(fixed: Any, forgets: type[list[Any]]) -> Any:
    def make(plan: Plan) -> Any:
        policy = fixed(plan)
        policy.seen = forgets()
        return policy

    return make


def test_hot_beside_cold_beats_one_stream_after_another(setup: Setup, device: Any):
    model = MoeSpec(name="mixed", num_layers=1, num_experts=64, top_k=4, d_model=2048, d_ff=(4096,))
    truth = CostModel(device=device, model=model, variants=setup.variants)
    counts_LE = np.array([[2048] * 3 + [30] * 61], dtype=np.int32)
    rule = ByTokens(bounds=(64,), slice_ids=(0, 1))
    together = Plan(layout=co_resident_layout(setup, (COLD.name, HOT.name)), placement=rule, tile_order="heavy")
    alone = one_slice_plan(unsliced_layout(setup, HOT.name))
    assert truth.step_ns(together, counts_LE) < truth.step_ns(alone, counts_LE)
    assert isinstance(together.layout, SliceLayout)
