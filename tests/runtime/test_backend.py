"""The runtime's backend on the host executor: the contract's timing, parity with the simulator, and what goes wrong."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertslice.policies.contract import ByTokens, Control, Plan, Setup
from expertslice.policies.cost import CostModel
from expertslice.policies.data import load_device, load_variants
from expertslice.policies.layouts import co_resident_layout, fallback_plan, one_slice_plan, unsliced_layout
from expertslice.policies.loop import drive
from expertslice.policies.registry import make_policy
from expertslice.runtime.backend import MOST_AHEAD, ExecutorError, RuntimeBackend
from expertslice.runtime.host import HostExecutor
from expertslice.sim.backend import SimBackend
from expertslice.traces.schema import MoeSpec, RoutedStep, next_power_of_two

DEVICE = load_device("h100-sxm5-80gb")
MODEL = MoeSpec(name="test", num_layers=3, num_experts=16, top_k=4, d_model=1024, d_ff=(2048,))
SETUP = Setup(device=DEVICE, model=MODEL, variants=load_variants(DEVICE.compute_capability))
COUNT_ONLY = ("unsliced", "static", "proportional", "hot_cold")
controls = st.builds(
    Control,
    every_steps=st.integers(1, 4),
    count_lag_steps=st.integers(0, 3),
    delay_steps=st.integers(0, 3),
    history_steps=st.integers(1, 6),
)


class Recording:
    """A policy that returns the plans given in turn, and keeps what it saw."""

    foresees = reads_clock = False

    def __init__(self, *plans):
        self.plans, self.seen = plans, []

    def init(self, setup):
        return 0

    def layouts(self, setup):
        return tuple(dict.fromkeys(plan.layout for plan in self.plans))

    def plan(self, obs, state):
        self.seen.append(obs)
        return self.plans[state % len(self.plans)], state + 1


def draw_steps(num_steps, num_tokens=200, seed=0, **fields):
    rng = np.random.default_rng(seed)
    for step in range(num_steps):
        shares = rng.dirichlet(np.full(MODEL.num_experts, 0.4), size=MODEL.num_layers)
        counts = np.stack([rng.multinomial(num_tokens * MODEL.top_k, share) for share in shares]).astype(np.int32)
        yield RoutedStep(step=step, phase="mixed", counts_LE=counts, num_tokens=num_tokens, **fields)


def backend(executor=None):
    return RuntimeBackend(executor or HostExecutor(), bucket_of=next_power_of_two)


def run(policy, steps, setup=SETUP, on=None, **options):
    records, decided = [], []
    drive(
        policy,
        on or backend(),
        steps,
        setup,
        on_record=records.append,
        on_decision=lambda obs, plan: decided.append((obs.step, plan.plan_id)),
        **options,
    )
    return records, decided


@settings(max_examples=15, deadline=None)
@given(control=controls, name=st.sampled_from(COUNT_ONLY), seed=st.integers(0, 99))
def test_policies_that_read_counts_decide_alike_here_and_in_the_simulator(control, name, seed):
    setup = replace(SETUP, control=control)
    truth = CostModel(device=DEVICE, model=MODEL, variants=SETUP.variants)
    here = run(make_policy(name), draw_steps(12, seed=seed), setup)
    there = run(make_policy(name), draw_steps(12, seed=seed), setup, on=SimBackend(truth))
    assert here[1] == there[1]
    assert [r.plan_id for r in here[0]] == [r.plan_id for r in there[0]]
    assert [(r.hbm_bytes, r.flops, r.bucket) for r in here[0]] == [(r.hbm_bytes, r.flops, r.bucket) for r in there[0]]


def test_reckoned_times_are_the_simulators_while_the_clock_is_full():
    split = ByTokens(bounds=(64,), slice_ids=(0, 1))
    tiles = [v.name for v in SETUP.variants if v.block_m == 64][:2]
    plans = [fallback_plan(SETUP), Plan(layout=co_resident_layout(SETUP, tiles), placement=split)]
    truth = CostModel(device=DEVICE, model=MODEL, variants=SETUP.variants)
    here, _ = run(Recording(*plans), draw_steps(6))
    there, _ = run(Recording(*plans), draw_steps(6), on=SimBackend(truth))
    for ours, theirs in zip(here, there, strict=True):
        assert (ours.submit_ns, ours.start_ns, ours.end_ns) == (theirs.submit_ns, theirs.start_ns, theirs.end_ns)
        assert ours.start_ns_LS.tolist() == theirs.start_ns_LS.tolist()
        assert ours.busy_ns_LS.tolist() == theirs.busy_ns_LS.tolist()
        assert (ours.reconfigure_ns, ours.capture_ns) == (theirs.reconfigure_ns, theirs.capture_ns)


@settings(max_examples=25, deadline=None)
@given(control=controls)
def test_plans_take_effect_and_counts_are_seen_when_the_contract_says(control):
    plans = [one_slice_plan(unsliced_layout(SETUP, v.name)) for v in SETUP.variants[:3]]
    policy, steps = Recording(*plans), list(draw_steps(14))
    records, decided = run(policy, steps, replace(SETUP, control=control))
    assert [step for step, _ in decided] == list(range(0, 14, control.every_steps))
    due = {step + control.delay_steps: plan_id for step, plan_id in decided}
    in_effect = fallback_plan(SETUP).plan_id
    for record in records:
        in_effect = due.get(record.step, in_effect)
        assert record.plan_id == in_effect
        assert (record.fallback is None) == (record.step >= control.delay_steps)
    for obs in policy.seen:
        newest = obs.step - control.count_lag_steps
        if control.delay_steps == 0:
            newest = min(newest, obs.step - 1)
        expected = [s.counts_LE for s in steps[max(0, newest + 1 - control.history_steps) : max(0, newest + 1)]]
        assert np.array_equal(obs.counts_HLE, np.array(expected).reshape(-1, *steps[0].counts_LE.shape))


class Failing(HostExecutor):
    """An executor that cannot carry out layouts of more than one slice, or any."""

    most_slices = 1

    def launch(self, step, plan, bucket):
        if plan.layout.num_slices > self.most_slices:
            raise ExecutorError("no memory for the graph of this layout")
        return super().launch(step, plan, bucket)


def sliced_plan():
    tile = fallback_plan(SETUP).layout.slices[0].up
    split = ByTokens(bounds=(64,), slice_ids=(0, 1))
    return Plan(layout=co_resident_layout(SETUP, (tile, tile)), placement=split)


def test_a_layout_that_fails_falls_back_to_unsliced_with_one_warning():
    on = backend(Failing())
    with pytest.warns(UserWarning, match="step 1: no memory for the graph of this layout; running unsliced") as caught:
        records, _ = run(Recording(sliced_plan()), draw_steps(5), on=on)
    assert len(caught) == 1
    assert on.num_fallbacks == 4
    assert {r.plan_id for r in records} == {fallback_plan(SETUP).plan_id}
    assert [r.fallback for r in records[1:]] == ["no memory for the graph of this layout"] * 4


def test_an_unsliced_step_that_fails_is_not_hidden():
    executor = Failing()
    executor.most_slices = 0
    with pytest.raises(ExecutorError, match="no memory"):
        run(Recording(sliced_plan()), draw_steps(2), on=backend(executor))


def test_ids_that_are_not_the_counts_are_told():
    ids_TLK = np.zeros((200, 3, 4), dtype=np.uint16)
    steps = [replace(step, expert_ids_TLK=ids_TLK) for step in draw_steps(3)]
    with pytest.raises(
        ExecutorError, match=r"step 0: the device routed \d+ tokens to expert \d+ of layer 0, the trace"
    ):
        run(Recording(fallback_plan(SETUP)), steps)


def test_ids_that_are_the_counts_pass():
    rng = np.random.default_rng(0)
    ids_TLK = np.stack([[rng.permutation(16)[:4] for _ in range(3)] for _ in range(20)]).astype(np.uint16)
    counts = np.stack([np.bincount(ids_TLK[:, layer].ravel(), minlength=16) for layer in range(3)]).astype(np.int32)
    steps = [
        RoutedStep(step=i, phase="decode", counts_LE=counts, num_tokens=20, expert_ids_TLK=ids_TLK) for i in (0, 1, 2)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records, _ = run(Recording(fallback_plan(SETUP)), steps)
    assert len(records) == 3


def test_the_host_never_runs_further_ahead_than_it_may():
    setup = replace(SETUP, control=Control(every_steps=1000))
    on, ahead = backend(), []
    on.open(setup, ())
    for step in draw_steps(MOST_AHEAD + 20, num_tokens=4000):
        on.submit(step)
        ahead.append(len(on._running))
    assert max(ahead) == MOST_AHEAD
    assert len(on.drain(wait=True)) == MOST_AHEAD + 20


def test_steps_wait_for_their_arrival():
    steps = [replace(step, arrival_ns=step.step * 50_000_000) for step in draw_steps(4)]
    records, _ = run(Recording(fallback_plan(SETUP)), steps)
    assert all(record.start_ns >= step.arrival_ns for record, step in zip(records, steps, strict=True))


def test_a_step_of_another_model_is_refused():
    on = backend()
    on.open(SETUP, ())
    step = RoutedStep(step=0, phase="decode", counts_LE=np.zeros((2, 4), dtype=np.int32))
    with pytest.raises(ValueError, match=r"step 0 has counts of shape \[2, 4\]; model 'test' has \[layers, experts\]"):
        on.submit(step)
