"""A layer over MIG instances: a coordinator routes and combines, a process per other instance computes its experts.

One process sees one instance, and no device memory is shared between them: rows travel through host memory that both
map, registered with CUDA where there is a device. Never run on MIG hardware; without a GPU the workers compute on the
host, in the same way and with the same bits.

Shape letters: T tokens, E experts, K top-k, N rows that travel, D model.
"""

import multiprocessing as mp
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.spec import TORCH_DTYPE, RouterSpec
from ..kernels.weights import ExpertWeights, random_weights
from ..traces.schema import DTYPE_BYTES, MoeSpec
from .experts import How, LayerCall, LayerRunner, one_layer
from .workload import write_logits

ANSWER_S = 60.0
"""A worker that is silent for so long counts as lost."""


class WorkerError(RuntimeError):
    """A worker died, failed or fell silent; one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """Where a part of the experts is computed."""

    device: str = "cpu"
    """Of torch, inside the worker."""
    uuid: str | None = None
    """Of the MIG device that the worker is to see; None: whatever this process sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What a worker is told once."""

    spec: MoeSpec
    max_rows: int
    seed: int
    how: How
    instance: Instance


class _Rows:
    """Rows [N, D] that go to a worker and come back in the same place, and the experts [N] that they are for."""

    def __init__(self, job: _Job, name: str | None = None) -> None:
        """Make the memory, or open that of a name; a device copies from and to it directly."""
        num_rows, d_model, dtype = job.max_rows, job.spec.d_model, TORCH_DTYPE[job.spec.dtype]
        num_bytes = num_rows * d_model * DTYPE_BYTES[job.spec.dtype]
        self.memory = SharedMemory(name, create=name is None, size=num_bytes + 8 * num_rows)
        self.rows_ND = torch.frombuffer(self.memory.buf, dtype=dtype, count=num_rows * d_model).view(num_rows, d_model)
        self.expert_N = torch.frombuffer(self.memory.buf, dtype=torch.int64, count=num_rows, offset=num_bytes)
        if torch.cuda.is_available():
            torch.cuda.cudart().cudaHostRegister(self.rows_ND.data_ptr(), num_bytes, 0)

    def close(self) -> None:
        del self.rows_ND, self.expert_N
        self.memory.close()


def compute_rows(
    rows_ND: Tensor, expert_N: Tensor, weights: ExpertWeights, runner: LayerRunner, layer: int = 0
) -> Tensor:
    """Return each row through its expert [N, D]: a layer of top-1, whose weights are 1."""
    spec = replace(weights.spec, top_k=1)
    logits_NE = torch.empty(len(rows_ND), spec.num_experts, device=rows_ND.device)
    write_logits(logits_NE[None], expert_N[None, :, None])
    call = LayerCall(
        x_TD=rows_ND,
        logits_TE=logits_NE,
        weights=replace(weights, spec=spec),
        router=RouterSpec(num_experts=spec.num_experts, top_k=1),
        weights_TK=torch.ones(len(rows_ND), 1, device=rows_ND.device),
    )
    return runner.run(layer, call)[0]


def layer_weights(spec: MoeSpec, num_layers: int, device: str, seed: int) -> list[ExpertWeights]:
    """Return the weights of all layers, the same wherever they are made for one kind of device."""
    return [random_weights(one_layer(spec), device, seed + layer) for layer in range(num_layers)]


def _work(job: _Job, pipe: Connection, name: str) -> None:
    """Compute rows until the coordinator closes the pipe: a worker's whole life."""
    if job.instance.uuid is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = job.instance.uuid
    rows, device = _Rows(job, name), job.instance.device
    weights = layer_weights(job.spec, job.spec.num_layers, device, job.seed)
    runner = LayerRunner(job.how)
    try:
        pipe.send(None)
        while True:
            layer, count = pipe.recv()
            sent_ND, expert_N = rows.rows_ND[:count].to(device), rows.expert_N[:count].to(device)
            try:
                rows.rows_ND[:count].copy_(compute_rows(sent_ND, expert_N, weights[layer], runner))
                pipe.send(None)
            except Exception as error:
                pipe.send(f"{type(error).__name__}: {error}")
    except (EOFError, OSError, KeyboardInterrupt):
        # The coordinator has gone.
        pass
    finally:
        rows.close()


