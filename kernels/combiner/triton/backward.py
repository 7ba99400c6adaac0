"""What backward does between its two products: norm, gather and scatter of the kept rows, in one pass over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirasol.kernels.combiner.triton.config import backward_config
from mirasol.kernels.combiner.triton.forward import kept_rows, places, vectors
from mirasol.kernels.core.device import target
from mirasol.kernels.core.dispatch import rows_contiguous
from mirasol.kernels.core.launch import accumulator, launch
from mirasol.kernels.core.precision import accumulate_dtype


@triton.jit(do_not_specialize=["R", "T", "m", "n", "eps"])
def combiner_project_bwd_rows_kernel(
    x, grad_y, norm_weight, norm_bias, boundaries, dx, y, partial,
    R, T, m, n, stride_b, stride_t, stride_n, eps,
    D: tl.constexpr, NORM: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Programs share the kept rows; each leaves its sums of the norm parameters' gradients in `partial`."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    k = tl.arange(0, WIDTH)[None, :]
    scale = 1.0 if norm_weight is None else tl.load(norm_weight + k, mask=k < D, other=0).to(ACC)  # [1, WIDTH]
    sum_weight = tl.zeros((1, WIDTH), dtype=ACC)
    sum_bias = tl.zeros((1, WIDTH), dtype=ACC)
    for first_row in range(pid * BM, R, programs * BM):
        rows = first_row + tl.arange(0, BM)
        b, t, token, inside = kept_rows(rows, R, boundaries, T, m, n)
        mask = inside[:, None] & (k < D)
        compact = rows[:, None].to(tl.int64) * D + k
        x_rows = x + (b * stride_b + t * stride_t + token * stride_n)[:, None]
        unit = tl.load(x_rows + k, mask=mask, other=0).to(ACC)  # [BM, WIDTH]
        if grad_y is not None:  # before the rows' statistics: both loads are under way at a time
            g = tl.load(grad_y + compact, mask=mask, other=0).to(ACC)
        if NORM == "layer":
            unit = tl.where(mask, unit - (tl.sum(unit, 1) / D)[:, None], 0)
        if NORM != "none":
            rstd = tl.math.rsqrt(tl.where(inside, tl.sum(unit * unit, 1) / D + eps, 1))
            unit *= rstd[:, None]
        if y is not None:
            shift = 0.0 if norm_bias is None else tl.load(norm_bias + k, mask=k < D, other=0).to(ACC)
            tl.store(y + compact, (unit * scale + shift).to(y.dtype.element_ty), mask=(rows < R)[:, None] & (k < D))
        if partial is not None:
            sum_weight += tl.sum(g * unit, 0, keep_dims=True)
            sum_bias += tl.sum(g, 0, keep_dims=True)
        if dx is not None:
            g *= scale
            if NORM != "none":
                g -= unit * (tl.sum(g * unit, 1) / D)[:, None]
                if NORM == "layer":
                    g -= (tl.sum(g, 1) / D)[:, None]
                g *= rstd[:, None]
            chunk = b * T + t if boundaries is None else b
            tl.store(dx + ((chunk * n + token) * D)[:, None] + k, g.to(dx.dtype.element_ty), mask=mask)
    if partial is not None:
        tl.store(partial + pid.to(tl.int64) * D + k, sum_weight, mask=k < D)
        tl.store(partial + (programs + pid).to(tl.int64) * D + k, sum_bias, mask=k < D)


def backward_rows(
    grad_y: Tensor | None, x: Tensor, m: int, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    norm: str, boundaries: Tensor | None, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """From grad_y [R, d], that of the normalised rows: dx like x, normalised rows y [R, d], norm's sums [2, d].

    Each is empty unless `needs` asks for it.
    """
    need_x, need_y, need_sums = needs
    d = x.shape[-1]
    dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    x = rows_contiguous(x)
    where = places(x, m, boundaries)
    block, width, programs, warps = backward_config(where[0], d, target(x.device))
    y = x.new_empty(where[0], d) if need_y else None
    partial = x.new_empty(2, programs, d, dtype=accumulate_dtype(x.dtype)) if need_sums else None
    tensors = (x, grad_y, *vectors(norm_weight, norm_bias, boundaries), dx, y, partial)
    constants = {"D": d, "NORM": norm, "BM": block, "WIDTH": width, "ACC": accumulator(x.dtype)}
    launch(combiner_project_bwd_rows_kernel, programs, tensors, (*where, eps), on=x, warps=warps, **constants)
    sums = None if partial is None else partial.sum(1).to(x.dtype)
    dx, y, sums = (x.new_empty(0) if found is None else found for found in (dx, y, sums))
    return dx, y, sums
