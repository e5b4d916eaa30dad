"""What the shipped policies decide, beyond keeping the contract."""

from dataclasses import replace

import numpy as np
import pytest

from expertslice.policies.candidates import auto_tiles, sharing_plans, snap_sms, splitting_plans, unsliced_plans
from expertslice.policies.choice import Choice, is_due, sampled_steps
from expertslice.policies.contract import ByTokens, Observation, Pinned, Setup
from expertslice.policies.cost import CostModel
from expertslice.policies.data import load_device, load_variants
from expertslice.policies.dynamic import Dynamic
from expertslice.policies.hot_cold import HotCold
from expertslice.policies.oracle import Oracle, candidate_plans
from expertslice.policies.proportional import Proportional, weights_of
from expertslice.policies.static import Static
from expertslice.policies.unsliced import Unsliced
from expertslice.policies.validate import validate
from expertslice.traces.models import load_model

H100 = load_device("h100-sxm5-80gb")
MODEL = replace(load_model("large"), num_layers=2)
BELIEF = CostModel(H100, MODEL, load_variants(), "roofline")
SETUP = Setup(device=H100, model=MODEL, variants=load_variants(), belief=BELIEF)


class Priced:
    """A belief that prices plans by a rule of the test."""

    def __init__(self, price):
        self.price, self.calls = price, 0

    def step_ns(self, plan, counts_LE):
        self.calls += 1
        return self.price(plan)


def observe(counts_LE, step=1, busy_ns_LS=None, **fields):
    counts_HLE = np.asarray(counts_LE, np.int32)[None] if counts_LE is not None else np.zeros((0, 2, 32), np.int32)
    busy = np.zeros((2, 0), np.int64) if busy_ns_LS is None else np.asarray(busy_ns_LS)
    return Observation(
        step=step,
        counts_HLE=counts_HLE,
        now_ns=0,
        plan_id="",
        step_ns=0,
        busy_ns_LS=busy,
        power_w=None,
        queued_tokens=None,
        **fields,
    )


def mixed(hot=1000, cold=20, num_hot=3):
    return np.tile(np.where(np.arange(32) < num_hot, hot, cold), (2, 1))


def decide(policy, setup, *observations):
    state = policy.init(setup)
    for obs in observations:
        plan, state = policy.plan(obs, state)
        validate(plan, setup)
    return plan


def is_unsliced(plan):
    return plan.layout.num_slices == 1


def test_guard_keeps_unsliced_below_the_minimum_gain():
    for saved, sliced in ((0.015, False), (0.04, True)):
        belief = Priced(lambda plan, saved=saved: 10**6 if is_unsliced(plan) else round(10**6 * (1 - saved)))
        plan = decide(HotCold(), replace(SETUP, belief=belief), observe(mixed()))
        assert is_unsliced(plan) is not sliced
        assert not is_unsliced(decide(HotCold(guarded=False), replace(SETUP, belief=belief), observe(mixed())))


def test_hot_cold_never_slices_what_is_all_alike():
    for tokens in (1, 20, 400):
        plan = decide(HotCold(), SETUP, observe(np.full((2, 32), tokens)))
        assert is_unsliced(plan)


def test_hot_cold_without_a_belief():
    setup = replace(SETUP, belief=None)
    assert is_unsliced(decide(HotCold(), setup, observe(mixed())))
    naive = decide(HotCold(guarded=False), setup, observe(mixed()))
    assert naive == sharing_plans(setup)[0]
    assert HotCold().layouts(setup) == Unsliced().layouts(setup)


def test_hot_cold_needs_a_mechanism():
    setup = replace(SETUP, mechanisms=frozenset({"shared"}))
    assert is_unsliced(decide(HotCold(guarded=False), setup, observe(mixed())))


def test_unsliced_takes_larger_tiles_for_more_rows():
    def rows(tokens):
        return SETUP.variant(decide(Unsliced(), SETUP, observe(np.full((2, 32), tokens))).layout.slices[0].up).block_m

    assert rows(4) <= 64
    assert rows(2000) == 128


def test_unsliced_keeps_its_tile_for_a_gain_below_stickiness():
    belief = Priced(lambda plan: 1000)
    state = Unsliced().init(replace(SETUP, belief=belief))
    state = replace(state, index=1)
    plan, _ = Unsliced().plan(observe(np.full((2, 32), 64)), state)
    assert plan == state.plans[1]


