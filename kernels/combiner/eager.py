"""The `torch` backend: PyTorch's own norm and product on a view of the kept rows.

No operator of ours wraps them: their C++ autograd is the fastest there is without a GPU, and a compiler may fuse them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mirasol.kernels.core.precision import accumulate_dtype


def last_m(x: Tensor, m: int, boundaries: Tensor | None) -> Tensor:
    """[B, T, n, d], or [B, N, d] with boundaries [T+1] -> [B, T, m, d]; a view for even chunks."""
    if boundaries is None:
        return x.narrow(2, x.shape[2] - m, m)
    index = boundaries[1:, None].long() + torch.arange(-m, 0, device=x.device)
    return x.index_select(1, index.flatten()).unflatten(1, index.shape)


def combiner_project(
    x: Tensor, m: int, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    eps: float, norm: str | None, boundaries: Tensor | None,
) -> Tensor:  # fmt: skip
    """x: [B, T, n, d], or [B, N, d] with boundaries [T+1] -> [B, T, m, d_out]."""
    rows = last_m(x, m, boundaries)
    if norm == "layer":
        rows = F.layer_norm(rows, rows.shape[-1:], *_affine(rows, norm_weight, norm_bias), eps)
    elif norm == "rms":
        rows = F.rms_norm(rows, rows.shape[-1:], norm_weight, eps)
    return F.linear(rows, weight, bias)


def _affine(rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Norm parameters in the dtype with which `F.layer_norm` keeps its statistics in float32.

    On a CPU these have the parameters' dtype; on a GPU they are float32 and the parameters must be like the rows.
    """
    wide = accumulate_dtype(rows.dtype)
    if rows.is_cuda or rows.dtype == wide:
        return weight, bias
    weight = rows.new_ones(rows.shape[-1], dtype=wide) if weight is None else weight.to(wide)
    return weight, rows.new_zeros(rows.shape[-1], dtype=wide) if bias is None else bias.to(wide)
