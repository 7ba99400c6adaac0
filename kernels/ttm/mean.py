"""Means over windows of neighbouring tokens, as products with a constant matrix; for every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mirasol.kernels.ttm.params import MeanPoolParams
from mirasol.kernels.ttm.summary import Partial, Parts


class MeanPool:
    """See `summary.Summary`: row i of the matrix [k, p] holds 1 / length inside window i, and is cut at the parts."""

    def __init__(self, params: MeanPoolParams, sizes: Sequence[int], like: torch.Tensor) -> None:
        total, k = sum(sizes), params.k
        row, token = torch.arange(k, device=like.device)[:, None], torch.arange(total, device=like.device)
        start, end = row * total // k, -(-(row + 1) * total // k)
        inside = (token >= start) & (token < end)
        self.weights = (inside.to(like.dtype) / (end - start).to(like.dtype)).split(list(sizes), dim=1)
        self.places = [None] * len(sizes) if params.positions is None else params.positions.split(list(sizes))

    def partial(self, parts: Parts) -> Partial:
        return Partial(self._sum(parts, None), None)

    def finish(self, parts: Parts, carry: Partial | None = None) -> torch.Tensor:
        return self._sum(parts, None if carry is None else carry.out)

    def _sum(self, parts: Parts, out: torch.Tensor | None) -> torch.Tensor:
        for v, place, weights in zip(parts, self.places, self.weights, strict=True):
            if v is None:
                continue
            v = v if place is None else v + place
            weights = weights.expand(v.shape[0], -1, -1)
            out = torch.bmm(weights, v) if out is None else torch.baddbmm(out, weights, v)
        assert out is not None
        return out
