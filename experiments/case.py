"""What is compared: options resolved to a device, a model, policies and steps, and checked before the first step."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from joblib import cpu_count

from ..policies.contract import MECHANISMS, Policy
from ..policies.data import load_device
from ..policies.loop import declared_layouts
from ..traces.compose import Composition
from ..traces.schema import MoeSpec, OtherWork, StepSource, nearest
from ..traces.trace import RoutingTrace
from .inputs import BUNDLED, Opened, choose_model, choose_policies, choose_segment, in_memory, open_source
from .ranking import REFERENCE
from .simulate import World
from .workload import Survey, composition_like, survey

Chosen = tuple[Opened, StepSource, tuple[RoutingTrace, Composition] | None, MoeSpec, tuple[str, ...]]
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
    device_model: Path | None = None
    policies: Sequence[str] = ()
    settings: Sequence[str] = ()
    model: str | None = None
    beside: str | None = None
    fit_routing: str | None = None
    mechanisms: Sequence[str] = ()
    segment: str | None = None
    steps: int | None = None
    batch_size: int = 64
    seed: int = 0
    jobs: int = field(default_factory=cpu_count)
    out: Path = Path("runs")
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
    for name in options.mechanisms:
        if name not in MECHANISMS:
            raise ValueError(nearest("mechanism", name, MECHANISMS))
    opened, source, rebatch, model, notes = _chosen(options)
    if options.beside is not None:
        model = replace(model, beside=work_beside(options.beside))
    mechanisms = frozenset(options.mechanisms or MECHANISMS)
    world = World(device=device, model=model, mechanisms=mechanisms, seed=options.seed)
    if options.device_model is not None:
        world, said = _calibrated(world, options.device_model)
        notes = (*notes, said)
    window_steps = max(LEAST_STEPS, WINDOW_LAYERS // source.num_layers)
    look = survey(source, num_windows=NUM_WINDOWS, window_steps=window_steps, limit=options.steps)
    mean_tokens = look.num_tokens / look.num_steps
    if mean_tokens < FEW_TOKENS:
        many = "`expertslice trace compose` makes batches of requests"
        notes = (*notes, f"steps hold {mean_tokens:.1f} tokens on average; {many}")
    kept, left_out = _runnable(policies, world, strict=bool(options.policies))
    return Case(
        options=options,
        world=world,
        opened=opened,
        source=source,
        survey=look,
        rebatch=rebatch,
        policies=kept,
        notes=(*notes, *left_out),
    )


def _calibrated(world: World, path: Path) -> tuple[World, str]:
    """Return the world with a device model's truth and belief, and what to say of it."""
    from . import device_model

    found = device_model.load(path)
    found.check_device(world.device.name)
    held = found.held_out
    said = f"device model {path.name}: error {held['mape']:.1%} on {held['points']:.0f} points held out"
    device = replace(world.device, status="calibrated")
    return replace(world, device=device, residual=found.truth, believed=found.believed), said


def work_beside(text: str) -> OtherWork:
    """Return the other work that a text such as "550,0" names: GFLOP, and MB of memory traffic."""
    try:
        gflop, megabytes = map(float, text.split(","))
        return OtherWork(flops=round(gflop * 1e9), hbm_bytes=round(megabytes * 1e6), slice_id=1)
    except (ValueError, OverflowError):
        raise ValueError(
            f"--beside {text!r}; give GFLOP and MB of each layer, neither negative, such as 550,0"
        ) from None


def _chosen(options: Options) -> Chosen:
    """Return the trace as given, the steps to run, requests to batch anew, the model, and what to say."""
    if options.fit_routing is not None:
        from .fitted import fitted_source

        return fitted_source(options)
    opened = choose_segment(open_source(options.trace or BUNDLED), options.segment)
    model, said = choose_model(opened, options.model)
    trace = in_memory(opened.source)
    like = composition_like(trace) if trace else None
    rebatch = (trace, like) if trace and like else None
    return opened, opened.source, rebatch, model, (*opened.notes, *said)


def _runnable(
    policies: dict[str, Policy[Any]], world: World, *, strict: bool
) -> tuple[dict[str, Policy[Any]], list[str]]:
    """Ask every policy for its layouts, so that one that cannot run here says so before the first step."""
    kept: dict[str, Policy[Any]] = {}
    notes: list[str] = []
    truth = world.truth()
    for name, policy in policies.items():
        try:
            declared_layouts(policy, world.setup(truth if policy.foresees else None))
            kept[name] = policy
        except ValueError as error:
            if strict or name == REFERENCE:
                raise
            notes.append(f"{name} is left out: {error}")
    return kept, notes
