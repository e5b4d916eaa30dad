"""The executor on a GPU: steps as graphs, one for each layout and token bucket, that any routing and plan replays.

What a step needs goes up before its graph and counts come down after it, all enqueued: nothing waits for the device.
Each slice stamps when it begins and ends, by the device's own timer.

Shape letters: T tokens, L MoE layers, E experts, K top-k, S slices, D model, R steps in flight, W words of a plan.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ..kernels.spec import LayerLaunch, RouterSpec
from ..kernels.weights import random_weights
from ..kernels.workspace import Workspace
from ..policies.contract import EnergyWindow, Plan, Setup, SliceLayout
from ..policies.layouts import one_slice_plan
from ..traces.schema import I32, RoutedStep
from .backend import MOST_AHEAD, ExecutorError, Finished, Launched
from .graphs import GraphCache
from .layers import launch_of, run_layer
from .partition import Partition, PartitionError
from .timer import sets_to_stay_cold
from .workload import expert_ids_LTK, plan_words_LW, write_logits

IN_FLIGHT = MOST_AHEAD + 2
GRAPH_BYTES = 4 << 30
MOST_SLICES = 16


@triton.jit
def stamp_kernel(out_ptr):
    """Store the device's timer, ns."""
    now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer; // $1", "=l,r", [0], tl.int64, is_pure=False, pack=1)
    tl.store(out_ptr, now)


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What a graph is captured for."""

    layout: SliceLayout
    steal: bool
    bucket: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    start: Any
    end: Any
    slot: int
    num_slices: int


class StreamLanes:
    """The slices of a layout on streams, each stamped where it begins and ends."""

    def __init__(self, streams: Sequence["torch.cuda.Stream"], stamps_LS2: torch.Tensor) -> None:
        self._streams, self._stamps_LS2 = streams, stamps_LS2
        self.layer, self._begun = 0, False

    def enter(self, layer: int) -> None:
        """Go on with a layer's slices."""
        self.layer, self._begun = layer, False

    def beside(self, parts: list[Callable[[], None]]) -> None:
        """Fork to a stream for each part, and join."""
        main = torch.cuda.current_stream()
        for slice_id, (part, stream) in enumerate(zip(parts, self._streams, strict=True)):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                if not self._begun:
                    stamp_kernel[(1,)](self._stamps_LS2[self.layer, slice_id, 0])
                part()
                stamp_kernel[(1,)](self._stamps_LS2[self.layer, slice_id, 1])
        for stream in self._streams:
            main.wait_stream(stream)
        self._begun = True


