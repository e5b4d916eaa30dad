"""The reasons behind a ranking: what of a gain is the control's own doing."""

import re
from dataclasses import replace

import numpy as np
import pytest

from expertslice.experiments.simulate import World
from expertslice.experiments.why import _control
from expertslice.policies.candidates import unsliced_plans
from expertslice.policies.data import load_device
from expertslice.traces.models import load_model
from expertslice.traces.schema import RoutedStep


@pytest.fixture(scope="module")
def priced():
    world = World(device=load_device("h100-sxm5-80gb"), model=replace(load_model("mixtral-8x7b"), num_layers=2))
    truth = world.truth()
    counts_LE = np.random.default_rng(0).multinomial(600, np.full(8, 1 / 8), size=2).astype(np.int32)
    steps = [RoutedStep(step=0, phase="mixed", counts_LE=counts_LE, num_tokens=300)]
    controls = unsliced_plans(world.setup())
    other_L = (truth.model.other_work(300),) * 2
    cost = {plan.plan_id: truth.step_ns(plan, counts_LE, other_L) for plan in controls}
    return truth, steps, sorted(controls, key=lambda plan: cost[plan.plan_id]), cost


def test_a_badly_tuned_control_is_told_with_what_it_loses(priced):
    truth, steps, controls, cost = priced
    best, worst = controls[0], controls[-1]
    (said,) = _control(truth, worst, steps, controls)
    lost = 1 - cost[best.plan_id] / cost[worst.plan_id]
    assert lost > 0.05
    assert worst.layout.slices[0].up in said
    assert best.layout.slices[0].up in said
    assert float(re.search(r"would save ([\d.]+) %", said).group(1)) == pytest.approx(100 * lost, abs=0.1)


def test_a_well_tuned_control_is_not_spoken_of(priced):
    truth, steps, controls, _ = priced
    assert _control(truth, controls[0], steps, controls) == []
