"""Kernels and launches of `op.fold`: the norm's weight and bias folded into the score network's first layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mirasol.kernels.core.launch import accumulator, launch
from mirasol.kernels.core.precision import accumulate_dtype
from mirasol.kernels.ttm.pool.triton.config import COUNTERS


@triton.jit
def fold_fwd_kernel(
    norm_weight, norm_bias, w1, b1, folded_w1, folded_b1, low, low_sums, counters,
    D: tl.constexpr, BD: tl.constexpr, COUNTERS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One row: w1 g, centred, in two dtypes, what the lower one's sums to, and b1 + w1 . c; and counters at zero."""
    j = tl.program_id(0)
    columns = tl.arange(0, BD)
    own = columns < D
    row = tl.load(w1 + j * D + columns, mask=own, other=0.0).to(ACC)
    weighted = row * tl.load(norm_weight + columns, mask=own, other=0.0).to(ACC)
    centred = weighted - tl.sum(weighted, 0) / D
    tl.store(folded_w1 + j * D + columns, centred, mask=own)
    rounded = centred.to(low.dtype.element_ty)
    tl.store(low + j * D + columns, rounded, mask=own)
    tl.store(low_sums + j, tl.sum(tl.where(own, rounded.to(ACC), 0.0), 0))
    shift = tl.sum(row * tl.load(norm_bias + columns, mask=own, other=0.0).to(ACC), 0)
    tl.store(folded_b1 + j, tl.load(b1 + j).to(ACC) + shift)
    if j == 0:
        counter = tl.arange(0, COUNTERS)
        tl.store(counters + counter, counter * 0)


@triton.jit
def fold_bwd_kernel(
    grad_w1, grad_b1, norm_weight, norm_bias, w1, to_weight, to_bias, to_w1, to_b1,
    D: tl.constexpr, J: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BD columns of the gradients of w1, g and c; the first program also hands on that of b1.

    Centring needs no backward of its own: rows of grad_w1 have mean zero.
    """
    j = tl.arange(0, BJ)
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    own = columns < D
    mask = (j < J)[:, None] & own[None, :]
    at = (j * D)[:, None] + columns[None, :]
    grad = tl.load(grad_w1 + at, mask=mask, other=0.0)
    layer = tl.load(w1 + at, mask=mask, other=0.0).to(ACC)
    shift = tl.load(grad_b1 + j, mask=j < J, other=0.0)
    weight = tl.load(norm_weight + columns, mask=own, other=0.0).to(ACC)
    bias = tl.load(norm_bias + columns, mask=own, other=0.0).to(ACC)
    dtype = to_w1.dtype.element_ty
    tl.store(to_w1 + at, (grad * weight[None, :] + shift[:, None] * bias[None, :]).to(dtype), mask)
    tl.store(to_weight + columns, tl.sum(grad * layer, 0).to(dtype), mask=own)
    tl.store(to_bias + columns, tl.sum(shift[:, None] * layer, 0).to(dtype), mask=own)
    if tl.program_id(0) == 0:
        tl.store(to_b1 + j, shift.to(dtype), mask=j < J)


def forward(
    norm_weight: torch.Tensor, norm_bias: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """As `op.ttm_fold`."""
    given = [t.contiguous() for t in (norm_weight, norm_bias, w1, b1)]
    (hidden, d), acc = w1.shape, accumulate_dtype(w1.dtype)
    rows = w1.new_empty(w1.shape, dtype=acc)
    counters = w1.new_empty(COUNTERS, dtype=torch.int32)
    found = rows, rows.new_empty(hidden), torch.empty_like(given[2]), rows.new_empty(hidden), counters
    constants = dict(D=d, BD=triton.next_power_of_2(d), COUNTERS=COUNTERS, ACC=accumulator(w1.dtype))
    launch(fold_fwd_kernel, hidden, [*given, *found], on=w1, warps=8, **constants)
    return found


def backward(
    grad_w1: torch.Tensor, grad_b1: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, w1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `op.ttm_fold_backward`."""
    given = [t.contiguous() for t in (grad_w1, grad_b1, norm_weight, norm_bias, w1)]
    hidden, d = w1.shape
    found = w1.new_empty(d), w1.new_empty(d), w1.new_empty(w1.shape), w1.new_empty(hidden)
    constants = dict(D=d, J=hidden, BJ=triton.next_power_of_2(hidden), BD=16, ACC=accumulator(w1.dtype))
    # One warp holds a whole column: its sum needs no shared memory.
    launch(fold_bwd_kernel, triton.cdiv(d, 16), [*given, *found], on=w1, warps=1, **constants)
    return found
