"""The one loop: observe, decide, apply, submit, drain. The same for every backend and every policy."""

import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..traces.schema import RoutedStep
from .contract import Backend, EnergyWindow, Observation, Plan, Policy, Setup, SliceLayout, StepRecord
from .layouts import fallback_plan, one_slice_plan
from .validate import PlanError, validate

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
    late_plans: int = 0
    """Decisions that took too long: the plan before was kept."""


def deployable_control(policy: Policy[Any], setup: Setup) -> Setup:
    """Return the setup a policy runs under: one that foresees decides for the coming step itself, free of charge."""
    if not policy.foresees:
        return setup
    control = replace(setup.control, every_steps=1, delay_steps=0, plan_ns=0, free_switches=True)
    return replace(setup, control=control)


@contextmanager
def _blaming(policy: Policy[Any], where: str) -> Generator[None]:
    """Turn whatever a policy's own code raises into a `PolicyError`."""
    try:
        yield
    except Exception as error:
        raise PolicyError(f"{type(policy).__name__} {where}: {str(error) or type(error).__name__}") from error


def declared_layouts(policy: Policy[Any], setup: Setup) -> tuple[SliceLayout, ...]:
    """Return a policy's layouts, each checked against the device.

    Raises:
        PolicyError: the policy raised, or the device cannot hold one of them.
    """
    with _blaming(policy, "declares layouts"):
        layouts = policy.layouts(setup)
        for layout in layouts:
            validate(one_slice_plan(layout), setup)
    return layouts


@dataclass
class _Decisions:
    """One policy's decisions over a run: its state, its errors, and who hears of them."""

    policy: Policy[Any]
    backend: Backend
    setup: Setup
    on_decision: Callable[[Observation, Plan], None] | None
    on_policy_error: OnPolicyError
    limit: Callable[[], AbstractContextManager[None]]
    state: Any = None
    errors: int = 0
    late: int = 0
    plan: Plan | None = None
    """The last one decided."""

    def decide(self, step: RoutedStep) -> None:
        """Observe, decide and enqueue the plan."""
        obs = self.backend.observe()
        if self.policy.foresees:
            obs = replace(obs, coming_LE=step.counts_LE)
        try:
            plan = self._planned(obs)
        except PolicyError as error:
            if self.on_policy_error == "raise":
                raise
            self.errors += 1
            if self.errors == 1:
                warnings.warn(f"{error}; running unsliced", stacklevel=3)
            plan = fallback_plan(self.setup)
            self.backend.apply(plan)
        if self.on_decision is not None:
            self.on_decision(obs, plan)

    def _planned(self, obs: Observation) -> Plan:
        where = f"at step {obs.step}"
        with _blaming(self.policy, where):
            plan = self._in_time(obs)
            if not isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"plan() returned {type(plan).__name__} first; return a Plan and the state")
        try:
            self.backend.apply(plan)
        except PlanError as error:
            # Anything else that the backend raises is no fault of the policy's.
            raise PolicyError(f"{type(self.policy).__name__} {where}: {error}") from error
        self.plan = plan
        return plan

    def _in_time(self, obs: Observation) -> Plan:
        """Return the policy's plan, or its last one where this one takes too long."""
        try:
            with self.limit():
                plan, self.state = self.policy.plan(obs, self.state)
        except TimeoutError as error:
            if self.plan is None:
                raise
            self.late += 1
            if self.late == 1:
                warnings.warn(f"at step {obs.step}: {error}; keeping the plan before", stacklevel=2)
            return self.plan
        return plan


class Loop:
    """A policy and a backend, step by step: for whoever cannot give all steps at once.

    A plan that takes effect later (delay_steps >= 1) is decided after its step has been submitted, so that the device
    works while the host decides; one that takes effect at once is decided before.
    """

    def __init__(
        self,
        policy: Policy[Any],
        backend: Backend,
        setup: Setup,
        *,
        on_record: Callable[[StepRecord], None],
        on_decision: Callable[[Observation, Plan], None] | None = None,
        on_policy_error: OnPolicyError = "raise",
        limit: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Start the policy and open the backend.

        Raises:
            PolicyError: the policy raised or declares layouts that the device cannot hold.
            ValueError: the policy foresees and the backend offers no foresight.
        """
        if policy.foresees and not backend.foresight:
            raise ValueError(f"{type(policy).__name__} foresees the coming step, which only the simulator can offer")
        setup = deployable_control(policy, setup)
        self.num_steps = 0
        self._control, self._backend, self._on_record = setup.control, backend, on_record
        self._decisions = _Decisions(policy, backend, setup, on_decision, on_policy_error, limit)
        with _blaming(policy, "starts"):
            self._decisions.state = policy.init(setup)
        backend.open(setup, declared_layouts(policy, setup))

    @property
    def policy_errors(self) -> int:
        """Decisions replaced by the unsliced plan."""
        return self._decisions.errors

    @property
    def late_plans(self) -> int:
        """Decisions that took too long: the plan before was kept."""
        return self._decisions.late

    def submit(self, step: RoutedStep) -> None:
        """Run one step and decide where a decision is due.

        Raises:
            PolicyError: the policy raised or returned an invalid plan, and `on_policy_error` is "raise".
        """
        due = self.num_steps % self._control.every_steps == 0
        if due and self._control.delay_steps == 0:
            self._decisions.decide(step)
        self._backend.submit(step)
        if due and self._control.delay_steps > 0:
            self._decisions.decide(step)
        self.num_steps += 1
        self.drain()

    def drain(self, *, wait: bool = False) -> None:
        """Hand over the records of finished steps; of all steps when `wait`."""
        for record in self._backend.drain(wait=wait):
            self._on_record(record)


def drive(
    policy: Policy[Any],
    backend: Backend,
    steps: Iterable[RoutedStep],
    setup: Setup,
    *,
    on_record: Callable[[StepRecord], None],
    on_decision: Callable[[Observation, Plan], None] | None = None,
    on_policy_error: OnPolicyError = "raise",
    limit: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> DriveResult:
    """Run a policy over steps on a backend, handing every finished step to `on_record` in order.

    A decision runs inside `limit()`; where that raises TimeoutError the policy's last plan and state are kept.

    Raises:
        PolicyError: the policy raised or returned an invalid plan, and `on_policy_error` is "raise".
        ValueError: the policy foresees and the backend offers no foresight.
    """
    loop = Loop(
        policy,
        backend,
        setup,
        on_record=on_record,
        on_decision=on_decision,
        on_policy_error=on_policy_error,
        limit=limit,
    )
    try:
        for step in steps:
            loop.submit(step)
        loop.drain(wait=True)
    finally:
        energy = backend.close()
    return DriveResult(
        num_steps=loop.num_steps, energy=tuple(energy), policy_errors=loop.policy_errors, late_plans=loop.late_plans
    )