def test_prices_are_asked_for_seldom():
    belief = Priced(lambda plan: 1000)
    setup = replace(SETUP, belief=belief)
    policy, asked = HotCold(plan_every=16), []
    state = policy.init(setup)
    for step in range(64):
        _, state = policy.plan(observe(mixed(), step), state)
        asked.append(belief.calls)
    assert np.flatnonzero(np.diff([0, *asked])).tolist() == [0, 16, 32, 48]


def test_a_doubled_load_is_noticed_early():
    choice = Choice(setup=SETUP, plans=(), num_unsliced=0, decided_step=10, tokens=100)
    load = np.zeros((2, 32))
    for tokens, due in ((100, False), (199, False), (201, True), (49, True), (51, False)):
        load[0, 0] = tokens
        assert is_due(choice, observe(load, 20), 32) is due
        assert not is_due(choice, observe(load, 17), 32), "not before a quarter of the period"
    assert is_due(choice, observe(load, 9), 32), "a new run starts over"


def test_samples_are_whole_steps_newest_first():
    counts_HLE = np.arange(1, 6).repeat(4).reshape(5, 2, 2).astype(np.int32)
    assert [one[0, 0] for one in sampled_steps(counts_HLE, 3)] == [5, 3, 1]
    assert sampled_steps(counts_HLE * 0, 3) == []
    assert sampled_steps(counts_HLE[:0], 3) == []


def test_static_pins_by_the_papers_rule():
    plan = decide(Static(), SETUP, observe(mixed()))
    assert plan.placement.slice_of_expert_LE[0].tolist() == [e % 4 for e in range(32)]
    assert [one.sm_count for one in plan.layout.slices] == [32] * 4


def test_static_by_allocator_settles_once():
    policy = Static(placement="allocator")
    first = decide(policy, SETUP, observe(mixed(num_hot=4)))
    assert sorted(first.placement.slice_of_expert_LE[0, :4].tolist()) == [0, 1, 2, 3]
    assert np.bincount(first.placement.slice_of_expert_LE[0]).tolist() == [8] * 4
    later = decide(policy, SETUP, observe(mixed(num_hot=4)), observe(mixed()[:, ::-1]))
    assert later.plan_id == first.plan_id


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (Static(num_slices=17), "leave 0 SMs each; h100-sxm5-80gb needs 8"),
        (Static(num_slices=0), "give at least 1"),
        (Static(mechanism="mig", num_slices=8), r"no MIG layout of 8 instances; it has \[1, 2, 3"),
        (Static(tile="huge"), "tile variant 'huge' is not in this setup"),
        (Proportional(num_slices=1), "give at least 2"),
        (Proportional(num_slices=30), "no room for 30 slices"),
    ],
)
def test_impossible_parameters_are_refused(policy, says):
    with pytest.raises(ValueError, match=says):
        policy.layouts(SETUP)


def test_a_mechanism_that_the_setup_lacks_is_refused():
    with pytest.raises(ValueError, match="this setup allows shared"):
        Static().layouts(replace(SETUP, mechanisms=frozenset({"shared"})))


def test_static_mig_takes_the_strongest_smallest_instance():
    layout = Static(mechanism="mig", num_slices=4).layouts(SETUP)[0]
    assert sorted(one.sm_count for one in layout.slices) == [26, 32, 32, 32]


def test_proportional_sizes_the_hot_slice_by_its_share():
    def hot_sms(counts_LE):
        return decide(Proportional(), replace(SETUP, belief=None), observe(counts_LE)).layout.slices[0].sm_count

    assert hot_sms(np.full((2, 32), 50)) == 32
    assert hot_sms(mixed(hot=330, cold=34, num_hot=3)) == 64
    assert hot_sms(mixed(hot=4000, cold=10)) == 96


def test_proportional_evens_finishing_times():
    plan = decide(Proportional(), replace(SETUP, belief=None), observe(mixed(hot=330, cold=34)))
    ids_E, load_E = plan.placement.slice_of_expert_LE[0], mixed(hot=330, cold=34)[0]
    finish_S = np.bincount(ids_E, load_E) / [one.sm_count for one in plan.layout.slices]
    assert set(ids_E[:3]) == {0}
    assert np.ptp(finish_S) <= 34 / 64


def test_weights_follow_what_binds():
    counts = np.asarray([[0, 1, 32, 4096]])
    by_belief = weights_of(SETUP).of(np.tile(counts, (1, 8)))[0, :4]
    assert by_belief[0] == 0
    assert by_belief[1] == pytest.approx(by_belief[2], rel=0.1), "few rows cost the weights"
    assert by_belief[3] > 8 * by_belief[2], "many rows cost arithmetic"
    by_tokens = weights_of(replace(SETUP, belief=None)).of(np.tile(counts, (1, 8)))
    assert by_tokens[0, :4].tolist() == [0, 1, 32, 4096]
    wide = replace(MODEL, num_experts=2, top_k=1, d_ff=(1024, 3072))
    assert weights_of(replace(SETUP, model=wide, belief=None)).of(np.asarray([[10, 10]])).tolist() == [[5, 15]]


