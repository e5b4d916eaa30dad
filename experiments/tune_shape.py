"""Tune one layer shape on the GPU of this machine: compile on all cores, time, and write the file range by range."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path

from ..kernels.tuned import Tuned, TunedRange, load, path_of, save, shape_name
from ..traces.schema import MoeSpec
from .bench_arms import batch_of, clock_of, num_sets
from .precompile import precompile
from .tune import RANGES, SKEWS, search


def tune_shape(spec: MoeSpec, *, seconds: float, folder: Path, say: Callable[[str], object]) -> Path:
    """Tune the ranges of tokens that the shape's file lacks, within a time; return the file.

    Stopped early, it leaves a file of the ranges so far, whose last one serves larger batches; the next call goes on.

    Args:
        spec: the layer's shape; its experts are alike.
        seconds: for all ranges, compiling included; every range is given at least one launch.
        folder: where files lie by device and shape.
        say: takes a line about each range.
    """
    import torch
    import triton

    from ..kernels.weights import random_weights

    end, device = time.monotonic() + seconds, torch.cuda.get_device_name(0)
    sm_count = torch.cuda.get_device_properties(0).multi_processor_count
    path = path_of(folder, device, shape_name(spec))
    held = load(path) if path.exists() else None
    ranges = [*held.ranges] if held and held.triton == triton.__version__ else []
    missing = list(itertools.pairwise((0, *RANGES)))[len(ranges) :]
    if not missing:
        return path
    precompile([(spec, most) for _, most in missing])
    # Few tokens touch few weights: they need the most sets.
    sets = [random_weights(spec, "cuda", seed) for seed in range(max(num_sets(spec, most) for _, most in missing))]
    for i, (before, most) in enumerate(missing):
        until = time.monotonic() + max(0.0, end - time.monotonic()) / (len(missing) - i)
        batches = {skew: batch_of(spec, most, skew, sets[: num_sets(spec, most)]) for skew in SKEWS}
        launch, times = search(
            spec,
            most,
            clock_of(batches),
            sm_count=sm_count,
            expired=lambda until=until: time.monotonic() > until,
            known=[one.launch for one in ranges[-1:]],
        )
        us = {skew: round(ns / 1000, 2) for skew, ns in times[launch].items()}
        ranges.append(TunedRange(least_tokens=before + 1, most_tokens=most, launch=launch, us=us))
        shape = shape_name(spec)
        save(path, Tuned(device=device, triton=triton.__version__, shape=shape, ranges=tuple(ranges)))
        say(f"{shape}: up to {most} tokens {us} us, best of {len(times)} launches")
    return path
