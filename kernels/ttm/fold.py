"""A TokenLearner's score network with the LayerNorm folded into its first layer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..core.precision import accumulate_dtype
from . import ops
from .params import TokenLearnerParams


class Folded(NamedTuple):
    """A score network with the LayerNorm's weight and bias folded into the first layer: w1 [J, d], b1 [J]."""

    w1: torch.Tensor
    b1: torch.Tensor


def fold(params: TokenLearnerParams, backend: str = "torch") -> Folded:
    """W1 (x g + c) + b1 = (W1 g) x + (W1 c + b1); rows of W1 g are centred, which is free as x has mean zero."""
    if backend == "triton":
        return Folded(*ops.Fold.apply(params.norm_weight, params.norm_bias, params.w1, params.b1))
    acc = accumulate_dtype(params.w1.dtype)
    w1 = params.w1.to(acc)
    weighted = w1 * params.norm_weight.to(acc)
    bias = params.b1.to(acc) + (w1 * params.norm_bias.to(acc)).sum(dim=-1)
    return Folded(weighted - weighted.mean(dim=-1, keepdim=True), bias)
