"""Every shipped policy keeps the contract, and the contract's suite catches those that break it."""

import random
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pytest

from expertslice.policies.contract import Pinned, Plan
from expertslice.policies.dynamic import Dynamic
from expertslice.policies.hot_cold import HotCold
from expertslice.policies.layouts import one_slice_plan, unsliced_layout
from expertslice.policies.oracle import Oracle
from expertslice.policies.proportional import Proportional
from expertslice.policies.registry import POLICIES
from expertslice.policies.static import Static
from expertslice.policies.testing import PolicyContract
from expertslice.policies.unsliced import Unsliced


class TestUnsliced(PolicyContract):
    @pytest.fixture(params=["auto", "64x128x64w4s4"])
    def policy(self, request):
        return Unsliced(tile=request.param)


class TestStatic(PolicyContract):
    label_free = False  # The paper's rule pins by expert id.

    @pytest.fixture(
        params=[
            Static(),
            Static(mechanism="sm_budget", num_slices=3),
            Static(mechanism="shared", num_slices=2),
            Static(mechanism="mig", num_slices=4),
        ],
        ids=lambda policy: policy.mechanism,
    )
    def policy(self, request):
        return request.param


class TestStaticByAllocator(PolicyContract):
    @pytest.fixture
    def policy(self):
        return Static(placement="allocator")


class TestProportional(PolicyContract):
    @pytest.fixture(params=[2, 3])
    def policy(self, request):
        return Proportional(num_slices=request.param)


class TestDynamic(PolicyContract):
    @pytest.fixture
    def policy(self):
        return Dynamic(hold_steps=0)


class TestHotCold(PolicyContract):
    @pytest.fixture(params=[True, False], ids=["guarded", "unguarded"])
    def policy(self, request):
        return HotCold(guarded=request.param)


class TestOracle(PolicyContract):
    label_free = False  # Its set has the static plans, which pin by expert id.

    @pytest.fixture
    def policy(self):
        return Oracle()


def test_every_shipped_policy_is_tested():
    tested = {Unsliced, Static, Proportional, Dynamic, HotCold, Oracle}
    assert set(POLICIES.values()) == tested


@dataclass(frozen=True, slots=True, kw_only=True)
class Honest:
    """A policy that keeps the contract; the broken ones differ from it in one thing."""

    foresees: ClassVar[bool] = False
    reads_clock: ClassVar[bool] = False

    tile: str = "64x128x64w4s4"

    def init(self, setup):
        return setup

    def layouts(self, setup):
        return (unsliced_layout(setup, self.tile),)

    def plan(self, obs, state):
        return one_slice_plan(self.layouts(state)[0]), state


class MutatesObservation(Honest):
    def plan(self, obs, state):
        obs.counts_HLE[...] = 0
        return Honest.plan(self, obs, state)


class GlobalRandom(Honest):
    def plan(self, obs, state):
        plan, state = Honest.plan(self, obs, state)
        return replace(plan, tile_order=random.choice(["expert", "heavy"])), state


class GlobalNumpyRandom(Honest):
    def plan(self, obs, state):
        plan, state = Honest.plan(self, obs, state)
        return replace(plan, steal=bool(np.random.rand() < 2)), state  # noqa: NPY002


class UndeclaredLayout(Honest):
    def plan(self, obs, state):
        return one_slice_plan(unsliced_layout(state, "64x64x64w4s4")), state


class ReadsClock(Honest):
    def plan(self, obs, state):
        plan, state = Honest.plan(self, obs, state)
        return replace(plan, steal=obs.now_ns % 2 == 0), state


class ReadsTheFuture(Honest):
    def plan(self, obs, state):
        plan, state = Honest.plan(self, obs, state)
        return replace(plan, steal=obs.coming_LE is not None), state


class InvalidIds(Honest):
    def plan(self, obs, state):
        ids_LE = np.ones((state.model.num_layers, state.model.num_experts), dtype=np.int16)
        return Plan(layout=self.layouts(state)[0], placement=Pinned(slice_of_expert_LE=ids_LE)), state


class PrefersExpertZero(Honest):
    def plan(self, obs, state):
        plan, state = Honest.plan(self, obs, state)
        heavy = bool(obs.counts_HLE.size and obs.counts_HLE[-1, 0, 0] > obs.counts_HLE[-1, 0].mean())
        return replace(plan, steal=heavy), state


class NoLayouts(Honest):
    def layouts(self, setup):
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembers(Honest):
    memory: list[int] = field(default_factory=list)

    def plan(self, obs, state):
        self.memory.append(obs.step)
        plan, state = Honest.plan(self, obs, state)
        return replace(plan, steal=len(self.memory) > 1), state


@dataclass(frozen=True, kw_only=True)
class ConvertsParameters(Honest):
    tiles: tuple[str, ...] = ("64x128x64w4s4",)

    def __post_init__(self):
        object.__setattr__(self, "tiles", [*self.tiles])


SUITE = [name for name in dir(PolicyContract) if name.startswith("test_")]


def failures(policy):
    """Return the suite's tests that a policy fails, with what they say."""
    found = {}
    for name in SUITE:
        try:
            getattr(PolicyContract(), name)(policy)
        except AssertionError as error:
            found[name] = str(error)
    return found


def test_an_honest_policy_passes():
    assert failures(Honest()) == {}


@pytest.mark.parametrize(
    ("policy", "test", "says"),
    [
        (MutatesObservation(), "test_calls_are_pure", "changed its observation"),
        (GlobalRandom(), "test_calls_are_pure", "global generator"),
        (GlobalNumpyRandom(), "test_calls_are_pure", "global generator"),
        (UndeclaredLayout(), "test_plans_are_valid_and_declared", r"layouts\(\) did not return"),
        (ReadsClock(), "test_flags_are_true", "reads_clock is False"),
        (ReadsTheFuture(), "test_flags_are_true", "foresees is False"),
        (InvalidIds(), "test_plans_are_valid_and_declared", "the layout has slices 0..0"),
        (PrefersExpertZero(), "test_relabelling_experts_relabels_the_plan", "renaming experts"),
        (NoLayouts(), "test_declares_layouts", "no layouts"),
        (Remembers(), "test_calls_are_pure", "changed the policy"),
        (ConvertsParameters(), "test_constructor_only_stores", "changes tiles"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Honest) else None,
)
def test_the_suite_catches(policy, test, says):
    with pytest.raises(AssertionError, match=says):
        getattr(PolicyContract(), test)(policy)
