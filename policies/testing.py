"""The contract of a policy as tests to inherit: a subclass with a `policy` fixture gets them all.

    class TestMine(PolicyContract):
        @pytest.fixture
        def policy(self):
            return MyPolicy()

Every failure says what the policy did, in which case, and what it must not do. Nothing here imports pytest.

Shape letters: H steps of history, L MoE layers, E routed experts, S slices of a layout.
"""

import pickle
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, ClassVar, cast

import numpy as np

from ..traces.schema import I32, Ints, MoeSpec
from .contract import ByTokens, Observation, Pinned, Plan, Policy, Setup
from .cost import CostModel
from .data import load_device, load_variants
from .layouts import fallback_plan, one_slice_plan
from .validate import PlanError, validate

NUM_STEPS = 3
"""Steps that a policy is driven in every case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A device, a model, with or without a belief, and a kind of load."""

    name: str
    setup: Setup
    counts_NLE: I32
    """Past loads, newest last; N may be 0."""


def canonical(value: object) -> bytes:
    """Return bytes that are equal for equal values, arrays and nested dataclasses included."""
    if isinstance(value, np.ndarray):
        return repr((value.dtype.str, value.shape)).encode() + value.tobytes()
    if is_dataclass(value) and not isinstance(value, type):
        # What a cost model remembers of its results is no part of its value.
        kept = [f for f in fields(value) if f.compare or not isinstance(value, CostModel)]
        parts = [canonical(getattr(value, f.name)) for f in kept]
        return type(value).__name__.encode() + b"(" + b",".join(parts) + b")"
    if isinstance(value, (tuple, list)):
        return b"[" + b",".join(canonical(one) for one in cast("list[object]", value)) + b"]"
    if isinstance(value, (dict, set, frozenset)):
        members = cast("dict[object, object]", value).items() if isinstance(value, dict) else cast("set[object]", value)
        return b"{" + b",".join(sorted(canonical(one) for one in members)) + b"}"
    plain = value is None or isinstance(value, (str, bytes, int, float, np.generic))
    return repr(value).encode() if plain else pickle.dumps(value)


@cache
def setups() -> tuple[tuple[str, Setup], ...]:
    """Return the setups that every policy must serve: several shapes and devices, with and without a belief."""
    shapes = {
        "32x4": MoeSpec(name="32x4", num_layers=3, num_experts=32, top_k=4, d_model=768, d_ff=(1024,)),
        "8x2": MoeSpec(name="8x2", num_layers=1, num_experts=8, top_k=2, d_model=512, d_ff=(1024,), kind="relu3"),
        "128x8": MoeSpec(name="128x8", num_layers=2, num_experts=128, top_k=8, d_model=2048, d_ff=(768,)),
    }
    found: list[tuple[str, Setup]] = []
    for device in (load_device("h100-sxm5-80gb"), load_device("a100-sxm4-80gb")):
        variants = load_variants(device.compute_capability)
        for name, model in shapes.items():
            belief = CostModel(device, model, variants, "roofline")
            setup = Setup(device=device, model=model, variants=variants, belief=belief, seed=7)
            found.append((f"{device.name}, {name} experts", setup))
    name, setup = found[0]
    return (*found, (f"{name}, no belief", replace(setup, belief=None)))


