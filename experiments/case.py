"""What is compared: options resolved to a device, a model, policies and steps, and checked before the first step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..policies.contract import MECHANISMS, Mechanism, Policy
from ..policies.data import load_device, nearest
from ..policies.loop import declared_layouts
from ..traces.compose import Composition
from ..traces.schema import StepSource
from ..traces.trace import RoutingTrace
from .inputs import BUNDLED, Opened, choose_model, choose_policies, choose_segment, in_memory, open_source
from .ranking import REFERENCE
from .runs import DEFAULT_ROOT
from .simulate import World
from .workload import Limited, Survey, composition_like, survey

NUM_WINDOWS = 4
WINDOW_LAYERS = 96
"""Layers of all steps of a window. Windows are what model errors are drawn on and reasons are computed from."""
LEAST_STEPS = 4
FEW_TOKENS = 4
"""Steps of fewer tokens than this are single requests rather than batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked for."""

    trace: str | None = None
    device: str = "h100-sxm5-80gb"
    policies: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    model: str | None = None
    fit_routing: str | None = None
    mechanisms: tuple[str, ...] = ()
    segment: str | None = None
    steps: int | None = None
    batch_size: int = 64
    seed: int = 0
    jobs: int = 1
    out: Path = DEFAULT_ROOT
    report: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Everything that is simulated, resolved and checked before the first step."""

    options: Options
    world: World
    opened: Opened
    source: StepSource
    survey: Survey
    rebatch: tuple[RoutingTrace, Composition] | None
    """Requests, and how they are batched; None where the trace holds too few, or counts alone."""
    policies: dict[str, Policy[Any]]
    notes: tuple[str, ...]


def prepare(options: Options) -> Case:
    """Resolve names to objects and look at the trace once.

    Raises:
        ValueError: something is unknown or does not fit; the message says what to give instead.
    """
    device = load_device(options.device)
    policies = choose_policies(options.policies, options.settings)
    mechanisms = _mechanisms(options.mechanisms)
    if options.fit_routing is not None:
        from .fitted import fitted_source

        opened, source, rebatch, model, notes = fitted_source(options)
    else:
        opened = choose_segment(open_source(options.trace or BUNDLED), options.segment)
        model, said = choose_model(opened.source, options.model)
        source, notes = opened.source, (*opened.notes, *said)
        rebatch = _rebatch(source)
    if options.steps is not None and options.steps < source.num_steps:
        source = Limited(source=source, limit=options.steps)
    world = World(device=device, model=model, mechanisms=mechanisms, seed=options.seed)
    look = survey(source, num_windows=NUM_WINDOWS, window_steps=max(LEAST_STEPS, WINDOW_LAYERS // source.num_layers))
    policies, left_out = _runnable(policies, world, strict=bool(options.policies))
    return Case(
        options=options,
        world=world,
        opened=opened,
        source=source,
        survey=look,
        rebatch=rebatch,
        policies=policies,
        notes=(*notes, *_small_steps(look), *left_out),
    )


def _small_steps(look: Survey) -> tuple[str, ...]:
    tokens = look.num_tokens / look.num_steps
    if tokens >= FEW_TOKENS:
        return ()
    return (f"steps hold {tokens:.1f} tokens on average; `expertslice trace compose` makes batches of requests",)


def _rebatch(source: StepSource) -> tuple[RoutingTrace, Composition] | None:
    trace = in_memory(source)
    like = None if trace is None else composition_like(trace)
    return None if trace is None or like is None else (trace, like)


def _mechanisms(names: Sequence[str]) -> frozenset[Mechanism]:
    for name in names:
        if name not in MECHANISMS:
            raise ValueError(nearest("mechanism", name, MECHANISMS))
    return frozenset(m for m in MECHANISMS if not names or m in names)


def _runnable(
    policies: dict[str, Policy[Any]], world: World, *, strict: bool
) -> tuple[dict[str, Policy[Any]], tuple[str, ...]]:
    """Ask every policy for its layouts, so that one that cannot run here says so before the first step."""
    kept: dict[str, Policy[Any]] = {}
    notes: list[str] = []
    truth = world.truth()
    for name, policy in policies.items():
        try:
            declared_layouts(policy, world.setup(foresees=policy.foresees, truth=truth))
            kept[name] = policy
        except ValueError as error:
            if strict or name == REFERENCE:
                raise
            notes.append(f"{name} is left out: {error}")
    return kept, tuple(notes)
