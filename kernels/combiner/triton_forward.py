"""Gather, norm, product and bias in one kernel; normalised rows live in registers, the left operand of the product.

Serves what must not fold the norm into the projection (`configs.folds`); `triton_folded` serves the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mirasol.kernels.combiner import triton_folded
from mirasol.kernels.combiner.configs import folds, forward_tile
from mirasol.kernels.combiner.triton_rows import Rows, kept_rows, row_statistics
from mirasol.kernels.core.device import on_device, target


@triton.jit(do_not_specialize=["R", "T", "m", "n", "column_groups", "eps"])
def combiner_project_fwd_kernel(
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    boundaries,
    out,
    mean,
    rstd,
    R,
    T,
    m,
    n,
    stride_b,
    stride_t,
    stride_n,
    d_out,
    stride_o,
    column_groups,
    eps,
    D: tl.constexpr,
    NORM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program takes BM kept rows: their statistics once, then every `column_groups`-th tile of output columns."""
    pid = tl.program_id(0)
    rows = (pid // column_groups) * BM + tl.arange(0, BM)
    offsets, inside = kept_rows(rows, R, boundaries, T, m, n, stride_b, stride_t, stride_n)
    x_rows = x + offsets[:, None]
    mu, rs = row_statistics(x_rows, inside, eps, D, NORM, BM, BK, ACC)
    if pid % column_groups == 0:
        tl.store(mean + rows, mu, mask=rows < R)
        tl.store(rstd + rows, rs, mask=rows < R)

    for first_column in range((pid % column_groups) * BN, d_out, column_groups * BN):
        columns = first_column + tl.arange(0, BN)
        w_rows = weight + columns[:, None].to(tl.int64) * stride_o
        acc = tl.zeros((BM, BN), dtype=ACC)
        for start in range(0, D, BK):
            k = start + tl.arange(0, BK)
            if D % BK == 0:
                y = tl.load(x_rows + k[None, :], mask=inside[:, None], other=0)  # [BM, BK]
                w = tl.load(w_rows + k[None, :], mask=columns[:, None] < d_out, other=0)  # [BN, BK]
            else:
                y = tl.load(x_rows + k[None, :], mask=inside[:, None] & (k < D)[None, :], other=0)
                w = tl.load(w_rows + k[None, :], mask=(columns[:, None] < d_out) & (k < D)[None, :], other=0)
            if NORM != "none":
                wide = (y.to(ACC) - mu[:, None]) * rs[:, None]
                if norm_weight is not None:
                    wide *= tl.load(norm_weight + k, mask=k < D, other=0).to(ACC)[None, :]
                if norm_bias is not None:
                    wide += tl.load(norm_bias + k, mask=k < D, other=0).to(ACC)[None, :]
                y = wide.to(y.dtype)
            acc = tl.dot(y, w.T, acc, input_precision=PRECISION, out_dtype=ACC)
        if bias is not None:
            acc += tl.load(bias + columns, mask=columns < d_out, other=0).to(ACC)[None, :]
        out_tile = out + rows[:, None].to(tl.int64) * d_out + columns[None, :]
        tl.store(out_tile, acc.to(out.dtype.element_ty), mask=(rows < R)[:, None] & (columns < d_out)[None, :])


def forward(
    x: torch.Tensor,
    m: int,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    norm: str,
    boundaries: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [B, T, m, d_out] and, [B, T, m] each, the mean that was subtracted and the factor that followed."""
    rows = Rows.of(x, m, boundaries)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    d_out, d = weight.shape
    out = x.new_empty((*rows.shape, d_out))
    mean, rstd = (x.new_empty(rows.shape, dtype=rows.acc) for _ in range(2))
    if out.numel() == 0:
        return out, mean, rstd
    if folds(x.dtype, norm):
        triton_folded.forward(x, rows, weight, bias, norm_weight, norm_bias, eps, norm, out, mean, rstd)
        return out, mean, rstd
    aligned = rows.aligned and weight.stride(0) % 16 == 0 and weight.data_ptr() % 16 == 0
    tile, column_groups = forward_tile(rows.count, d_out, x.element_size(), aligned, target(x.device))
    grid = (triton.cdiv(rows.count, tile.rows) * column_groups,)
    with on_device(x):
        combiner_project_fwd_kernel[grid](
            rows.x,
            weight,
            bias,
            norm_weight,
            norm_bias,
            rows.boundaries,
            out,
            mean,
            rstd,
            rows.count,
            *rows.layout,
            d_out,
            weight.stride(0),
            column_groups,
            eps,
            D=d,
            NORM=norm,
            BM=tile.rows,
            BN=tile.columns,
            BK=tile.step,
            ACC=rows.ACC,
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out, mean, rstd
