"""One policy over one list of steps in the simulator, kept small: sums, and 8 bytes a step. Knows no ranking.

Shape letters: L MoE layers, E experts, S slices, N steps.
"""

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..policies.contract import (
    MECHANISMS,
    Backend,
    Control,
    DeviceSpec,
    EnergyWindow,
    Mechanism,
    Observation,
    Plan,
    Policy,
    Setup,
    SliceLayout,
    StepRecord,
    TileVariant,
)
from ..policies.cost import CostModel
from ..policies.data import load_variants
from ..policies.layouts import fallback_plan
from ..policies.loop import drive
from ..policies.residual import Residual
from ..sim.backend import SimBackend
from ..traces.schema import PHASES, MoeSpec, OtherWork, RoutedStep
from .records import writing

KNOWN_PLANS = 64
"""Plans remembered to find a record's layout; records lag decisions by a few steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What every policy of a comparison shares."""

    device: DeviceSpec
    model: MoeSpec
    mechanisms: frozenset[Mechanism] = frozenset(MECHANISMS)
    control: Control = field(default_factory=Control)
    seed: int = 0
    believed: DeviceSpec | None = None
    """The device that policies believe they run on; None: the one they do."""
    residual: Residual | None = None
    """Of the truth: what measurement adds to its physics."""

    @property
    def variants(self) -> tuple[TileVariant, ...]:
        return load_variants(self.device.compute_capability)

    def truth(self, draw: int | None = None) -> CostModel:
        """Return the simulator's cost model: nominal, or under one draw of its errors."""
        truth = replace(self._model("tiles", self.device), residual=self.residual)
        return truth if draw is None else truth.perturbed(draw)

    def setup(self, foreseen: CostModel | None = None) -> Setup:
        """Return what a policy may know: the plain belief about the nominal device, or the truth where it foresees."""
        shared = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("believed", "residual")}
        belief = foreseen or self._model("roofline", self.believed or self.device)
        return Setup(**shared, variants=self.variants, belief=belief)

    def _model(self, detail: Literal["tiles", "roofline"], device: DeviceSpec) -> CostModel:
        return CostModel(device=device, model=self.model, variants=self.variants, detail=detail)


@dataclass(slots=True)
class LayoutUse:
    """How much one layout was used, and how long each of its slices was busy."""

    steps: int = 0
    step_ns: int = 0
    busy_ns_S: NDArray[np.int64] | int = 0


@dataclass(slots=True)
class Outcome:
    """What a run leaves in memory."""

    step_ns: array = field(default_factory=lambda: array("q"))
    phases: array = field(default_factory=lambda: array("b"))
    """Each step's index into `PHASES`."""
    slices: array = field(default_factory=lambda: array("h"))
    """How many each step ran on."""
    tokens: int = 0
    makespan_ns: int = 0
    reconfigurations: int = 0
    reconfigure_ns: int = 0
    captures: int = 0
    capture_ns: int = 0
    stall_ns: int = 0
    hbm_bytes: int = 0
    fallback_steps: int = 0
    layer_ns_L: NDArray[np.int64] | int = 0
    layouts: dict[SliceLayout, LayoutUse] = field(default_factory=dict[SliceLayout, LayoutUse])
    energy: tuple[EnergyWindow, ...] = ()

    def times(self) -> NDArray[np.float64]:
        """Return the step times, ns."""
        return np.frombuffer(self.step_ns, dtype=np.int64).astype(np.float64)

    def sliced(self) -> NDArray[np.bool_]:
        return np.frombuffer(self.slices, dtype=np.int16) > 1

    def unsliced_share(self) -> float:
        """Return the share of the steps that ran on one slice."""
        return float((~self.sliced()).mean())


