"""Gather, norm, product and bias in one kernel; normalised rows live in registers, the left operand of the product."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mirasol.kernels.combiner.triton.config import forward_config
from mirasol.kernels.core.blocks import dot_of_registers, welford
from mirasol.kernels.core.device import target
from mirasol.kernels.core.dispatch import rows_contiguous
from mirasol.kernels.core.launch import accumulator, launch
from mirasol.kernels.core.precision import product_precision


@triton.jit
def kept_rows(rows, R, boundaries, T, m, n):
    """Batch, chunk and token (int64) of kept rows, and which of them exist.

    `n` is the tokens of a chunk, or with boundaries those of the whole sequence.
    """
    inside = rows < R
    chunk, i = rows // m, rows % m
    t = chunk % T
    if boundaries is None:
        token = n - m + i
    else:
        token = tl.load(boundaries + t + 1, mask=inside, other=0) - m + i
        inside &= (token >= 0) & (token < n)  # boundaries on a GPU are not checked
    return (chunk // T).to(tl.int64), t.to(tl.int64), token.to(tl.int64), inside


@triton.jit(do_not_specialize=["R", "T", "m", "n", "eps"])
def combiner_project_fwd_kernel(
    x, weight, bias, norm_weight, norm_bias, boundaries, out,
    R, T, m, n, stride_b, stride_t, stride_n, d_out, stride_o, eps,
    D: tl.constexpr, NORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """One program computes BM kept rows by BN output columns: first the rows' statistics, then their product.

    No loaded tile feeds both arithmetic and wgmma: Triton would refill it while wgmma still reads it.
    """
    column_blocks = tl.cdiv(d_out, BN)
    rows = (tl.program_id(0) // column_blocks) * BM + tl.arange(0, BM)
    columns = (tl.program_id(0) % column_blocks) * BN + tl.arange(0, BN)
    b, t, token, inside = kept_rows(rows, R, boundaries, T, m, n)
    x_rows = x + (b * stride_b + t * stride_t + token * stride_n)[:, None]
    w_rows = weight + columns[:, None].to(tl.int64) * stride_o

    mean = tl.zeros((BM,), dtype=ACC)
    squares = tl.zeros((BM,), dtype=ACC)
    if NORM != "none":
        seen = tl.zeros((), dtype=ACC)
        for start in tl.range(0, D, BK, num_stages=STAGES):  # without a product, pipelined only where asked
            k = start + tl.arange(0, BK)
            v = tl.load(x_rows + k[None, :], mask=inside[:, None] & (k < D)[None, :], other=0).to(ACC)  # [BM, BK]
            if NORM == "layer":
                mean, squares, seen = welford(v, k < D, mean, squares, seen)
            else:
                squares += tl.sum(v * v, 1)
    rstd = tl.math.rsqrt(tl.where(inside, squares / D + eps, 1))

    acc = tl.zeros((BM, BN), dtype=ACC)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        y = tl.load(x_rows + k[None, :], mask=inside[:, None] & (k < D)[None, :], other=0)  # [BM, BK]
        w = tl.load(w_rows + k[None, :], mask=(columns[:, None] < d_out) & (k < D)[None, :], other=0)  # [BN, BK]
        if NORM != "none":
            wide = (y.to(ACC) - mean[:, None]) * rstd[:, None]
            if norm_weight is not None:
                wide *= tl.load(norm_weight + k, mask=k < D, other=0).to(ACC)[None, :]
            if norm_bias is not None:
                wide += tl.load(norm_bias + k, mask=k < D, other=0).to(ACC)[None, :]
            y = wide.to(y.dtype)
        acc = dot_of_registers(y, w.T, acc, PRECISION, WAIT)
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < d_out, other=0).to(ACC)[None, :]
    out_block = out + rows[:, None].to(tl.int64) * d_out + columns[None, :]
    tl.store(out_block, acc.to(out.dtype.element_ty), mask=(rows < R)[:, None] & (columns < d_out)[None, :])


def forward(
    x: Tensor, m: int, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    eps: float, norm: str, boundaries: Tensor | None,
) -> Tensor:  # fmt: skip
    """[B, T, m, d_out]; norm is "layer", "rms" or "none"."""
    x, weight = rows_contiguous(x), rows_contiguous(weight)
    where = places(x, m, boundaries)
    rows, T, strides = where[0], where[1], where[4:]
    d_out, d = weight.shape
    out = x.new_empty(x.shape[0], T, m, d_out)
    if out.numel() == 0:
        return out
    aligned = all(value % 16 == 0 for value in (x.data_ptr(), weight.data_ptr(), *strides, weight.stride(0)))
    device = target(x.device)
    config = forward_config(rows, d_out, x.element_size(), aligned, device)
    constants = {"D": d, "NORM": norm, "ACC": accumulator(x.dtype), "PRECISION": product_precision(x.dtype)}
    constants["WAIT"] = norm != "none" and device.forgets_registers
    blocks = {"BM": config.rows, "BN": config.columns, "BK": config.step, "STAGES": config.stages}
    programs = triton.cdiv(rows, config.rows) * triton.cdiv(d_out, config.columns)
    tensors = (x, weight, *vectors(bias, norm_weight, norm_bias, boundaries), out)
    numbers = (*where, d_out, weight.stride(0), eps)
    options = {"warps": config.warps, "stages": config.stages}
    launch(combiner_project_fwd_kernel, programs, tensors, numbers, on=x, **options, **constants, **blocks)
    return out


def places(x: Tensor, m: int, boundaries: Tensor | None) -> tuple[int, ...]:
    """Kept rows R, T, m, n and the strides of batch, chunk (0 with boundaries) and token: what finds the kept rows."""
    if boundaries is None:
        T, n, strides = x.shape[1], x.shape[2], x.stride()[:3]
    else:
        T, n, strides = boundaries.shape[0] - 1, x.shape[1], (x.stride(0), 0, x.stride(1))
    return (x.shape[0] * T * m, T, m, n, *strides)


def vectors(*tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors of one dimension as kernels take them: without strides."""
    return [None if tensor is None else rows_contiguous(tensor) for tensor in tensors]
