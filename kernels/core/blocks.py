"""Pieces of Triton kernels that operators share."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in the dtype of acc."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def dot_of_registers(a, b, acc, PRECISION: tl.constexpr, WAIT: tl.constexpr):
    """`dot` in a loop whose left operand is computed there. WAIT: `Target.forgets_registers`.

    What is read of the sum is waited for, and the compiler of the PTX removes the moves.
    """
    acc = dot(a, b, acc, PRECISION)
    if WAIT:
        acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def welford(v, inside, mean, squares, seen):
    """Take columns `inside` [C] of v [R, C] into mean [R], sum of squared deviations [R] and number of columns seen.

    Parts are merged as in Chan, Golub and LeVeque 1983: no large mean can harm.
    """
    part = tl.sum(inside.to(v.dtype), 0)
    part_mean = tl.sum(v, 1) / part  # v is zero outside
    centred = tl.where(inside[None, :], v - part_mean[:, None], 0.0)
    delta = part_mean - mean
    share = part / (seen + part)
    squares += tl.sum(centred * centred, 1) + delta * delta * (seen * share)
    return mean + delta * share, squares, seen + part


@triton.jit
def sigmoid(x):
    """Without overflow on either side."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def gelu(h):
    """The tanh form: h sigmoid(2 u), u = sqrt(2 / pi) (h + 0.044715 h^3)."""
    return h * sigmoid(1.5957691216057308 * h * (1.0 + 0.044715 * h * h))


@triton.jit
def gelu_slope(h):
    """The derivative of `gelu`."""
    s = sigmoid(1.5957691216057308 * h * (1.0 + 0.044715 * h * h))
    return s + h * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * h * h)
