"""The executor on a GPU: steps as graphs, one for each layout and load, that any routing and plan replays.

What a step needs goes up in one copy before its graph, which ends by storing counts and stamps where the host finds
them: a step takes three calls of the driver, and nothing waits for the device. A step and each of its slices stamp when
they begin and end, by the device's own timer.

Shape letters: T tokens, L MoE layers, E experts, S slices, D model.
"""

import contextlib
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import triton

from ..kernels.layer import moe_layer
from ..kernels.spec import LayerLaunch, RouterSpec
from ..kernels.weights import random_weights
from ..kernels.workspace import Workspace
from ..policies.contract import EnergyWindow, Plan, Setup, SliceLayout
from ..policies.layouts import one_slice_plan
from ..traces.schema import I32, RoutedStep
from .back import Back
from .backend import MOST_AHEAD, Executor, ExecutorError, Finished, Launched
from .energy import EnergyLog
from .graphs import CAPTURE_RULES, Calls, CaptureRule, GraphCache
from .lanes import StreamLanes, stamp_kernel
from .layers import fill_words, launch_of
from .meter import EnergyMeter
from .other import PLACES, OtherKernels, asked_LPA, places_of, slice_ids_of
from .partition import Partition, PartitionError
from .timer import sets_to_stay_cold
from .upload import Upload
from .workload import expert_ids_LTK

IN_FLIGHT = MOST_AHEAD + 2
GRAPH_BYTES = 4 << 30
CLOCK_TRIES = 8
Replay = Callable[[], object]
Streams = tuple["torch.cuda.Stream | None", ...]
"""Of slices; None: the one that the step is on."""
Load = tuple[int, frozenset[int | None]]
"""A token bucket, and the slices that other work beside its experts names."""


@dataclass(frozen=True)
class GraphKey:
    """What a graph is captured for; hashed once, since a step looks for its graph several times."""

    layout: SliceLayout
    steal: bool
    bucket: int
    places: frozenset[int]
    """Where other work runs."""

    @cached_property
    def _hash(self) -> int:
        return hash((self.layout, self.steal, self.bucket, self.places))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, slots=True)
class _Running:
    step: int
    num_slices: int


