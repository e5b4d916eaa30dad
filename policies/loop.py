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

    Raises:
        PolicyError: the policy raised or returned an invalid plan, and `on_policy_error` is "raise".
        ValueError: the policy foresees and the backend offers no foresight.
    """
    if policy.foresees and not backend.foresight:
        raise ValueError(f"{type(policy).__name__} foresees the coming step, which only the simulator can offer")
    setup = deployable_control(policy, setup)
    state = policy.init(setup)
    backend.open(setup, policy.layouts(setup))
    num_steps = policy_errors = 0
    energy: list[EnergyWindow] = []
    try:
        for step in steps:
            if num_steps % setup.control.every_steps == 0:
                obs = backend.observe()
                if policy.foresees:
                    obs = replace(obs, coming_LE=step.counts_LE)
                try:
                    plan, state = policy.plan(obs, state)
                    backend.apply(plan)
                except Exception as error:
                    if on_policy_error == "raise":
                        raise PolicyError(f"{type(policy).__name__} at step {obs.step}: {error}") from error
                    policy_errors += 1
                    plan = fallback_plan(setup)
                    backend.apply(plan)
                    if policy_errors == 1:
                        warnings.warn(f"{type(policy).__name__}: {error}; running unsliced", stacklevel=2)
                if on_decision is not None:
                    on_decision(obs, plan)
            backend.submit(step)
            num_steps += 1
            for record in backend.drain():
                on_record(record)
        for record in backend.drain(wait=True):
            on_record(record)
    finally:
        energy = backend.close()
    return DriveResult(num_steps=num_steps, energy=tuple(energy), policy_errors=policy_errors)
