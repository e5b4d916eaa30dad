"""Compile every launch that a search may try on all cores, into the cache on disk that this process reads afterwards.

Kernels do not depend on sizes but on what divides them, so that a layer of few experts and columns stands for any.
"""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from ..traces.schema import MoeSpec

MOST_WORKERS = 14


def precompile(loads: Sequence[tuple[MoeSpec, int]]) -> None:
    """Compile the candidates of layers and their numbers of tokens, and their routing, on the current device."""
    import torch

    from .tune import candidates

    sm_count = torch.cuda.get_device_properties(0).multi_processor_count
    jobs: dict[tuple[MoeSpec, int, Any], None] = {}
    for spec, num_tokens in loads:
        small = MoeSpec(name="c", num_layers=1, num_experts=4, top_k=2, d_model=256, d_ff=(256,), kind=spec.kind)
        narrow, launches = replace(spec, d_model=256, d_ff=(256,)), candidates(spec, num_tokens, sm_count)
        for dependent in (False, True):
            lone = [replace(launch, slices=_lone(launch), dependent=dependent) for launch in launches]
            jobs |= {(small, 32, launch): None for launch in lone}
            # Routing is compiled for the model's own experts.
            jobs[narrow, num_tokens, lone[0]] = None
    on_all_cores(_compile, jobs, chunksize=4)


def precompile_launches(loads: Iterable[tuple[MoeSpec, int, Any]]) -> None:
    """Compile given launches of layers and their numbers of tokens on the current device."""
    on_all_cores(_compile, {
        (replace(spec, d_model=256, d_ff=(256,)), num_tokens, replace(launch, slices=_lone(launch))): None
        for spec, num_tokens, launch in loads
    }, chunksize=4)  # fmt: skip


def on_all_cores(compile_one: Callable[[Any], None], jobs: Iterable[Any], *, chunksize: int) -> None:
    """Compile jobs in processes of their own."""
    context = multiprocessing.get_context("spawn")
    workers = min(MOST_WORKERS, multiprocessing.cpu_count())
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        for _ in pool.map(compile_one, jobs, chunksize=chunksize):
            pass


def _lone(launch: Any) -> Any:
    """Return the slices with one CTA each: a grid is no part of a kernel."""
    return tuple(replace(s, up=replace(s.up, num_ctas=1), down=replace(s.down, num_ctas=1)) for s in launch.slices)


def _compile(job: tuple[MoeSpec, int, Any]) -> None:
    import torch
    from triton import OutOfResources
    from triton.errors import TritonError

    from ..kernels.weights import random_weights
    from .bench_arms import batch_of, our_step

    spec, num_tokens, launch = job
    batch = batch_of(spec, num_tokens, "uniform", [random_weights(spec, "cuda")])
    # What this device cannot hold or compile is said when it is timed.
    with contextlib.suppress(OutOfResources, TritonError, ValueError, RuntimeError):
        our_step(batch, launch)(0)
    torch.cuda.synchronize()
