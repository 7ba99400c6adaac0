"""The forward pass with the norm folded into the projection: rows enter the product as they lie, and are read once.

`((x - mean) rstd g + c) W^T + b = rstd (x W'^T - mean s) + k`, where `W' = W g` is rounded to the dtype of W, s holds
the sums of its rows and `k = c W^T + b`. As s sums the rounded W', a large mean cancels. The statistics come from the
tiles that the product reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mirasol.kernels.combiner.configs import FOLD_ROWS, FOLD_STEP, folded_tile
from mirasol.kernels.combiner.triton_rows import Rows, kept_rows
from mirasol.kernels.core.device import on_device, target


@triton.jit(do_not_specialize=["d_out"])
def combiner_fold_kernel(
    weight, bias, norm_weight, norm_bias, folded, sums, constants, d_out, stride_o,
    D: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """W' [d_out, d] in the dtype of W where there is a norm_weight; its row sums and W c + b, [d_out] each, in ACC."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < d_out
    total = tl.zeros((ROWS,), dtype=ACC)
    constant = tl.zeros((ROWS,), dtype=ACC)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        mask = inside[:, None] & (k < D)[None, :]
        w = tl.load(weight + rows[:, None].to(tl.int64) * stride_o + k[None, :], mask=mask, other=0)  # [ROWS, BK]
        if norm_bias is not None:
            constant += tl.sum(w.to(ACC) * tl.load(norm_bias + k, mask=k < D, other=0).to(ACC)[None, :], 1)
        if norm_weight is not None:
            w = (w.to(ACC) * tl.load(norm_weight + k, mask=k < D, other=0).to(ACC)[None, :]).to(w.dtype)
            tl.store(folded + rows[:, None].to(tl.int64) * D + k[None, :], w, mask=mask)
        total += tl.sum(w.to(ACC), 1)
    if bias is not None:
        constant += tl.load(bias + rows, mask=inside, other=0).to(ACC)
    tl.store(sums + rows, total, mask=inside)
    tl.store(constants + rows, constant, mask=inside)


@triton.jit(do_not_specialize=["R", "T", "m", "n", "eps"])
def combiner_project_fwd_folded_kernel(
    x, folded, sums, constants, boundaries, out, mean, rstd,
    R, T, m, n, stride_b, stride_t, stride_n, d_out, stride_o, eps,
    D: tl.constexpr, NORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BM kept rows by BN output columns."""
    column_tiles = tl.cdiv(d_out, BN)
    pid = tl.program_id(0)
    rows = (pid // column_tiles) * BM + tl.arange(0, BM)
    columns = (pid % column_tiles) * BN + tl.arange(0, BN)
    offsets, inside = kept_rows(rows, R, boundaries, T, m, n, stride_b, stride_t, stride_n)
    x_rows = x + offsets[:, None]
    w_rows = folded + columns[:, None].to(tl.int64) * stride_o
    # Any element of the row keeps the squares small where its mean is large.
    shift = tl.load(x + offsets, mask=inside, other=0).to(ACC)
    total = tl.zeros((BM,), dtype=ACC)
    squares = tl.zeros((BM,), dtype=ACC)
    acc = tl.zeros((BM, BN), dtype=ACC)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        if D % BK == 0:
            v = tl.load(x_rows + k[None, :], mask=inside[:, None], other=0)  # [BM, BK]
            w = tl.load(w_rows + k[None, :], mask=columns[:, None] < d_out, other=0)  # [BN, BK]
        else:
            v = tl.load(x_rows + k[None, :], mask=inside[:, None] & (k < D)[None, :], other=0)
            w = tl.load(w_rows + k[None, :], mask=(columns[:, None] < d_out) & (k < D)[None, :], other=0)
        acc = tl.dot(v, w.T, acc, input_precision=PRECISION, out_dtype=ACC)
        wide = v.to(ACC)
        if NORM == "layer":
            wide -= shift[:, None]
            if D % BK != 0:
                wide = tl.where((k < D)[None, :], wide, 0)
            total += tl.sum(wide, 1)
        squares += tl.sum(wide * wide, 1)

    mu = tl.zeros((BM,), dtype=ACC)
    variance = squares / D
    if NORM == "layer":
        off = total / D
        mu = shift + off
        variance = tl.maximum(variance - off * off, 0)
    rs = tl.math.rsqrt(tl.where(inside, variance + eps, 1))
    if pid % column_tiles == 0:
        tl.store(mean + rows, mu, mask=rows < R)
        tl.store(rstd + rows, rs, mask=rows < R)
    if NORM == "layer":
        acc -= mu[:, None] * tl.load(sums + columns, mask=columns < d_out, other=0)[None, :]
    acc = acc * rs[:, None] + tl.load(constants + columns, mask=columns < d_out, other=0)[None, :]
    out_tile = out + rows[:, None].to(tl.int64) * d_out + columns[None, :]
    tl.store(out_tile, acc.to(out.dtype.element_ty), mask=(rows < R)[:, None] & (columns < d_out)[None, :])


def forward(
    x: torch.Tensor,
    rows: Rows,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    norm: str,
    out: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    """Fill out [B, T, m, d_out], mean and rstd [B, T, m] of the kept `rows`; norm is "layer" or "rms"."""
    d_out, d = weight.shape
    sums, constants = (weight.new_empty(d_out, dtype=rows.acc) for _ in range(2))
    folded = weight if norm_weight is None else weight.new_empty(d_out, d)
    aligned = rows.aligned and folded.stride(0) % 16 == 0 and folded.data_ptr() % 16 == 0
    tile = folded_tile(rows.count, d_out, x.element_size(), aligned, target(x.device))
    grid = (triton.cdiv(rows.count, tile.rows) * triton.cdiv(d_out, tile.columns),)
    with on_device(x):
        combiner_fold_kernel[(triton.cdiv(d_out, FOLD_ROWS),)](
            *(weight, bias, norm_weight, norm_bias, folded, sums, constants, d_out, weight.stride(0)),
            D=d,
            ROWS=FOLD_ROWS,
            BK=FOLD_STEP,
            ACC=rows.ACC,
            num_warps=4,
        )
        combiner_project_fwd_folded_kernel[grid](
            *(rows.x, folded, sums, constants, rows.boundaries, out, mean, rstd),
            *(rows.count, *rows.layout, d_out, folded.stride(0), eps),
            D=d,
            NORM=norm,
            BM=tile.rows,
            BN=tile.columns,
            BK=tile.step,
            ACC=rows.ACC,
            PRECISION="ieee",
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