class CudaExecutor(Executor):
    """Runs steps on the current CUDA device, with random weights that stay out of L2."""

    def __init__(
        self,
        *,
        max_tokens: int,
        loads: Iterable[Load] = (),
        rule: CaptureRule = CAPTURE_RULES["all"],
        graph_bytes: int = GRAPH_BYTES,
        energy: bool = True,
        seed: int = 0,
        keep: bool = False,
    ) -> None:
        """Loads are those captured before step 0, where the rule says so; any other is captured when it comes.

        With `keep` weights, contexts and graphs stay from one run to the next of the same model, until `release`.
        """
        self._max_tokens, self._graph_bytes, self._seed, self._keep = max_tokens, graph_bytes, seed, keep
        self._held_for: tuple[object, ...] | None = None
        self._owned = ExitStack()
        self._loads, self._rule, self._energy = dict.fromkeys(loads), rule, energy
        self.num_eager = 0
        """Graphs that memory had no room for: their steps are launched kernel by kernel."""

    def open(self, setup: Setup, layouts: Sequence[SliceLayout]) -> None:
        """Allocate everything for the largest bucket, create streams and contexts, and capture what the rule says.

        Raises:
            ValueError: the device is not the setup's, its memory is too small, or counts are to be seen later than
                they are kept.
        """
        if setup.control.count_lag_steps > MOST_AHEAD:
            raise ValueError(
                f"control: counts seen {setup.control.count_lag_steps} steps late; this executor keeps those of the "
                f"last {MOST_AHEAD}, lower count_lag_steps"
            )
        self._setup, wanted = setup, (setup.model, setup.device, setup.variants)
        self._check_device()
        try:
            if self._held_for != wanted:
                self.release()
                self._allocate()
                self._streams: dict[SliceLayout, Streams] = {}
                self._refused: dict[SliceLayout, str] = {}
                self._graphs = GraphCache(self._graph_bytes, self._captured)
                self._held_for = wanted
            self._begin_run()
            self._prepare(layouts)
            self._start_clock()
        except torch.OutOfMemoryError as error:
            self.release()
            raise ValueError(
                f"{setup.model.name!r} with {self._max_tokens} tokens does not fit this GPU's memory; choose a smaller "
                "model, fewer tokens a step, or free the GPU"
            ) from error
        except BaseException:
            self.release()
            raise

    def _begin_run(self) -> None:
        self._running: deque[_Running] = deque()
        self._rest: list[Finished] = []
        self._num_launched = self._num_finished = self._next_chunk = 0

    def _check_device(self) -> None:
        held, device = torch.cuda.get_device_properties(0), self._setup.device
        found = held.multi_processor_count, held.major * 10 + held.minor
        if found != (device.sm_count, device.compute_capability):
            raise ValueError(
                f"setup describes {device.title} of {device.sm_count} SMs; this is {held.name} of {found[0]}: choose "
                "the device that is here"
            )

    def _allocate(self) -> None:
        model, tokens = replace(self._setup.model, num_layers=1), self._max_tokens
        num_layers, num_experts, top_k = self._setup.model.num_layers, model.num_experts, model.top_k
        self._router = RouterSpec.of(model)
        touched = min(num_experts, tokens * top_k) * model.expert_bytes()
        held = torch.cuda.get_device_properties(0)
        num_sets = sets_to_stay_cold(
            touched, num_experts * model.expert_bytes(), l2_bytes=held.L2_cache_size, memory_bytes=held.total_memory
        )
        self._weights = [random_weights(model, "cuda", self._seed + p) for p in range(min(num_sets, num_layers))]
        generator = torch.Generator("cuda").manual_seed(self._seed)
        x_TD = torch.randn(tokens, model.d_model, device="cuda", generator=generator)
        self._x_TD = x_TD.to(self._weights[0].products[0].weight.dtype)
        base = Workspace.allocate(model, tokens, "cuda")
        self._upload = Upload(
            IN_FLIGHT, asked=(num_layers, PLACES, 3), plans=(num_layers, base.plan.numel()),
            ids=num_layers * tokens * top_k,
        )  # fmt: skip
        self._logits_LTE = torch.zeros(num_layers, tokens, num_experts, dtype=torch.bfloat16, device="cuda")
        self._other: OtherKernels | None = None
        self._allocate_back(base.counts_E.numel())
        self._workspaces = [
            replace(base, plan=self._upload.plans_LW[layer], counts_E=self._back.counts_LE[layer])
            for layer in range(num_layers)
        ]

    def _allocate_back(self, num_experts: int) -> None:
        """Allocate what comes back of each step."""
        self._back = Back(IN_FLIGHT + 1, self._setup.model.num_layers, num_experts)

    def _prepare(self, layouts: Sequence[SliceLayout]) -> None:
        self._calls = Calls[GraphKey](self._rule)
        if self._rule.least_calls:
            self._graphs.clear()
            return
        for layout in layouts:
            for bucket, slice_ids in self._loads:
                key = GraphKey(layout, False, bucket, places_of(slice_ids, layout.num_slices))
                # A layout that cannot be is told when a plan of it is due.
                with contextlib.suppress(ExecutorError):
                    self._replay_of(key, bucket)

    def _streams_of(self, layout: SliceLayout) -> Streams:
        if layout not in self._streams:
            self._streams[layout] = self._new_streams(layout)
        return self._streams[layout]

    def _new_streams(self, layout: SliceLayout) -> Streams:
        priorities = tuple(one.stream_priority for one in layout.slices)
        mechanism = layout.slices[0].mechanism
        if mechanism == "mig":
            raise PartitionError("mig slices need a process for each instance; this executor is one, use another plan")
        if mechanism != "green_context":
            if layout.num_slices == 1:
                return (None,)
            return tuple(torch.cuda.Stream(priority=priority) for priority in priorities)
        wanted = tuple(one.sm_count for one in layout.slices)
        split = self._owned.enter_context(Partition(wanted=wanted, priorities=priorities))
        return tuple(share.stream for share in split.shares)

    def _start_clock(self) -> None:
        """Find where the device's timer and the host's clock stand at time 0."""
        log = self._log = EnergyLog(EnergyMeter(0, clock_ns=time.perf_counter_ns)) if self._energy else None
        if log:
            log.measure_idle()
        closest_ns = None
        # The host only ever sees a stamp too late: the least of many differences counts.
        for _ in range(CLOCK_TRIES):
            stamp_kernel[(1,)](self._back.begin)
            torch.cuda.synchronize()
            now_ns = time.perf_counter_ns()
            ahead_ns = now_ns - int(self._back.begin)
            closest_ns = ahead_ns if closest_ns is None else min(closest_ns, ahead_ns)
        self._zero_ns, self._timer_zero_ns = now_ns, now_ns - closest_ns
        if log:
            log.start(self._zero_ns)

    def launch(self, step: RoutedStep, plan: Plan, bucket: int) -> Launched:
        """Enqueue what a step needs, its graph, and the way back of its counts and stamps.

        Raises:
            ExecutorError: the step is larger than the buffers, or its layout cannot be carried out on this device.
        """
        if max(bucket, step.num_tokens) > self._max_tokens:
            raise ExecutorError(f"step of {step.num_tokens} tokens; buffers hold {self._max_tokens}, give more")
        places = places_of(slice_ids_of(step.other_L), plan.layout.num_slices)
        key = GraphKey(plan.layout, plan.steal, bucket, places)
        before_ns, captures = self.now_ns(), key not in self._graphs
        replay = self._replay_of(key, step.num_tokens)
        capture_ns = self.now_ns() - before_ns if captures and key in self._graphs else 0
        self._send(step, plan)
        submit_ns = self.now_ns()
        replay()
        self._take_note(step, plan)
        return Launched(submit_ns=submit_ns, reconfigure_ns=0, capture_ns=capture_ns)

    def _take_note(self, step: RoutedStep, plan: Plan) -> None:
        """Remember a step that was enqueued, with the way back of its counts and stamps."""
        self._back.ends(self._num_launched % IN_FLIGHT)
        self._running.append(_Running(step.step, plan.layout.num_slices))
        self._num_launched += 1

    def _send(self, step: RoutedStep, plan: Plan) -> None:
        model, asked = self._setup.model, None
        if step.other_L and self._other:
            asked, ends = asked_LPA(step.other_L, model.num_layers, plan.layout.num_slices, self._next_chunk)
            self._next_chunk = ends % self._other.num_chunks
        self._upload.send(
            self._num_launched % IN_FLIGHT, expert_ids_LTK(step, model.top_k), plan=plan,
            fill=lambda words_LW: fill_words(words_LW, plan), asked_LPA=asked,
        )  # fmt: skip

    def _replay_of(self, key: GraphKey, num_tokens: int) -> Replay:
        """Return what enqueues a step: its graph, or its kernels where the rule has no graph for it yet."""
        if refused := self._refused.get(key.layout):
            raise ExecutorError(refused)
        try:
            if key in self._graphs or self._calls.captures(key, num_tokens):
                return self._graphs.get(key)
            return self._eager(key)
        except (triton.OutOfResources, PartitionError) as error:
            self._refused[key.layout] = f"no graph for a layout: {str(error).splitlines()[0]}"
            raise ExecutorError(self._refused[key.layout]) from error
        except torch.OutOfMemoryError as error:
            raise ExecutorError(f"no memory for a step of {num_tokens} tokens; free the GPU") from error

    def _eager(self, key: GraphKey) -> Replay:
        """Return the launches of a step, on the streams of its layout."""
        launch = launch_of(replace(one_slice_plan(key.layout), steal=key.steal), self._setup)
        if key.places and not self._other:
            held, dtype = torch.cuda.get_device_properties(0), self._setup.model.dtype
            self._other = OtherKernels(
                self._upload.asked_LPA, dtype, l2_bytes=held.L2_cache_size, sm_count=held.multi_processor_count
            )
        sms = [one.sm_count for one in key.layout.slices]
        lanes = StreamLanes(
            self._streams_of(key.layout), self._back.stamps_LS2, sms=sms, other=self._other, places=key.places
        )

        def run() -> None:
            self._upload.write_logits(self._logits_LTE, key.bucket, self._router.top_k)
            stamp_kernel[(1,)](self._back.begin)
            self._run_layers(launch, lanes, key.bucket)
            stamp_kernel[(1,)](self._back.end)
            self._back.bring(self._upload.slot)

        return run

    def _captured(self, key: GraphKey) -> tuple[Replay, int]:
        """Capture a step; without room for its graph, let all others go and try again, else go without one."""
        run = self._eager(key)
        main = torch.cuda.Stream()
        main.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(main):
            # Kernels compile and tile sizes are copied before the capture; no step's slot is filled from what is there.
            self._upload.slot.fill_(IN_FLIGHT)
            run()
        torch.cuda.current_stream().wait_stream(main)
        for last in (False, True):
            try:
                return _graph_of(run, main)
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
                if not last:
                    torch.cuda.synchronize()
                    self._graphs.clear()
        self.num_eager += 1
        if self.num_eager == 1:
            warnings.warn(
                f"no memory for the graph of {key.bucket} tokens, other graphs let go; its kernels are launched one by "
                "one",
                stacklevel=2,
            )
        return run, 0

    def _run_layers(self, launch: LayerLaunch, lanes: StreamLanes, bucket: int) -> None:
        for layer, ws in enumerate(self._workspaces):
            lanes.enter(layer)
            weights = self._weights[layer % len(self._weights)]
            moe_layer(
                self._x_TD[:bucket], self._logits_LTE[layer, :bucket], weights, self._router, ws, launch,
                num_tokens=self._upload.num_tokens, beside=lanes.beside,
            )  # fmt: skip

    def counts_LE(self, index: int) -> I32:
        slot = index % IN_FLIGHT
        self._back.is_there(slot, wait=True)
        return self._back.counts(slot).copy()

    def finished(self, *, wait_for: int) -> list[Finished]:
        done, self._rest = self._rest, []
        while self._running:
            slot = self._num_finished % IN_FLIGHT
            if not self._back.is_there(slot, wait=self._num_finished <= wait_for):
                break
            done.append(self._times_of(self._running.popleft(), slot))
            self._num_finished += 1
        return done

    def _times_of(self, run: _Running, slot: int) -> Finished:
        (start_ns, end_ns), stamps_LS2 = self._back.stamps(slot, run.num_slices)
        start_ns, end_ns = int(start_ns) - self._timer_zero_ns, int(end_ns) - self._timer_zero_ns
        if self._log:
            self._log.ended(run.step, end_ns)
        return Finished(
            start_ns=start_ns,
            end_ns=end_ns,
            start_ns_LS=stamps_LS2[..., 0] - self._timer_zero_ns,
            busy_ns_LS=stamps_LS2[..., 1] - stamps_LS2[..., 0],
        )

    def power_w(self) -> float | None:
        """Return the mean power of the newest energy window: reading it now would take the host milliseconds."""
        return self._log.windows.power_w if self._log else None

    def close(self) -> list[EnergyWindow]:
        """Wait for the device, and let go of what is not kept; finished steps can still be asked for."""
        try:
            torch.cuda.synchronize()
            # What was under way when a run was stopped belongs to the last energy window.
            self._rest = self.finished(wait_for=self._num_launched)
            return self._log.close() if self._log else []
        finally:
            if not self._keep:
                self.release()

    def release(self) -> None:
        """Wait for the device, and let go of graphs and contexts."""
        if self._held_for is not None:
            torch.cuda.synchronize()
            self._held_for = None
            self._graphs.clear()
        self._owned.close()


def _graph_of(run: Replay, stream: "torch.cuda.Stream") -> tuple[Replay, int]:
    """Return the replay of what `run` enqueues, and the bytes that its graph takes."""
    # Capturing lets go of what torch caches: that is no gain of the graph's.
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info()
    graph = torch.cuda.CUDAGraph()
    # A capture that fails at its end would leave its stream the current one.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay, max(0, free_bytes - torch.cuda.mem_get_info()[0])
