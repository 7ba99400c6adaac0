"""Summaries of parts of the tokens: which one parameters describe, TokenLearner, and means over windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from . import eager, ops
from .configs import pools_latent_queries
from .fold import fold
from .latent_query import latent_query
from .params import (
    EraseAddParams,
    LatentQueryParams,
    MeanPoolParams,
    SummaryParams,
    TokenLearnerParams,
    WriteParams,
    summary_size,
)
from .partials import INPUTS, MEMORY, OUTPUTS, Partial, Summary

__all__ = ["INPUTS", "MEMORY", "OUTPUTS", "Partial", "Summary", "partial_size", "prepare"]


def prepare(params: SummaryParams, sizes: Sequence[int], backend: str) -> Summary:
    """The summary that `params` describe, for parts of `sizes` tokens in the order memory, inputs, outputs."""
    if isinstance(params, TokenLearnerParams):
        return TokenLearner(params, sizes) if backend == "triton" else eager.TokenLearner(params, sizes)
    if isinstance(params, LatentQueryParams):
        return latent_query(params, sizes, backend)
    return MeanPool(params, sizes, backend)


def partial_size(params: WriteParams, backend: str) -> int:
    """How many rows of width d the partial summary of a chunk's inputs holds."""
    if isinstance(params, EraseAddParams):
        return 0
    if isinstance(params, LatentQueryParams) and backend == "triton" and pools_latent_queries(params):
        return params.heads * params.queries.shape[0]
    return summary_size(params)


class TokenLearner:
    """TokenLearner v1.1 by the fused operator."""

    def __init__(self, params: TokenLearnerParams, sizes: Sequence[int]) -> None:
        self.folded = fold(params, "triton")
        self.w2, self.b2 = params.w2, params.b2
        self.positions = None if params.positions is None else params.positions.split(list(sizes))

    def partial(self, parts: Mapping[int, torch.Tensor]) -> Partial:
        return self._run(parts, None)

    def finish(self, parts: Mapping[int, torch.Tensor], carry: Partial | None = None) -> torch.Tensor:
        return self._run(parts, carry).out

    def _run(self, parts: Mapping[int, torch.Tensor], carry: Partial | None) -> Partial:
        positions = [] if self.positions is None else [self.positions[part] for part in parts]
        carried = (None, None) if carry is None else carry
        return Partial(*ops.summary(list(parts.values()), positions, *self.folded, [self.w2], [self.b2], *carried))


class MeanPool:
    """Means over windows of tokens: a constant matrix [k, p], cut at the borders of the parts, or a fused operator."""

    def __init__(self, params: MeanPoolParams, sizes: Sequence[int], backend: str) -> None:
        self.k, self.sizes, self.backend = params.k, list(sizes), backend
        self.positions = None if params.positions is None else params.positions.split(self.sizes)

    def partial(self, parts: Mapping[int, torch.Tensor]) -> Partial:
        return Partial(self._sum(parts, None), None)

    def finish(self, parts: Mapping[int, torch.Tensor], carry: Partial | None = None) -> torch.Tensor:
        return self._sum(parts, None if carry is None else carry.out)

    def _sum(self, parts: Mapping[int, torch.Tensor], carry: torch.Tensor | None) -> torch.Tensor:
        if self.backend == "triton":
            positions = [] if self.positions is None else [self.positions[part] for part in parts]
            offsets = [sum(self.sizes[:part]) for part in parts]
            return ops.mean(list(parts.values()), positions, carry, offsets, sum(self.sizes), self.k)
        outs = [torch.matmul(self._weights(part, v), self._tokens(part, v)) for part, v in parts.items()]
        outs += [] if carry is None else [carry]
        return outs[0] if len(outs) == 1 else torch.stack(outs).sum(dim=0)

    def _tokens(self, part: int, v: torch.Tensor) -> torch.Tensor:
        return v if self.positions is None else v + self.positions[part]

    def _weights(self, part: int, like: torch.Tensor) -> torch.Tensor:
        """[k, p_part]: 1 / window length inside the window, 0 outside."""
        total, offset = sum(self.sizes), sum(self.sizes[:part])
        row = torch.arange(self.k, device=like.device)[:, None]
        start, end = row * total // self.k, -(-(row + 1) * total // self.k)
        token = torch.arange(offset, offset + self.sizes[part], device=like.device)
        inside = (token >= start) & (token < end)
        return inside.to(like.dtype) / (end - start).to(like.dtype)
