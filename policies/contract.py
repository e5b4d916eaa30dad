"""The contract between policies and backends: values in, values out.

A *slice* is a share of a GPU that drains its own queue of expert tiles: a set of SMs or a bounded number of CTAs.
A *layout* is the set of slices of one captured graph; a *plan* is a layout and the rule that sends experts to its
slices. A policy maps (observation, state) to (plan, state); a backend carries plans out; `loop.drive` joins them.
Nothing here touches a device, a clock or a file.

Shape letters: L MoE layers, E routed experts, S slices of a layout, H steps of history.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeVar, get_args

import numpy as np

from ..traces.schema import I16, I32, I64, Ints, MoeSpec, RoutedStep

if TYPE_CHECKING:
    from .cost import CostModel

State = TypeVar("State")

Mechanism = Literal["shared", "sm_budget", "green_context", "mig"]
TileOrder = Literal["expert", "heavy", "light"]

MECHANISMS: tuple[Mechanism, ...] = get_args(Mechanism)
EXCLUSIVE: frozenset[Mechanism] = frozenset({"green_context", "mig"})
"""Mechanisms whose slices own their SMs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileVariant:
    """One compiled tile of the grouped expert product, with the resources that decide what shares an SM."""

    name: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    smem_bytes: int
    """Dynamic and static shared memory of one CTA."""
    regs_per_thread: int

    @property
    def regs_per_cta(self) -> int:
        """Registers of one CTA; the hardware grants them by warp in units of 256."""
        return -(-self.regs_per_thread * 32 // 256) * 256 * self.num_warps


@dataclass(frozen=True, slots=True, kw_only=True)
class MigProfile:
    """A kind of GPU instance. Memory slices `starts` are the legal first positions, each `memory_slices` long."""

    name: str
    compute_slices: int
    memory_slices: int
    starts: tuple[int, ...]
    max_instances: int
    sm_count: int
    memory_bytes: int
    bandwidth_share: float
    """Share of L2 and DRAM bandwidth, 0..1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigPlacement:
    """One instance of a MIG layout."""

    profile: str
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """A GPU as data. Every figure has a source and an error in its file under `devices/`; none is a guess in code.

    Speeds are those of a burst at `clock_mhz` unless the name says otherwise.
    """

    name: str
    title: str
    status: Literal["provisional", "calibrated"]
    compute_capability: int
    """Major times ten plus minor: 90 is 9.0. Says which compiled tile variants apply."""
    sm_count: int
    sm_partition_min: int
    sm_partition_step: int
    """Granularity of green contexts as the driver splits by default."""
    smem_per_sm_bytes: int
    """Shared memory that CTAs on one SM may hold together."""
    regs_per_sm: int
    threads_per_sm: int
    l2_bytes: int
    hbm_bytes: int
    read_curve_ctas: tuple[int, ...]
    read_curve_bytes_per_s: tuple[float, ...]
    """DRAM read bandwidth reached by that many persistent CTAs, one per SM up to the SM count."""
    l2_bytes_per_clk: float
    smem_bytes_per_clk: float
    """Per SM."""
    mma_flops_per_clk: float
    """Per SM, bf16, dense."""
    matrix_flops_per_s: float
    """bf16 matrix product, whole device, in a burst."""
    fp32_flops_per_s: float
    sustained_flops_per_s: float
    """bf16 matrix product held over seconds at the power limit."""
    clock_mhz: float
    idle_w: float
    limit_w: float
    stream_w: float
    """Power while streaming reads at full bandwidth."""
    matrix_w: float
    """Power of the sustained matrix product."""
    graph_launch_ns: int
    """Host time to replay a graph."""
    kernel_launch_ns: int
    """Host time of one launch outside a graph."""
    graph_node_ns: int
    """Gap between dependent nodes of a graph."""
    fork_join_ns: int
    """Added by each parallel branch of a graph beyond the first."""
    upload_ns: int
    """Copying a plan within a captured layout to the device."""
    layout_switch_ns: int
    """Replaying the graph of another captured layout instead."""
    green_context_switch_ns: int
    """Added when the next graph runs in other green contexts."""
    capture_ns: int
    """Capturing a layout that was not declared, graph and contexts."""
    mig_relayout_ns: int
    """Draining, destroying and creating MIG instances."""
    host_hop_bytes_per_s: float
    """Activations between MIG instances, through pinned host memory."""
    host_hop_ns: int
    mig_profiles: tuple[MigProfile, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()
    """(field, where its value comes from)."""
    rel_errors: tuple[tuple[str, float], ...] = ()
    """(field, one standard error of its value as a fraction): the draws of `model error` come from here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One slice of a layout.

    `sm_count` is exclusive and as granted for green_context and mig; for shared and sm_budget it is
    ceil(num_ctas / ctas_per_sm). `up` and `down` name tile variants; a middle product uses `up`.
    """

    mechanism: Mechanism
    sm_count: int
    num_ctas: int
    ctas_per_sm: int
    up: str
    down: str
    stream_priority: int = 0
    instance: int | None = None
    """Index into the layout's MIG placements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceLayout:
    """The slices of one captured graph. Unsliced is one shared slice over all SMs."""

    slices: tuple[Slice, ...]
    mig: tuple[MigPlacement, ...] = ()

    @property
    def num_slices(self) -> int:
        return len(self.slices)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pinned:
    """The policy names the slice of every expert of every layer."""

    slice_of_expert_LE: I16

    def __post_init__(self) -> None:
        self.slice_of_expert_LE.flags.writeable = False

    def owner_LE(self, counts_LE: Ints, first_layer: int = 0) -> I16:
        """Return the slice of every expert of the layers given, which start at `first_layer`, whatever its load."""
        return self.slice_of_expert_LE[first_layer : first_layer + len(counts_LE)]

    def canonical_bytes(self) -> bytes:
        """Return bytes that are equal for equal placements."""
        return b"pinned" + repr(self.slice_of_expert_LE.shape).encode() + self.slice_of_expert_LE.tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class ByTokens:
    """The device applies a rule to the step's true counts: n tokens go to slice_ids[bisect_right(bounds, n)]."""

    bounds: tuple[int, ...]
    slice_ids: tuple[int, ...]

    def owner_LE(self, counts_LE: Ints, first_layer: int = 0) -> I16:
        """Return the slice of every expert under true counts; one rule serves every layer."""
        del first_layer
        index_LE = np.searchsorted(np.asarray(self.bounds, dtype=np.int64), counts_LE, side="right")
        return np.asarray(self.slice_ids, dtype=np.int16)[index_LE]

    def canonical_bytes(self) -> bytes:
        return f"by_tokens{self.bounds}{self.slice_ids}".encode()


@lru_cache
def _text_of(layout: SliceLayout) -> str:
    """Return a layout's canonical text: many plans share one."""
    return repr(layout)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout and who runs where."""

    layout: SliceLayout
    placement: Pinned | ByTokens
    tile_order: TileOrder = "expert"
    steal: bool = False
    """An idle slice may drain another's queue."""

    @cached_property
    def plan_id(self) -> str:
        """Return a name that equal plans share: a hash of their canonical bytes."""
        text = f"({_text_of(self.layout)}, {self.tile_order!r}, {self.steal!r})".encode()
        return hashlib.blake2b(text + self.placement.canonical_bytes(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """The control plane's timing, declared and identical in both worlds.

    At step n (a multiple of every_steps) the policy sees counts up to step n - count_lag_steps exactly; its plan takes
    effect at step n + delay_steps exactly. With delay_steps >= 1 it decides while step n runs, else before step n is
    submitted.
    """

    every_steps: int = 1
    count_lag_steps: int = 1
    delay_steps: int = 1
    plan_ns: int = 50_000
    """Host time charged for one decision in the simulator."""
    history_steps: int = 16
    free_switches: bool = False
    """Uploads, layout switches and captures cost nothing: only for policies that foresee, whose result is a bound."""

    def __post_init__(self) -> None:
        if self.every_steps < 1 or self.history_steps < 1:
            raise ValueError("control: every_steps and history_steps must be at least 1")
        if min(self.count_lag_steps, self.delay_steps, self.plan_ns) < 0:
            raise ValueError("control: count_lag_steps, delay_steps and plan_ns must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Everything a policy may know before step 0."""

    device: DeviceSpec
    model: MoeSpec
    variants: tuple[TileVariant, ...]
    mechanisms: frozenset[Mechanism] = frozenset(MECHANISMS)
    belief: "CostModel | None" = None
    """The policy's own idea of cost; never the simulator's truth, but for policies that foresee."""
    control: Control = Control()
    seed: int = 0

    def variant(self, name: str) -> TileVariant:
        """Return the tile variant of that name."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        known = ", ".join(v.name for v in self.variants)
        raise ValueError(f"tile variant {name!r} is not in this setup; it has {known}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a policy sees at a step."""

    step: int
    counts_HLE: I32
    """Up to step - count_lag_steps, newest last; H is shorter than history_steps at the start, and may be 0."""
    now_ns: int
    plan_id: str
    """Of the plan in effect."""
    step_ns: int
    """Duration of the newest completed step; 0 before any."""
    busy_ns_LS: I64
    """Of the newest completed step, under the layout it ran with; [L, 0] before any."""
    power_w: float | None
    queued_tokens: int | None
    coming_LE: I32 | None = None
    """True counts of the coming step, only for policies that foresee."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one step took; one clock per world, ns since step 0. Both backends write this."""

    step: int
    plan_id: str
    bucket: int
    """Token bucket of the captured graph that ran the step."""
    submit_ns: int
    start_ns: int
    end_ns: int
    start_ns_LS: I64
    busy_ns_LS: I64
    reconfigure_ns: int
    capture_ns: int
    control_stall_ns: int
    hbm_bytes: int
    flops: int
    fallback: str | None
    """Why the unsliced plan ran instead of the policy's, or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyWindow:
    """Energy over at least 2 s of steps: no counter measures a single step."""

    first_step: int
    last_step: int
    duration_ns: int
    """Idle time between the steps included; below 2 s only where the whole run is shorter."""
    energy_uj: int | None
    """None: this device or MIG slice has no counter."""
    idle_w: float
    sm_clock_mhz: float
    temperature_c: float | None


class Policy(Protocol[State]):
    """Decides. Constructors only store parameters; every call returns values and mutates nothing."""

    foresees: ClassVar[bool]
    """Needs the true counts of the coming step: simulator only, a bound, not deployable."""
    reads_clock: ClassVar[bool]
    """Reads now_ns, step_ns, busy_ns_LS, power_w or queued_tokens: its plans may differ between backends."""

    def init(self, setup: Setup) -> State:
        """Return the state before step 0."""
        ...

    def layouts(self, setup: Setup) -> tuple[SliceLayout, ...]:
        """Return every layout that plans may use, to be captured before step 0."""
        ...

    def plan(self, obs: Observation, state: State) -> tuple[Plan, State]:
        """Return the plan for step obs.step + delay_steps, and the next state."""
        ...


class Backend(Protocol):
    """Carries plans out, simulated or on a GPU."""

    foresight: ClassVar[bool]
    """Whether policies that foresee may run here."""

    def open(self, setup: Setup, layouts: Sequence[SliceLayout]) -> None:
        """Capture the layouts and the unsliced one; step 0 follows."""
        ...

    def observe(self) -> Observation:
        """Return what the policy may see at the step it decides at: the newest submitted, or with no delay the next."""
        ...

    def apply(self, plan: Plan) -> None:
        """Validate the plan, then enqueue it for delay_steps after the step it was decided at."""
        ...

    def submit(self, step: RoutedStep) -> None:
        """Enqueue one step; never waits for the device."""
        ...

    def drain(self, *, wait: bool = False) -> list[StepRecord]:
        """Return the finished steps, in order; all of them when `wait`."""
        ...

    def close(self) -> list[EnergyWindow]:
        """Finish, leave the device as found, and return the energy windows."""
        ...
