"""Model error as draws: every figure with a declared error moves, and what physics orders stays in order."""

import zlib
from dataclasses import fields, replace
from typing import Any

import numpy as np

from .contract import DeviceSpec
from .tiles import TileConstants


def _factor(name: str, rel_error: float, seed: int) -> float:
    """Draw a figure's factor, keyed by its name, so that a figure more or less leaves the others' draws alone."""
    draw = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal()
    return float(np.exp(rel_error * draw))


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, tuple):
        return tuple(v * factor for v in value)
    return round(value * factor) if isinstance(value, int) else value * factor


def _moved(spec: Any, seed: int) -> Any:
    known = {f.name for f in fields(spec)}
    changes = {
        name: _scaled(getattr(spec, name), _factor(name, error, seed))
        for name, error in spec.rel_errors
        if name in known and error > 0
    }
    return replace(spec, **changes)


def perturb(device: DeviceSpec, seed: int) -> DeviceSpec:
    """Return a device with every figure drawn from its error.

    A measured curve moves as a whole, so that it stays monotone. A sustained rate stays below the burst rate, and a
    power below the limit.
    """
    drawn: DeviceSpec = _moved(device, seed)
    matrix_w = min(drawn.matrix_w, drawn.limit_w)
    return replace(
        drawn,
        sustained_flops_per_s=min(drawn.sustained_flops_per_s, drawn.matrix_flops_per_s),
        matrix_w=matrix_w,
        stream_w=min(drawn.stream_w, drawn.limit_w),
        idle_w=min(drawn.idle_w, matrix_w / 2, drawn.stream_w / 2),
    )


def perturb_constants(constants: TileConstants, seed: int) -> TileConstants:
    """Return the model's own constants drawn from their errors."""
    drawn: TileConstants = _moved(constants, seed)
    return drawn
