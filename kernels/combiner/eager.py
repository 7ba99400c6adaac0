"""The `torch` backend: PyTorch's own norm and product on a view of the kept rows.

No operator of ours wraps them: their C++ autograd is the fastest there is without a GPU, and a compiler may fuse them.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mirasol.kernels.combiner.chunks import take_last_m
from mirasol.kernels.core.precision import accumulate_dtype


def combiner_project(
    x: torch.Tensor,
    m: int,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    norm: str | None,
    boundaries: torch.Tensor | None,
) -> torch.Tensor:
    """x: [B, T, n, d], or [B, N, d] with boundaries [T+1] -> [B, T, m, d_out]."""
    rows = take_last_m(x, m, boundaries)
    if norm == "layer":
        rows = F.layer_norm(rows, rows.shape[-1:], *_affine(rows, norm_weight, norm_bias), eps)
    elif norm == "rms":
        rows = F.rms_norm(rows, rows.shape[-1:], norm_weight, eps)
    return F.linear(rows, weight, bias)


def _affine(
    rows: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Norm parameters in the dtype with which `F.layer_norm` keeps its statistics in float32.

    On a CPU these have the parameters' dtype; on a GPU they are float32 and the parameters must be like the rows.
    """
    wide = accumulate_dtype(rows.dtype)
    if rows.is_cuda or rows.dtype == wide:
        return weight, bias
    weight = rows.new_ones(rows.shape[-1], dtype=wide) if weight is None else weight.to(wide)
    return weight, rows.new_zeros(rows.shape[-1], dtype=wide) if bias is None else bias.to(wide)
