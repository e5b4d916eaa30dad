"""Small models, loads and plans that the simulator's tests share."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from expertslice.policies.contract import (
    ByTokens,
    DeviceSpec,
    MigPlacement,
    Observation,
    Plan,
    Setup,
    SliceLayout,
    StepRecord,
)
from expertslice.policies.cost import CostModel
from expertslice.policies.data import load_device
from expertslice.policies.layouts import co_resident_layout, one_slice_plan, uniform_slice, unsliced_layout
from expertslice.policies.loop import drive
from expertslice.sim.backend import SimBackend
from expertslice.traces.schema import MoeSpec, OtherWork, RoutedStep

sys.path.insert(0, str(Path(__file__).parent))
from splits import COLD, HOT, WIDE

VARIANTS = (HOT, COLD, WIDE)


@pytest.fixture(scope="session")
def device() -> DeviceSpec:
    return load_device("h100-sxm5-80gb")


@pytest.fixture(scope="session")
def model() -> MoeSpec:
    return MoeSpec(name="test", num_layers=3, num_experts=16, top_k=4, d_model=1024, d_ff=(2048,))


@pytest.fixture
def setup(device: DeviceSpec, model: MoeSpec) -> Setup:
    return Setup(device=device, model=model, variants=VARIANTS)


@pytest.fixture
def truth(device: DeviceSpec, model: MoeSpec) -> CostModel:
    return CostModel(device=device, model=model, variants=VARIANTS)


class Fixed:
    """A policy that always returns one plan."""

    foresees = False
    reads_clock = False

    def __init__(self, plan: Plan, *, declared: bool = True, foresees: bool = False) -> None:
        self._plan, self._declared = plan, declared
        self.foresees = foresees
        self.seen: list[Observation] = []

    def init(self, setup: Setup) -> None:
        return None

    def layouts(self, setup: Setup) -> tuple[SliceLayout, ...]:
        return (self._plan.layout,) if self._declared else ()

    def plan(self, obs: Observation, state: None) -> tuple[Plan, None]:
        self.seen.append(obs)
        return self._plan, None


@pytest.fixture
def fixed() -> type[Fixed]:
    return Fixed


def draw_steps(
    model: MoeSpec,
    num_steps: int,
    num_tokens: int,
    seed: int = 0,
    other: tuple[OtherWork, ...] = (),
    every_ns: int | None = None,
) -> Iterator[RoutedStep]:
    rng = np.random.default_rng(seed)
    for step in range(num_steps):
        shares = rng.dirichlet(np.full(model.num_experts, 0.3), size=model.num_layers)
        counts = np.stack([rng.multinomial(num_tokens * model.top_k, share) for share in shares])
        yield RoutedStep(
            step=step,
            phase="mixed",
            counts_LE=counts.astype(np.int32),
            num_tokens=num_tokens,
            arrival_ns=None if every_ns is None else step * every_ns,
            other_L=(other,) * model.num_layers if other else (),
        )


@pytest.fixture
def steps() -> Callable[..., Iterator[RoutedStep]]:
    return draw_steps


def make_plans(setup: Setup) -> dict[str, Plan]:
    split = ByTokens(bounds=(64,), slice_ids=(0, 1))
    hot, cold = HOT.name, COLD.name
    streams = unsliced_layout(setup, cold).slices[0], unsliced_layout(setup, WIDE.name).slices[0]
    places = (MigPlacement(profile="3g.40gb", start=0), MigPlacement(profile="3g.40gb", start=4))
    sms = {p.name: p.sm_count for p in setup.device.mig_profiles}["3g.40gb"]
    instances = tuple(uniform_slice("mig", sms, tile, instance=i) for i, tile in enumerate((cold, hot)))
    apart = SliceLayout(slices=(uniform_slice("green_context", 32, cold), uniform_slice("green_context", 96, hot)))
    return {
        "unsliced": one_slice_plan(unsliced_layout(setup, hot)),
        "streams": Plan(layout=SliceLayout(slices=streams), placement=split, tile_order="light"),
        "sm_budget": Plan(layout=co_resident_layout(setup, (cold, hot)), placement=split, tile_order="heavy"),
        "stealing": Plan(layout=co_resident_layout(setup, (cold, hot)), placement=split, steal=True),
        "green_context": Plan(layout=apart, placement=split, tile_order="heavy"),
        "green_stealing": Plan(layout=apart, placement=split, steal=True),
        "mig": Plan(layout=SliceLayout(slices=instances, mig=places), placement=split),
    }


MECHANISMS = ("unsliced", "streams", "sm_budget", "stealing", "green_context", "green_stealing", "mig")


@pytest.fixture
def plans(setup: Setup) -> dict[str, Plan]:
    return make_plans(setup)


def run_all(policy: Fixed, truth: CostModel, setup: Setup, steps: Iterator[RoutedStep]) -> list[StepRecord]:
    records: list[StepRecord] = []
    drive(policy, SimBackend(truth), steps, setup, on_record=records.append)
    return records


@pytest.fixture
def run() -> Callable[..., list[StepRecord]]:
    return run_all
