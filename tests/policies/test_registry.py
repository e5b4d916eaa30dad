"""Policies by name, and their parameters as text."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar, Literal

import pytest

from expertslice.policies import registry
from expertslice.policies.hot_cold import HotCold
from expertslice.policies.registry import POLICIES, describe, make_policy, policy_names
from expertslice.policies.static import Static


def test_names_make_policies():
    assert policy_names()[:6] == ("unsliced", "static", "proportional", "dynamic", "hot_cold", "oracle")
    for name, cls in POLICIES.items():
        assert make_policy(name) == cls()


def test_parameters_are_read_by_type():
    policy = make_policy("hot_cold", {"min_gain": "0.02", "guarded": "false", "plan_every": "8"})
    assert policy == HotCold(min_gain=0.02, guarded=False, plan_every=8)
    assert make_policy("hot_cold", {"min_gain": 1, "guarded": True}) == HotCold(min_gain=1.0)
    assert make_policy("static", {"mechanism": "mig"}) == Static(mechanism="mig")
    assert make_policy("proportional", {"shares": "0.25, 0.5"}).shares == (0.25, 0.5)


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("hot_gold", {}, r"did you mean 'hot_cold'\?, or give module:Class"),
        ("hot_cold", {"gain": 1}, "HotCold has no parameter 'gain'; it has .*guarded, min_gain"),
        ("hot_cold", {"min_gain": "much"}, "min_gain is 'much'; give a value of type float"),
        ("hot_cold", {"guarded": "maybe"}, "guarded is 'maybe'; give true or false"),
        ("hot_cold", {"plan_every": 1.5}, "plan_every is 1.5; give a value of type int"),
        ("hot_cold", {"plan_every": True}, "plan_every is True; give a value of type int"),
        ("static", {"mechanism": "magic"}, "mechanism is 'magic'; allowed are shared, sm_budget, green_context, mig"),
        ("no.such.module:Policy", {}, "cannot be imported"),
        ("expertslice.policies.static:Nothing", {}, "cannot be imported"),
        ("expertslice.policies.static:round_robin", {}, "it must be a frozen dataclass"),
        ("expertslice.policies.contract:Slice", {}, "lacks init, layouts, plan, foresees, reads_clock"),
    ],
)
def test_refuses(name, params, says):
    with pytest.raises(ValueError, match=says):
        make_policy(name, params)


def test_a_class_by_its_module():
    assert make_policy("expertslice.policies.static:Static", {"num_slices": "2"}) == Static(num_slices=2)


def test_entry_points_add_names(monkeypatch):
    point = EntryPoint(name="mine", value="expertslice.policies.hot_cold:HotCold", group=registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    assert policy_names()[-1] == "mine"
    assert make_policy("mine", {"plan_every": "4"}) == HotCold(plan_every=4)
    with pytest.raises(ValueError, match="did you mean 'mine'"):
        make_policy("mina")


def test_describe():
    found = describe("static")
    assert found["summary"] == "Fixed slices and pinned experts: the paper's static baseline."
    assert (found["name"], found["foresees"], found["reads_clock"]) == ("static", False, False)
    types = {p["name"]: (p["type"], p["default"]) for p in found["parameters"]}
    assert types["num_slices"] == ("int", 4)
    assert types["placement"] == ("round_robin | allocator", "round_robin")
    assert all(describe(name)["summary"] for name in policy_names())


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    foresees: ClassVar[bool] = False
    reads_clock: ClassVar[bool] = False
    must: int
    mode: Literal["a", "b"] = "a"

    def init(self, setup): ...
    def layouts(self, setup): ...
    def plan(self, obs, state): ...


def test_missing_parameters_are_named():
    with pytest.raises(ValueError, match="Needs needs must; set it"):
        registry.build_policy(Needs, {})
    assert registry.build_policy(Needs, {"must": "3"}).must == 3