def loads(model: MoeSpec, tokens: int, rng: np.random.Generator) -> dict[str, I32]:
    """Return past loads [N, L, E] by name: nothing, one expert, few, all alike, skewed."""
    rows, shape = tokens * model.top_k, (4, model.num_layers, model.num_experts)
    single, few = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    single[:, :, -1] = 1
    few[:, :, : model.top_k] = tokens
    share_E = rng.dirichlet(np.full(model.num_experts, 0.3))
    return {
        "no history": np.zeros((0, *shape[1:]), np.int32),
        "idle": np.zeros(shape, np.int32),
        "single expert": single,
        "one hot set": few,
        "even": np.full(shape, -(-rows // model.num_experts), np.int32),
        "skewed": rng.multinomial(rows, share_E, size=shape[:2]).astype(np.int32),
    }


def cases() -> Iterator[Case]:
    """Yield every setup with every load."""
    for index, (setup_name, setup) in enumerate(setups()):
        rng = np.random.default_rng([setup.seed, index])
        for tokens in (16, 2048):
            for load_name, counts_NLE in loads(setup.model, tokens, rng).items():
                if load_name in ("no history", "idle", "single expert") and tokens == 16:
                    continue  # The number of tokens changes nothing in these.
                yield Case(name=f"{setup_name}, {load_name} of {tokens} tokens", setup=setup, counts_NLE=counts_NLE)


def observe(case: Case, step: int, plan: Plan | None, *, foresees: bool, clock_seed: int = 0) -> Observation:
    """Return what a policy would see at a step after `plan` ran; `clock_seed` draws the times and the power."""
    rng = np.random.default_rng([case.setup.seed, step, clock_seed])
    shape = case.setup.model.num_layers, case.setup.model.num_experts
    num_slices = plan.layout.num_slices if plan is not None else 0
    coming_LE = case.counts_NLE[-1].copy() if len(case.counts_NLE) else np.zeros(shape, np.int32)
    return Observation(
        step=step,
        counts_HLE=case.counts_NLE.copy(),
        now_ns=int(rng.integers(1, 10**9)),
        plan_id=(plan or fallback_plan(case.setup)).plan_id,
        step_ns=int(rng.integers(1, 10**7)) if plan is not None else 0,
        busy_ns_LS=rng.integers(1, 10**6, (shape[0], num_slices)),
        power_w=float(rng.uniform(100, 700)),
        queued_tokens=int(rng.integers(0, 10**4)),
        coming_LE=coming_LE if foresees else None,
    )


def drive_case(policy: Policy[Any], case: Case, *, clock_seed: int = 0) -> list[Plan]:
    """Return the plans of a few steps, each seen as the outcome of the one before."""
    state, plans = policy.init(case.setup), list[Plan]()
    for step in range(NUM_STEPS):
        obs = observe(case, step, plans[-1] if plans else None, foresees=policy.foresees, clock_seed=clock_seed)
        plan, state = policy.plan(obs, state)
        plans.append(plan)
    return plans


def plan_ids(policy: Policy[Any], case: Case, *, clock_seed: int = 0) -> list[str]:
    """Return the names of the plans of a few steps."""
    return [plan.plan_id for plan in drive_case(policy, case, clock_seed=clock_seed)]


class PolicyContract:
    """Tests that every policy must pass. Subclasses give a `policy` fixture and may relax what they must."""

    label_free: ClassVar[bool] = True
    """Whether renaming experts renames the plan and changes nothing else; False for rules on expert ids."""

    def test_constructor_only_stores(self, policy: Policy[Any]) -> None:
        assert is_dataclass(policy), f"{type(policy).__name__} is no dataclass; make it one, frozen and keyword-only"
        clone = replace(policy)
        for f in fields(policy):
            same = getattr(clone, f.name) is getattr(policy, f.name)
            assert same, f"the constructor changes {f.name}; store parameters as given and compute in init"
        assert clone == policy

    def test_declares_layouts(self, policy: Policy[Any]) -> None:
        for name, setup in setups():
            layouts = policy.layouts(setup)
            assert layouts, f"{name}: no layouts; declare every layout that plans use"
            assert layouts == policy.layouts(setup), f"{name}: two calls of layouts differ"
            assert len(set(layouts)) == len(layouts), f"{name}: a layout is declared twice"
            for layout in layouts:
                validate(one_slice_plan(layout), setup)

    def test_plans_are_valid_and_declared(self, policy: Policy[Any]) -> None:
        for case in cases():
            declared = policy.layouts(case.setup)
            for plan in drive_case(policy, case):
                try:
                    validate(plan, case.setup)
                except PlanError as error:
                    raise AssertionError(f"{case.name}: {error}") from None
                assert plan.layout in declared, f"{case.name}: plan uses a layout that layouts() did not return"

    def test_calls_are_pure(self, policy: Policy[Any]) -> None:
        for case in cases():
            state = policy.init(case.setup)
            obs = observe(case, 0, None, foresees=policy.foresees)
            before = canonical(obs), canonical(state), canonical(policy)
            dice = random.getstate(), canonical(np.random.get_state())  # noqa: NPY002
            first = policy.plan(obs, state)
            assert canonical(obs) == before[0], f"{case.name}: plan() changed its observation; copy before writing"
            assert canonical(state) == before[1], f"{case.name}: plan() changed its state; return a new one"
            assert canonical(policy) == before[2], f"{case.name}: plan() changed the policy; keep memory in the state"
            rolled = dice != (random.getstate(), canonical(np.random.get_state()))  # noqa: NPY002
            assert not rolled, f"{case.name}: plan() drew from a global generator; use default_rng([seed, step])"
            second = policy.plan(obs, state)
            assert first[0].plan_id == second[0].plan_id, f"{case.name}: the same inputs gave two plans"
            assert canonical(first[1]) == canonical(second[1]), f"{case.name}: the same inputs gave two states"

    def test_instances_agree(self, policy: Policy[Any]) -> None:
        for case in cases():
            same = plan_ids(policy, case) == plan_ids(replace(cast("Any", policy)), case)
            assert same, f"{case.name}: two instances with the same parameters disagree; keep nothing outside the state"

    def test_flags_are_true(self, policy: Policy[Any]) -> None:
        for case in cases():
            if not policy.reads_clock:
                same = plan_ids(policy, case) == plan_ids(policy, case, clock_seed=1)
                assert same, f"{case.name}: plans change with the clock although reads_clock is False; set it True"
            if not policy.foresees:
                obs = observe(case, 0, None, foresees=False)
                coming_LE = np.random.default_rng(1).integers(0, 999, obs.counts_HLE.shape[1:], dtype=np.int32)
                plan, _ = policy.plan(obs, policy.init(case.setup))
                shown, _ = policy.plan(replace(obs, coming_LE=coming_LE), policy.init(case.setup))
                assert plan.plan_id == shown.plan_id, f"{case.name}: plans read coming_LE although foresees is False"

    def test_relabelling_experts_relabels_the_plan(self, policy: Policy[Any]) -> None:
        if not self.label_free:
            return
        for name, setup in setups():
            rng = np.random.default_rng(setup.seed)
            layers, experts = setup.model.num_layers, setup.model.num_experts
            # No two experts of a layer carry the same load, in any sum over steps.
            ranks_LE = rng.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)
            counts_LE = (3 + 2 * ranks_LE + ranks_LE**2).astype(np.int32)
            to_LE = rng.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)
            renamed_LE = np.zeros_like(counts_LE)
            np.put_along_axis(renamed_LE, to_LE, counts_LE, axis=1)
            given, renamed = (
                drive_case(policy, Case(name=name, setup=setup, counts_NLE=np.stack([one] * 3)))
                for one in (counts_LE, renamed_LE)
            )
            for plan, other in zip(given, renamed, strict=True):
                assert is_relabelled(plan, other, to_LE), f"{name}: renaming experts changed more than their names"


def is_relabelled(plan: Plan, other: Plan, to_LE: Ints) -> bool:
    """Return whether `other` is `plan` with expert e of layer l called to_LE[l, e]."""
    if plan.layout != other.layout or (plan.tile_order, plan.steal) != (other.tile_order, other.steal):
        return False
    if isinstance(plan.placement, ByTokens) or isinstance(other.placement, ByTokens):
        return plan.placement == other.placement
    assert isinstance(plan.placement, Pinned)
    renamed_LE = np.take_along_axis(other.placement.slice_of_expert_LE, to_LE, axis=1)
    return bool((renamed_LE == plan.placement.slice_of_expert_LE).all())