class CudaExecutor:
    """Runs steps on the current CUDA device, with random weights that stay out of L2."""

    def __init__(self, *, max_tokens: int, graph_bytes: int = GRAPH_BYTES, seed: int = 0) -> None:
        self._max_tokens, self._graph_bytes, self._seed = max_tokens, graph_bytes, seed

    def open(self, setup: Setup, layouts: Sequence[SliceLayout]) -> None:
        """Allocate everything for the largest bucket, and create the layouts' streams and contexts.

        Raises:
            ValueError: the device is not the setup's or cannot be split like a layout, or counts are to be seen later
                than they are kept.
        """
        if setup.control.count_lag_steps > MOST_AHEAD:
            raise ValueError(
                f"control: counts seen {setup.control.count_lag_steps} steps late; this executor keeps those of the "
                f"last {MOST_AHEAD}, lower count_lag_steps"
            )
        self._setup, self._owned = setup, ExitStack()
        self._check_device()
        try:
            self._allocate()
            self._streams = {layout: self._streams_of(layout) for layout in layouts}
            self._graphs = GraphCache(self._graph_bytes, self._captured)
            self._start_clock()
        except BaseException:
            self._owned.close()
            raise

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
        self._plans_LW = base.plan.repeat(num_layers, 1)
        self._counts_LE = base.counts_E.repeat(num_layers, 1)
        self._workspaces = [
            replace(base, plan=self._plans_LW[layer], counts_E=self._counts_LE[layer]) for layer in range(num_layers)
        ]
        self._logits_LTE = torch.zeros(num_layers, tokens, num_experts, dtype=torch.bfloat16, device="cuda")
        self._ids_LTK = torch.zeros(num_layers, tokens, top_k, dtype=torch.int64, device="cuda")
        self._num_tokens = torch.zeros(1, dtype=torch.int32, device="cuda")
        self._stamps_LS2 = torch.zeros(num_layers, MOST_SLICES, 2, dtype=torch.int64, device="cuda")
        shape = (IN_FLIGHT, num_layers)
        self._ids_RLTK = torch.zeros(*shape, tokens, top_k, dtype=torch.int64, pin_memory=True)
        self._counts_RLE = torch.zeros(*shape, num_experts, dtype=torch.int32, pin_memory=True)
        self._stamps_RLS2 = torch.zeros(*shape, MOST_SLICES, 2, dtype=torch.int64, pin_memory=True)
        self._plans_RLW = torch.zeros(*shape, base.plan.numel(), dtype=torch.int32, pin_memory=True)
        self._plan_id = ""
        self._running: deque[_Running] = deque()
        self._ended: dict[int, Any] = {}
        self._num_launched = self._num_finished = 0

    def _streams_of(self, layout: SliceLayout) -> tuple["torch.cuda.Stream", ...]:
        priorities = tuple(one.stream_priority for one in layout.slices)
        if layout.slices[0].mechanism != "green_context":
            return tuple(torch.cuda.Stream(priority=priority) for priority in priorities)
        wanted = tuple(one.sm_count for one in layout.slices)
        group_sms = self._setup.device.sm_partition_step
        split = self._owned.enter_context(Partition(wanted=wanted, group_sms=group_sms, priorities=priorities))
        return tuple(share.stream for share in split.shares)

    def _start_clock(self) -> None:
        """Find where the device's timer and the host's clock stand at time 0."""
        stamp = self._stamps_LS2[0, 0, 0]
        stamp_kernel[(1,)](stamp)
        torch.cuda.synchronize()
        self._zero = torch.cuda.Event(enable_timing=True)
        stamp_kernel[(1,)](stamp)
        self._zero.record()
        torch.cuda.synchronize()
        self._host_zero_ns = time.perf_counter_ns()
        self._timer_zero_ns = int(stamp)

    def now_ns(self) -> int:
        """Return the host's time since step 0."""
        return time.perf_counter_ns() - self._host_zero_ns

    def wait_until(self, ns: int) -> None:
        """Sleep until then."""
        time.sleep(max(0, ns - self.now_ns()) / 1e9)

    def decided(self) -> None:
        """A decision took the time that it took."""

    def launch(self, step: RoutedStep, plan: Plan, bucket: int) -> Launched:
        """Enqueue what a step needs, its graph, and the way back of its counts and stamps.

        Raises:
            ExecutorError: the step is larger than the buffers, has other work, or its graph cannot be captured.
        """
        if max(bucket, step.num_tokens) > self._max_tokens:
            raise ExecutorError(f"step of {step.num_tokens} tokens; buffers hold {self._max_tokens}, give more")
        if step.other_L:
            raise ExecutorError(
                "steps with other work beside the experts cannot run here yet; replay the trace without"
            )
        before_ns, key = self.now_ns(), GraphKey(plan.layout, plan.steal, bucket)
        captures = key not in self._graphs
        try:
            graph = self._graphs.get(key)
        except (torch.OutOfMemoryError, triton.OutOfResources, PartitionError) as error:
            raise ExecutorError(f"no graph for a bucket of {bucket} tokens: {str(error).splitlines()[0]}") from error
        capture_ns = self.now_ns() - before_ns if captures else 0
        slot = self._num_launched % IN_FLIGHT
        self._upload(step, plan, slot)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        submit_ns = self.now_ns()
        start.record()
        graph.replay()
        end.record()
        self._counts_RLE[slot].copy_(self._counts_LE, non_blocking=True)
        self._stamps_RLS2[slot].copy_(self._stamps_LS2, non_blocking=True)
        back = torch.cuda.Event()
        back.record()
        self._ended[self._num_launched] = back
        self._running.append(_Running(start=start, end=end, slot=slot, num_slices=plan.layout.num_slices))
        self._num_launched += 1
        return Launched(submit_ns=submit_ns, reconfigure_ns=0, capture_ns=capture_ns)

    def _upload(self, step: RoutedStep, plan: Plan, slot: int) -> None:
        model, tokens = self._setup.model, step.num_tokens
        ids_LTK = torch.from_numpy(expert_ids_LTK(step, model.top_k))
        staged, ids = self._ids_RLTK[slot, :, :tokens], self._ids_LTK[:, :tokens]
        staged.copy_(ids_LTK)
        ids.copy_(staged, non_blocking=True)
        write_logits(self._logits_LTE[:, :tokens], ids)
        self._num_tokens.fill_(tokens)
        if plan.plan_id != self._plan_id:
            self._plan_id = plan.plan_id
            self._plans_RLW[slot].copy_(plan_words_LW(plan, model.num_layers, model.num_experts))
            self._plans_LW.copy_(self._plans_RLW[slot], non_blocking=True)

    def _captured(self, key: GraphKey) -> tuple["torch.cuda.CUDAGraph", int]:
        plan = replace(one_slice_plan(key.layout), steal=key.steal)
        launch = launch_of(plan, self._setup)
        if key.layout not in self._streams:
            self._streams[key.layout] = self._streams_of(key.layout)
        lanes = StreamLanes(self._streams[key.layout], self._stamps_LS2)
        main = torch.cuda.Stream()
        main.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(main):
            # Kernels compile and tile sizes are copied before the capture.
            self._run_layers(launch, lanes, key.bucket)
        torch.cuda.current_stream().wait_stream(main)
        free_bytes, _ = torch.cuda.mem_get_info()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=main):
            self._run_layers(launch, lanes, key.bucket)
        return graph, max(0, free_bytes - torch.cuda.mem_get_info()[0])

    def _run_layers(self, launch: LayerLaunch, lanes: StreamLanes, bucket: int) -> None:
        for layer, ws in enumerate(self._workspaces):
            lanes.enter(layer)
            weights = self._weights[layer % len(self._weights)]
            run_layer(
                self._x_TD[:bucket], self._logits_LTE[layer, :bucket], weights, self._router, ws, launch, lanes,
                num_tokens=self._num_tokens,
            )  # fmt: skip

    def counts_LE(self, index: int) -> I32:
        """Return the tokens per expert that routing counted, waiting for their way back."""
        self._ended[index].synchronize()
        for older in [known for known in self._ended if known < index - IN_FLIGHT]:
            del self._ended[older]
        return self._counts_RLE[index % IN_FLIGHT].numpy().copy()

    def finished(self, *, wait_for: int) -> list[Finished]:
        """Return the steps that have finished; waits for all up to launch `wait_for`."""
        done = []
        while self._running:
            back = self._ended[self._num_finished]
            if self._num_finished <= wait_for:
                back.synchronize()
            elif not back.query():
                break
            done.append(self._times_of(self._running.popleft()))
            self._num_finished += 1
        return done

    def _times_of(self, run: _Running) -> Finished:
        start_ns, end_ns = (round(self._zero.elapsed_time(event) * 1e6) for event in (run.start, run.end))
        stamps_LS2 = self._stamps_RLS2[run.slot, :, : run.num_slices].numpy() - self._timer_zero_ns
        return Finished(
            start_ns=start_ns,
            end_ns=end_ns,
            start_ns_LS=stamps_LS2[..., 0].astype(np.int64),
            busy_ns_LS=(stamps_LS2[..., 1] - stamps_LS2[..., 0]).astype(np.int64),
        )

    def power_w(self) -> float | None:
        """Return None: reading it would take the host milliseconds."""
        return None

    def close(self) -> list[EnergyWindow]:
        """Wait for the device and let go of graphs, contexts and buffers."""
        torch.cuda.synchronize()
        self._graphs.clear()
        self._owned.close()
        return []