class InstanceLayers:
    """Layers whose experts lie on several instances; this process computes those of the first. Use in a `with`."""

    def __init__(
        self, spec: MoeSpec, instances: Sequence[Instance], *, max_tokens: int, seed: int = 0, how: How = "kernels"
    ) -> None:
        """Start a worker for every instance but the first, each with weights of its own: the same random ones.

        Raises:
            WorkerError: a worker did not start.
        """
        self.bytes_moved = 0
        """To workers and back."""
        self._runner, self._max_tokens = LayerRunner(how), max_tokens
        self._weights = layer_weights(spec, spec.num_layers, instances[0].device, seed)
        self._workers: list[tuple[Any, Connection, _Rows]] = []
        context = mp.get_context("spawn")
        try:
            for instance in instances[1:]:
                rows = max_tokens * spec.top_k
                self._start(context, _Job(spec=spec, max_rows=rows, seed=seed, how=how, instance=instance))
            for worker in range(1, len(instances)):
                self._answer(worker)
        except BaseException:
            self.close()
            raise

    def _start(self, context: Any, job: _Job) -> None:
        rows = _Rows(job)
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(job, theirs, rows.memory.name), daemon=True)
        process.start()
        theirs.close()
        self._workers.append((process, ours, rows))

    def run(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, instance_of_expert_E: Tensor) -> Tensor:
        """Return a layer's output [T, D]: rows go to the instances of their experts, come back and are combined.

        Raises:
            ValueError: the batch is larger than what the instances were started for.
            WorkerError: a worker is lost; the instances must be started again.
        """
        if len(x_TD) > self._max_tokens:
            raise ValueError(f"batch of {len(x_TD)} tokens; the instances hold {self._max_tokens}, give max_tokens")
        top_k = ids_TK.shape[1]
        expert_N = ids_TK.flatten().long()
        owner_N = instance_of_expert_E[expert_N]
        out_ND = torch.empty(len(expert_N), x_TD.shape[1], dtype=x_TD.dtype, device=x_TD.device)
        places = [(owner_N == i).nonzero()[:, 0] for i in range(len(self._workers) + 1)]
        for worker, place in enumerate(places[1:], 1):
            _, pipe, rows = self._workers[worker - 1]
            rows.rows_ND[: len(place)].copy_(x_TD[place // top_k])
            rows.expert_N[: len(place)].copy_(expert_N[place])
            try:
                pipe.send((layer, len(place)))
            except OSError as error:
                raise self._lost(worker) from error
        mine = places[0]
        out_ND[mine] = compute_rows(x_TD[mine // top_k], expert_N[mine], self._weights[layer], self._runner)
        for worker, place in enumerate(places[1:], 1):
            self._answer(worker)
            out_ND[place] = self._workers[worker - 1][2].rows_ND[: len(place)].to(out_ND.device)
            self.bytes_moved += 2 * len(place) * x_TD.shape[1] * x_TD.element_size()
        return reference.combine(out_ND.unflatten(0, (-1, top_k)), weights_TK)

    def _answer(self, worker: int) -> None:
        _, pipe, _ = self._workers[worker - 1]
        try:
            if not pipe.poll(ANSWER_S):
                raise WorkerError(f"the worker of instance {worker} has been silent for {ANSWER_S:.0f} s; restart it")
            failed = pipe.recv()
        except (EOFError, OSError) as error:
            raise self._lost(worker) from error
        if failed is not None:
            raise WorkerError(f"the worker of instance {worker} failed ({failed}); see whether its instance has room")

    def _lost(self, worker: int) -> WorkerError:
        process = self._workers[worker - 1][0]
        process.join(10)
        return WorkerError(f"the worker of instance {worker} died with exit code {process.exitcode}; start again")

    def close(self) -> None:
        """End the workers and free the memory."""
        while self._workers:
            process, pipe, rows = self._workers.pop()
            pipe.close()
            process.join(5)
            if process.is_alive():
                process.kill()
            rows.close()
            rows.memory.unlink()

    def __enter__(self) -> "InstanceLayers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
