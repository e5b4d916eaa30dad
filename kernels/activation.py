"""What activations do to single numbers, for kernels in Triton and in Gluon."""

import triton
import triton.language as tl

from .choice import expf
from .spec import INTERPRET


@triton.jit
def silu(x):
    """Return x / (1 + exp(-x)): the bits of IEEE operations for every bf16 and fp16 number, within an ulp for others.

    A division by the book branches for each element, which holds up a whole epilogue; this one corrects an approximate
    reciprocal once.
    """
    if INTERPRET:
        return tl.div_rn(x, 1.0 + expf(-x))
    # All of it in units of 2^-32: the reciprocal of the largest divisor would be no normal number.
    unit: tl.constexpr = 2.3283064365386963e-10
    y = tl.fma(expf(-x), unit, unit)
    rcp = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [y], tl.float32, is_pure=True, pack=1)
    quotient = x * rcp
    quotient = tl.fma(tl.fma(-y, quotient, x), rcp, quotient) * unit
    # x / 1 and x / inf, where the correction may meet an infinity, and -0, whose sign it would lose.
    quotient = tl.where((y == unit) | (x == 0.0), x, quotient)
    return tl.where(y == float("inf"), x * 0.0, quotient)


@triton.jit
def clamped_swiglu(gate, up):
    """Return gpt-oss's gate: both clamped to 7, the sigmoid steeper, and the up column above 1."""
    gate = tl.minimum(gate, 7.0)
    up = tl.minimum(tl.maximum(up, -7.0), 7.0)
    return tl.div_rn(gate, 1.0 + expf(-1.702 * gate)) * (up + 1.0)


@triton.jit
def pointwise(x, EPILOGUE: tl.constexpr):
    """Apply an epilogue that looks at each number alone: relu or gelu (exact); others leave it."""
    if EPILOGUE == "relu":
        x = tl.where(x <= 0.0, 0.0, x)
    elif EPILOGUE == "gelu":
        x = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x
