"""How fast the simulator is: `pytest -m benchmark tests/sim`. Groups: slices, layer, run.

Times are the process's own: what else a machine does is no part of a rate per core.
"""

from time import process_time
from typing import Any

import numpy as np
import pytest

from expertslice.policies.contract import DeviceSpec, Plan, Setup
from expertslice.policies.cost import CostModel
from expertslice.policies.fluid import Fluid
from expertslice.policies.loop import drive
from expertslice.policies.rates import Segment
from expertslice.sim.backend import SimBackend
from expertslice.traces.schema import MoeSpec

pytestmark = pytest.mark.benchmark


@pytest.fixture
def large(device: DeviceSpec, setup: Setup) -> tuple[Setup, CostModel]:
    model = MoeSpec(name="large", num_layers=16, num_experts=32, top_k=4, d_model=2048, d_ff=(4096,))
    setup = Setup(device=device, model=model, variants=setup.variants)
    return setup, CostModel(device=device, model=model, variants=setup.variants)


@pytest.mark.benchmark(group="slices", timer=process_time)
def test_kernels_beside_each_other_on_two_slices(benchmark: Any, truth: CostModel, plans: dict[str, Plan]):
    shares = truth.shares(plans["sm_budget"].layout)
    chain = [Segment(1000.0, 0.6, 0.2, 0.1, 2000.0, kernel) for kernel in range(500)]
    benchmark(lambda: Fluid(shares).run([chain, chain]))


@pytest.mark.benchmark(group="layer", timer=process_time)
@pytest.mark.parametrize("name", ["unsliced", "sm_budget", "green_context", "stealing", "mig"])
def test_closed_form_of_a_step(
    benchmark: Any, large: tuple[Setup, CostModel], plans: dict[str, Plan], steps: Any, name: str
):
    setup, truth = large
    pool = [step.counts_LE for step in steps(setup.model, 20, 2048)]
    benchmark(lambda: [truth.step_ns(plans[name], counts_LE) for counts_LE in pool])
    benchmark.extra_info["layer_steps_per_s"] = 20 * 16 / benchmark.stats["mean"]


@pytest.mark.benchmark(group="layer", timer=process_time)
def test_belief_of_a_step(benchmark: Any, large: tuple[Setup, CostModel], plans: dict[str, Plan]):
    setup, _ = large
    belief = CostModel(device=setup.device, model=setup.model, variants=setup.variants, detail="roofline")
    counts_LE = np.full((16, 32), 256, dtype=np.int32)
    benchmark(lambda: belief.step_ns(plans["sm_budget"], counts_LE))


@pytest.mark.benchmark(group="run", timer=process_time)
@pytest.mark.parametrize("name", ["unsliced", "streams", "sm_budget", "green_context", "mig"])
def test_a_run_on_counts_that_never_repeat(
    benchmark: Any, large: tuple[Setup, CostModel], plans: dict[str, Plan], steps: Any, fixed: Any, name: str
):
    setup, truth = large
    trace = list(steps(setup.model, 100, 2048))
    benchmark.pedantic(
        lambda: drive(fixed(plans[name]), SimBackend(truth), trace, setup, on_record=lambda _: None), rounds=5
    )
    rate = 100 * 16 / benchmark.stats["min"]
    benchmark.extra_info["layer_steps_per_s"] = rate
    assert rate > 5000, "a loaded machine halves the 10,000 layer-steps per second that the simulator promises"