def run_dynamic(policy, time_of_expert_E, steps):
    """Return how uneven the slices are after each step, an expert taking a time that its tokens do not tell."""
    state, uneven, moved, busy, before = policy.init(SETUP), [], [], None, None
    for step in range(steps):
        plan, state = policy.plan(observe(np.full((2, 32), 50) + np.arange(32), step, busy), state)
        ids_LE = plan.placement.slice_of_expert_LE
        busy = np.stack([np.bincount(ids_E, time_of_expert_E, 4) for ids_E in ids_LE]).astype(np.int64)
        uneven.append(np.ptp(busy, axis=1).max() / busy.max())
        moved.append(0 if before is None else int((before != ids_LE).sum()))
        before = ids_LE
    return uneven, moved


def test_dynamic_evens_out_and_then_rests():
    rng = np.random.default_rng(0)
    time_E = 10_000 * rng.lognormal(0, 1, 32)
    uneven, moved = run_dynamic(Dynamic(hold_steps=2), time_E, 120)
    assert uneven[1] > 0.3
    assert max(uneven[-20:]) <= 0.2
    assert sum(moved[-20:]) == 0
    assert max(moved[2:]) <= Dynamic().max_moves


def test_dynamic_dwells_between_moves():
    _, moved = run_dynamic(Dynamic(hold_steps=10), 10_000 * np.random.default_rng(0).lognormal(0, 1, 32), 60)
    assert min(np.diff(np.flatnonzero(moved)), default=10) >= 10


def test_dynamic_ignores_times_of_another_layout():
    state = Dynamic().init(SETUP)
    plan, state = Dynamic().plan(observe(mixed()), state)
    same, _ = Dynamic().plan(observe(mixed(), 50, np.asarray([[5], [9]])), state)
    assert same.plan_id == plan.plan_id


def test_oracle_takes_the_cheapest_of_its_set():
    counts_LE = mixed().astype(np.int32)
    truth = CostModel(H100, MODEL, load_variants(), "tiles")
    setup = replace(SETUP, belief=truth)
    taken = decide(Oracle(), setup, observe(None, coming_LE=counts_LE))
    free = H100.layout_switch_ns + H100.green_context_switch_ns
    cheapest = min(truth.step_ns(plan, counts_LE) for plan in candidate_plans(setup))
    assert truth.step_ns(taken, counts_LE) <= cheapest + free


def test_oracle_leaves_a_layout_only_for_more_than_the_switch():
    for saved, leaves in ((H100.layout_switch_ns - 1, False), (H100.layout_switch_ns + 1, True)):
        first = candidate_plans(SETUP)[0]
        belief = Priced(lambda plan, saved=saved, first=first: 10**6 if plan == first else 10**6 - saved)
        plan = decide(Oracle(), replace(SETUP, belief=belief), observe(None, coming_LE=mixed(100).astype(np.int32)))
        assert (plan != first) is leaves


def test_candidates_are_distinct_and_valid_on_every_device():
    for name in ("h100-sxm5-80gb", "h200-sxm5-141gb", "a100-sxm4-80gb"):
        device = load_device(name)
        setup = Setup(device=device, model=MODEL, variants=load_variants(device.compute_capability))
        plans = candidate_plans(setup)
        assert len({plan.plan_id for plan in plans}) == len(plans)
        for plan in plans:
            validate(plan, setup)
        assert sharing_plans(setup)
        assert splitting_plans(setup)
        assert len(auto_tiles(setup)) == 2


def test_candidates_without_tiles():
    with pytest.raises(ValueError, match="holds none of no tiles"):
        unsliced_plans(replace(SETUP, variants=()))
    tiny = replace(H100, smem_per_sm_bytes=1000)
    with pytest.raises(ValueError, match="give a smaller tile variant"):
        unsliced_plans(replace(SETUP, device=tiny))


def test_snapping_leaves_room_for_another_context():
    assert [snap_sms(sms, H100) for sms in (0, 33, 37, 500)] == [8, 32, 40, 120]


def test_placements_are_the_two_kinds():
    assert {type(plan.placement) for plan in candidate_plans(SETUP)} == {ByTokens, Pinned}