class Collector:
    """Sums records as they come; a step lasts from when its work is there and the step before it has ended."""

    def __init__(self, setup: Setup) -> None:
        self.outcome = Outcome()
        fallback = fallback_plan(setup)
        self._layouts = {fallback.plan_id: fallback.layout}
        self._submitted: deque[RoutedStep] = deque()
        self._end_ns = 0

    def watch(self, steps: Iterable[RoutedStep]) -> Iterator[RoutedStep]:
        """Pass steps on, remembering those whose records are still to come."""
        for step in steps:
            self._submitted.append(step)
            yield step

    def on_decision(self, _: Observation, plan: Plan) -> None:
        self._layouts.pop(plan.plan_id, None)
        self._layouts[plan.plan_id] = plan.layout
        if len(self._layouts) > KNOWN_PLANS:
            del self._layouts[next(iter(self._layouts))]

    def on_record(self, record: StepRecord) -> None:
        step, out = self._submitted.popleft(), self.outcome
        step_ns = record.end_ns - max(self._end_ns, step.arrival_ns or 0)
        self._end_ns = out.makespan_ns = record.end_ns
        out.step_ns.append(step_ns)
        out.phases.append(PHASES.index(step.phase))
        out.slices.append(record.busy_ns_LS.shape[1])
        out.tokens += step.num_tokens
        out.reconfigurations += record.reconfigure_ns > 0
        out.reconfigure_ns += record.reconfigure_ns
        out.captures += record.capture_ns > 0
        out.capture_ns += record.capture_ns
        out.stall_ns += record.control_stall_ns
        out.hbm_bytes += record.hbm_bytes
        out.fallback_steps += record.fallback is not None
        out.layer_ns_L += np.diff(layer_bounds(record))
        if layout := self._layouts.get(record.plan_id):
            use = out.layouts.setdefault(layout, LayoutUse())
            use.steps += 1
            use.step_ns += step_ns
            use.busy_ns_S += record.busy_ns_LS.sum(axis=0)


def layer_bounds(record: StepRecord) -> NDArray[np.int64]:
    """Return [L + 1] times at which layers meet: as long before a layer's first busy slice as in the first layer.

    What comes before the slices, routing above all, takes as long in every layer of a step.
    """
    busy_LS = record.busy_ns_LS > 0
    first_L = np.where(busy_LS, record.start_ns_LS, record.end_ns).min(axis=1)
    begin_ns = record.start_ns + record.reconfigure_ns
    head_ns = max(0, int(first_L[0]) - begin_ns)
    inner = np.maximum.accumulate(np.maximum(first_L[1:] - head_ns, begin_ns))
    return np.concatenate([[begin_ns], np.minimum(inner, record.end_ns), [record.end_ns]])


def simulate(
    policy: Policy[Any],
    steps: Iterable[RoutedStep],
    world: World,
    *,
    draw: int | None = None,
    records: Path | None = None,
    on_decision: Callable[[Observation, Plan], None] = lambda *_: None,
) -> Outcome:
    """Drive one policy over steps and return its sums.

    `draw` is of the model's errors, None the nominal model; `records` a Parquet file for the StepRecords.
    """
    truth = world.truth(draw)
    setup = world.setup(truth if policy.foresees else None)
    work = with_other_work(steps, world.model)
    return collect(policy, SimBackend(truth), work, setup, records=records, on_decision=on_decision)


def collect(
    policy: Policy[Any],
    backend: Backend,
    steps: Iterable[RoutedStep],
    setup: Setup,
    *,
    records: Path | None = None,
    on_record: Callable[[StepRecord], None] = lambda _: None,
    on_decision: Callable[[Observation, Plan], None] = lambda *_: None,
) -> Outcome:
    """Drive one policy over steps on a backend and return its sums; `records`: a Parquet file for the StepRecords."""
    collector = Collector(setup)
    with writing(records) as write:

        def recorded(record: StepRecord) -> None:
            collector.on_record(record)
            write(record)
            on_record(record)

        def decided(obs: Observation, plan: Plan) -> None:
            collector.on_decision(obs, plan)
            on_decision(obs, plan)

        result = drive(policy, backend, collector.watch(steps), setup, on_record=recorded, on_decision=decided)
    collector.outcome.energy = result.energy
    return collector.outcome


def with_other_work(steps: Iterable[RoutedStep], model: MoeSpec, *, keep_ids: bool = False) -> Iterator[RoutedStep]:
    """Number steps from 0, add the work beside the experts that the model declares, and leave ids behind."""
    for index, step in enumerate(steps):
        ids = step.expert_ids_TLK if keep_ids else None
        yield replace(step, step=index, other_L=other_work_of(step, model), expert_ids_TLK=ids)


def other_work_of(step: RoutedStep, model: MoeSpec) -> tuple[tuple[OtherWork, ...], ...]:
    """Return the work beside the experts of each layer: the step's own, else what the model declares."""
    other = model.other_work(step.num_tokens)
    return step.other_L or ((other,) * len(step.counts_LE) if other else ())
