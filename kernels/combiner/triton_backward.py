"""Gradients. The two products have nothing to fuse and are PyTorch's; one kernel does everything around them.

`grad_y = grad @ weight` comes first; the kernel then reads it and the kept rows once and writes all of dx (zeros
outside the kept rows included), the normalised rows for `grad.T @ y`, and partial sums for the norm parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from mirasol.kernels.combiner.configs import backward_rows
from mirasol.kernels.combiner.triton_rows import Rows, kept_rows
from mirasol.kernels.core.device import on_device, target


@triton.jit
def clear_dropped(dx, part, boundaries, T, m, n, parts, D: tl.constexpr, BLOCK: tl.constexpr):
    """Write zeros to every `parts`-th block of the tokens before the last m of one chunk of a contiguous dx."""
    chunk = part // parts
    b, t = (chunk // T).to(tl.int64), chunk % T
    if boundaries is None:
        first, end = chunk.to(tl.int64) * n, chunk.to(tl.int64) * n + n - m
    else:
        first = b * n + tl.maximum(tl.load(boundaries + t), 0)
        end = b * n + tl.minimum(tl.load(boundaries + t + 1) - m, n)
    lanes = tl.arange(0, BLOCK)
    for start in range(first * D + (part % parts) * BLOCK, end * D, parts * BLOCK):
        tl.store(dx + start + lanes, tl.zeros((BLOCK,), dtype=dx.dtype.element_ty), mask=start + lanes < end * D)


@triton.jit(do_not_specialize=["R", "T", "m", "n", "n_dx", "kept_programs", "zero_programs"])
def combiner_project_bwd_rows_kernel(
    x,
    grad_y,
    mean,
    rstd,
    norm_weight,
    norm_bias,
    boundaries,
    dx_boundaries,
    dx,
    y,
    partial,
    R,
    T,
    m,
    n,
    stride_b,
    stride_t,
    stride_n,
    n_dx,
    kept_programs,
    zero_programs,
    D: tl.constexpr,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The first programs share the kept rows; the others clear the rest of dx, `zero_programs` for each chunk."""
    pid = tl.program_id(0)
    k = tl.arange(0, WIDTH)
    if pid >= kept_programs:
        if dx is not None:
            clear_dropped(dx, pid - kept_programs, dx_boundaries, T, m, n_dx, zero_programs, D, ROWS * WIDTH)
    else:
        sum_weight = tl.zeros((WIDTH,), dtype=ACC)
        sum_bias = tl.zeros((WIDTH,), dtype=ACC)
        for first_row in range(pid * ROWS, R, kept_programs * ROWS):
            rows = first_row + tl.arange(0, ROWS)
            offsets, inside = kept_rows(rows, R, boundaries, T, m, n, stride_b, stride_t, stride_n)
            mask = inside[:, None] & (k < D)[None, :]
            compact = rows[:, None].to(tl.int64) * D + k[None, :]
            mu = tl.load(mean + rows, mask=inside, other=0)
            rs = tl.load(rstd + rows, mask=inside, other=0)
            v = tl.load(x + offsets[:, None] + k[None, :], mask=mask, other=0).to(ACC)  # [ROWS, WIDTH]
            unit = tl.where(mask, (v - mu[:, None]) * rs[:, None], 0)
            if y is not None:
                normed = unit
                if norm_weight is not None:
                    normed *= tl.load(norm_weight + k, mask=k < D, other=0).to(ACC)[None, :]
                if norm_bias is not None:
                    normed += tl.load(norm_bias + k, mask=k < D, other=0).to(ACC)[None, :]
                tl.store(y + compact, normed.to(y.dtype.element_ty), mask=mask)
            if grad_y is not None:
                g = tl.load(grad_y + compact, mask=mask, other=0).to(ACC)
                if partial is not None:
                    sum_weight += tl.sum(g * unit, 0)
                    sum_bias += tl.sum(g, 0)
                if dx is not None:
                    if norm_weight is not None:
                        g *= tl.load(norm_weight + k, mask=k < D, other=0).to(ACC)[None, :]
                    if NORM != "none":
                        g -= unit * (tl.sum(g * unit, 1) / D)[:, None]
                    if NORM == "layer":
                        g -= (tl.sum(g, 1) / D)[:, None]
                    g *= rs[:, None]
                    per_chunk = n_dx.to(tl.int64) * D
                    per_batch = per_chunk * T if dx_boundaries is None else per_chunk
                    dx_offsets, _ = kept_rows(rows, R, dx_boundaries, T, m, n_dx, per_batch, per_chunk, D)
                    tl.store(dx + dx_offsets[:, None] + k[None, :], g.to(dx.dtype.element_ty), mask=mask)
        if partial is not None:
            tl.store(partial + pid.to(tl.int64) * D + k, sum_weight, mask=k < D)
            tl.store(partial + (kept_programs + pid).to(tl.int64) * D + k, sum_bias, mask=k < D)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    m: int,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    norm: str,
    boundaries: torch.Tensor | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, weight, bias, norm_weight and norm_bias where `needs` asks for them, else None."""
    need_x, need_weight, need_bias, need_norm_weight, need_norm_bias = needs
    grad = grad.reshape(-1, grad.shape[-1])
    grad_y = grad @ weight if need_x or need_norm_weight or need_norm_bias else None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    y = grad.new_empty(grad.shape[0], weight.shape[1]) if need_weight else None
    partial = None
    if grad_y is not None or y is not None:
        with_sums = need_norm_weight or need_norm_bias
        partial = _launch_rows(x, grad_y, mean, rstd, m, norm_weight, norm_bias, norm, boundaries, dx, y, with_sums)
    return (
        dx,
        None if y is None else grad.T @ y,
        grad.sum(0) if need_bias else None,
        partial[0].sum(0).to(x.dtype) if partial is not None and need_norm_weight else None,
        partial[1].sum(0).to(x.dtype) if partial is not None and need_norm_bias else None,
    )


def _launch_rows(
    x: torch.Tensor,
    grad_y: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    m: int,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    norm: str,
    boundaries: torch.Tensor | None,
    dx: torch.Tensor | None,
    y: torch.Tensor | None,
    with_sums: bool,
) -> torch.Tensor | None:
    """Fill dx and y; return the programs' sums for the norm parameters, [2, programs, d], where they are asked for."""
    rows = Rows.of(x, m, boundaries)
    B, T, _ = rows.shape
    n_dx, d = x.shape[-2:]
    dropped = B * T * (n_dx - m) if boundaries is None else B * (n_dx - T * m)
    config = backward_rows(rows.count, B * T, dropped, d, target(x.device))
    partial = x.new_empty((2, config.kept_programs, d), dtype=rows.acc) if with_sums else None
    programs = config.kept_programs + (B * T * config.zero_programs if dx is not None else 0)
    with on_device(x):
        combiner_project_bwd_rows_kernel[(programs,)](
            rows.x,
            grad_y,
            mean,
            rstd,
            norm_weight,
            norm_bias,
            rows.boundaries,
            boundaries,
            dx,
            y,
            partial,
            rows.count,
            *rows.layout,
            n_dx,
            config.kept_programs,
            config.zero_programs,
            D=d,
            NORM=norm,
            WIDTH=config.width,
            ROWS=config.rows,
            ACC=rows.ACC,
            num_warps=config.warps,
        )
    return partial
