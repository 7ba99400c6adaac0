"""Latent-query summaries: attention of learned queries over the tokens.

The queries are constants, so that scores need no projected keys: q_h (Wk_h v + bk_h) = (Wk_h^T q_h) v + q_h bk_h. The
values are projected after pooling where that is less work, before it otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from mirasol.kernels.core.precision import accumulate_dtype
from mirasol.kernels.ttm.params import LatentQueryParams
from mirasol.kernels.ttm.pool import eager, op
from mirasol.kernels.ttm.pool.triton.config import COUNTERS, MOST_ROWS, MOST_WIDTH
from mirasol.kernels.ttm.summary import Partial, Parts, Positions, given


def pools_first(params: LatentQueryParams) -> bool:
    """Whether tokens are pooled before values are projected: H k d products a token against d d + k d, twice."""
    k, d = params.queries.shape
    return params.heads * k <= d + k


def pooled_rows(params: LatentQueryParams, backend: str) -> int | None:
    """How many rows the pooling kernels give, heads times queries; None where PyTorch's products serve the summary."""
    k, d = params.queries.shape
    fits = params.heads * k <= MOST_ROWS and d <= MOST_WIDTH
    return params.heads * k if backend == "triton" and fits and pools_first(params) else None


class LatentQuery:
    """See `summary.Summary`. Partials have rows [B, H k, d] of pooled tokens, or [B, H, k, D] of pooled values."""

    def __init__(self, params: LatentQueryParams, sizes: Sequence[int], backend: str) -> None:
        self.params, self.positions = params, Positions(params.positions, sizes)
        self.pools_first, self.by_kernels = pools_first(params), pooled_rows(params, backend) is not None
        projected = self._by_head(linear(params.queries, params.wq, params.bq))
        self.queries = projected * projected.shape[-1] ** -0.5  # [H, k, D]
        if self.pools_first:
            self.rows = torch.bmm(self.queries, params.wk.unflatten(0, (params.heads, -1))).flatten(0, 1)  # [H k, d]
            self.shift = torch.bmm(self.queries, params.bk.unflatten(0, (params.heads, -1, 1))).flatten()  # [H k]
        if self.by_kernels:
            self.counters = params.queries.new_zeros(COUNTERS, dtype=torch.int32)

    def partial(self, parts: Parts) -> Partial:
        return self._pool(parts, None, want_lse=True)

    def finish(self, parts: Parts, carry: Partial | None = None) -> torch.Tensor:
        p = self.params
        values = self._pool(parts, carry, want_lse=False).out
        if self.pools_first:
            by_head = values.unflatten(1, (p.heads, -1)).transpose(0, 1)  # [H, B, k, d]
            layers = p.wv.unflatten(0, (p.heads, -1)).transpose(1, 2)  # [H, d, D]
            values = torch.bmm(by_head.flatten(1, 2), layers).unflatten(1, by_head.shape[1:3]).transpose(0, 1)
        return linear(values.transpose(1, 2).flatten(2) + p.bv, p.wo, p.bo)

    def _pool(self, parts: Parts, carry: Partial | None, want_lse: bool) -> Partial:
        sources, positions = given(parts), self.positions.of(parts)
        if self.by_kernels:
            linear_scores = op.Scores(self.rows, self.shift.to(accumulate_dtype(self.shift.dtype)), self.counters)
            return op.pool(sources, positions, linear_scores, carry)
        v = eager.join(sources, positions)
        if self.pools_first:
            scores, values = eager.products(self.rows, v, self.shift), v
        else:
            keys = self._by_head(linear(v, self.params.wk, self.params.bk))  # [B, H, p, D]
            scores, values = torch.matmul(self.queries, keys.mT), self._by_head(linear(v, self.params.wv))
        return eager.attend(scores, values, carry, want_lse)

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """[..., p, d] -> [..., H, p, D]."""
        return x.unflatten(-1, (self.params.heads, -1)).transpose(-3, -2)
