"""The one loop: observe, decide, apply, submit, drain. The same for every backend and every policy."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..traces.schema import RoutedStep
from .contract import Backend, EnergyWindow, Observation, Plan, Policy, Setup, StepRecord
from .layouts import fallback_plan

OnPolicyError = Literal["raise", "unsliced"]


class PolicyError(ValueError):
    """A policy raised, or returned a plan that the device cannot hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriveResult:
    """What a run leaves beside its records."""

    num_steps: int
    energy: tuple[EnergyWindow, ...]
    policy_errors: int
    """Decisions replaced by the unsliced plan."""


def deployable_control(policy: Policy[Any], setup: Setup) -> Setup:
    """Return the setup a policy runs under: one that foresees decides for the coming step itself, free of charge."""
    if not policy.foresees:
        return setup
    control = replace(setup.control, every_steps=1, delay_steps=0, plan_ns=0, free_switches=True)
    return replace(setup, control=control)


@dataclass
class _Decisions:
    """One policy's decisions over a run: its state, its errors, and who hears of them."""

    policy: Policy[Any]
    backend: Backend
    setup: Setup
    on_decision: Callable[[Observation, Plan], None] | None
    on_policy_error: OnPolicyError
    state: Any
    errors: int = 0

    def decide(self, step: RoutedStep) -> None:
        """Observe, decide and enqueue the plan."""
        obs = self.backend.observe()
        if self.policy.foresees:
            obs = replace(obs, coming_LE=step.counts_LE)
        try:
            plan, self.state = self.policy.plan(obs, self.state)
            self.backend.apply(plan)
        except Exception as error:
            plan = self._unsliced(error, obs.step)
        if self.on_decision is not None:
            self.on_decision(obs, plan)

    def _unsliced(self, error: Exception, step: int) -> Plan:
        name = type(self.policy).__name__
        if self.on_policy_error == "raise":
            raise PolicyError(f"{name} at step {step}: {error}") from error
        self.errors += 1
        if self.errors == 1:
            warnings.warn(f"{name} at step {step}: {error}; running unsliced", stacklevel=4)
        plan = fallback_plan(self.setup)
        self.backend.apply(plan)
        return plan


def drive(
    policy: Policy[Any],
    backend: Backend,
    steps: Iterable[RoutedStep],
    setup: Setup,
    *,
    on_record: Callable[[StepRecord], None],
    on_decision: Callable[[Observation, Plan], None] | None = None,
    on_policy_error: OnPolicyError = "raise",
) -> DriveResult:
    """Run a policy over steps on a backend, handing every finished step to `on_record` in order.

    A plan that takes effect later (delay_steps >= 1) is decided after its step has been submitted, so that the device
    works while the host decides; one that takes effect at once is decided before.

    Raises:
        PolicyError: the policy raised or returned an invalid plan, and `on_policy_error` is "raise".
        ValueError: the policy foresees and the backend offers no foresight.
    """
    if policy.foresees and not backend.foresight:
        raise ValueError(f"{type(policy).__name__} foresees the coming step, which only the simulator can offer")
    setup = deployable_control(policy, setup)
    control = setup.control
    decisions = _Decisions(policy, backend, setup, on_decision, on_policy_error, policy.init(setup))
    backend.open(setup, policy.layouts(setup))
    num_steps = 0
    try:
        for step in steps:
            due = num_steps % control.every_steps == 0
            if due and control.delay_steps == 0:
                decisions.decide(step)
            backend.submit(step)
            if due and control.delay_steps > 0:
                decisions.decide(step)
            num_steps += 1
            for record in backend.drain():
                on_record(record)
        for record in backend.drain(wait=True):
            on_record(record)
    finally:
        energy = backend.close()
    return DriveResult(num_steps=num_steps, energy=tuple(energy), policy_errors=decisions.errors)
