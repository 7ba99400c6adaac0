"""The specification of `combiner_project`."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mirasol.kernels.core.precision import accumulate_dtype


def combiner_project(
    x: Tensor, m: int, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    eps: float, norm: str | None, boundaries: Tensor | None,
) -> Tensor:  # fmt: skip
    """Normalise every token, project every token, then keep the last m of each chunk.

    x: [B, T, n, d], or [B, N, d] with boundaries [T+1] -> [B, T, m, d_out]. The norm is kept in float32 (float64 for
    float64) and rounded to the dtype of x before the product, as PyTorch's modules do.
    """
    rows = x.to(accumulate_dtype(x.dtype))
    if norm == "layer":
        centred = rows - rows.mean(-1, keepdim=True)
        rows = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    elif norm == "rms":
        rows = rows / (rows.square().mean(-1, keepdim=True) + eps).sqrt()
    if norm_weight is not None:
        rows = rows * norm_weight
    if norm_bias is not None:
        rows = rows + norm_bias
    out = rows.to(x.dtype) @ weight.T
    if bias is not None:
        out = out + bias
    if boundaries is None:
        return out[:, :, out.shape[2] - m :].contiguous()
    chunks = [out[:, start:end] for start, end in itertools.pairwise(boundaries.tolist())]
    return torch.stack([chunk[:, chunk.shape[1] - m :] for chunk in chunks], dim=1)
