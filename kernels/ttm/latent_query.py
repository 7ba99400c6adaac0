"""Latent-query summaries: attention of learned queries over the tokens, in the form that suits shape and backend.

The queries are constants, so that scores need no projected keys: q_h (Wk_h v) = (q_h Wk_h) v; the key bias is one
number a query, which falls out of the softmax but belongs to lse. The values are projected after pooling where that is
less work (H k < d), before it otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..attention.api import chunked_attention
from ..core.precision import accumulate_dtype
from . import ops
from .configs import pools_latent_queries
from .params import LatentQueryParams
from .partials import Partial, Summary


def latent_query(params: LatentQueryParams, sizes: Sequence[int], backend: str) -> Summary:
    """The form that serves these parameters, for parts of `sizes` tokens."""
    if backend != "triton":
        return ByProducts(params, sizes)
    return ByPooling(params, sizes) if pools_latent_queries(params) else ByAttention(params, sizes)


def head_queries(params: LatentQueryParams) -> torch.Tensor:
    """[H, k, D], scaled by 1 / sqrt(D)."""
    projected = torch.nn.functional.linear(params.queries, params.wq, params.bq).unflatten(-1, (params.heads, -1))
    return projected.transpose(0, 1) * projected.shape[-1] ** -0.5


def fold_keys(params: LatentQueryParams, queries: torch.Tensor) -> torch.Tensor:
    """[H, k, d]: products with the tokens themselves give the scores, but for `key_shift`."""
    return torch.bmm(queries, params.wk.unflatten(0, (params.heads, -1)))


def key_shift(params: LatentQueryParams, queries: torch.Tensor) -> torch.Tensor:
    """[H, k]: what the key bias adds to every score of a query."""
    return torch.bmm(queries, params.bk.unflatten(0, (params.heads, -1, 1)))[..., 0]


class ByPooling:
    """By the fused operator: tokens are pooled under H k linear scores, then projected."""

    def __init__(self, params: LatentQueryParams, sizes: Sequence[int]) -> None:
        self.params = params
        self.positions = None if params.positions is None else params.positions.split(list(sizes))
        queries = head_queries(params)
        self.rows = fold_keys(params, queries).flatten(0, 1)
        self.shift = key_shift(params, queries).flatten().to(accumulate_dtype(queries.dtype))

    def partial(self, parts: Mapping[int, torch.Tensor]) -> Partial:
        return self._pool(parts, None)

    def finish(self, parts: Mapping[int, torch.Tensor], carry: Partial | None = None) -> torch.Tensor:
        p = self.params
        pooled = self._pool(parts, carry).out.unflatten(1, (p.heads, -1))  # [B, H, k, d]
        by_head = pooled.transpose(0, 1).flatten(1, 2)  # [H, B k, d]
        values = torch.bmm(by_head, p.wv.unflatten(0, (p.heads, -1)).transpose(1, 2)).unflatten(
            1, (-1, pooled.shape[2])
        )
        return torch.nn.functional.linear(values.permute(1, 2, 0, 3).flatten(2) + p.bv, p.wo, p.bo)

    def _pool(self, parts: Mapping[int, torch.Tensor], carry: Partial | None) -> Partial:
        positions = [] if self.positions is None else [self.positions[part] for part in parts]
        out, lse = (None, None) if carry is None else carry
        return Partial(*ops.summary(list(parts.values()), positions, self.rows, self.shift, [], [], out, lse))


class _OfProjectedValues:
    """Each part is attended to apart, its values projected; partial results [B, k, d] merge head by head."""

    def __init__(self, params: LatentQueryParams, sizes: Sequence[int]) -> None:
        self.params = params
        self.positions = None if params.positions is None else params.positions.split(list(sizes))

    def partial(self, parts: Mapping[int, torch.Tensor]) -> Partial:
        return self._merge([self._of_part(part, v) for part, v in parts.items()])

    def finish(self, parts: Mapping[int, torch.Tensor], carry: Partial | None = None) -> torch.Tensor:
        partials = [self._of_part(part, v) for part, v in parts.items()] + ([] if carry is None else [carry])
        return torch.nn.functional.linear(self._merge(partials).out, self.params.wo, self.params.bo)

    def _of_part(self, part: int, v: torch.Tensor) -> Partial:
        return self._attend(v if self.positions is None else v + self.positions[part])

    def _attend(self, v: torch.Tensor) -> Partial:
        """Mean of the projected values under each head's weights [B, k, d], and lse [B, H, k]."""
        raise NotImplementedError

    def _merge(self, partials: Sequence[Partial]) -> Partial:
        if len(partials) == 1:
            return partials[0]
        lses = torch.stack([partial.lse for partial in partials if partial.lse is not None])
        lse = lses.logsumexp(dim=0)
        shares = (lses - lse).exp().transpose(2, 3)[..., None]  # [parts, B, k, H, 1]
        outs = torch.stack([partial.out for partial in partials]).unflatten(-1, (self.params.heads, -1))
        return Partial((outs * shares.to(outs.dtype)).sum(dim=0).flatten(2), lse)


class ByAttention(_OfProjectedValues):
    """By chunked attention: keys and values of all tokens by one product, no weights in memory."""

    def __init__(self, params: LatentQueryParams, sizes: Sequence[int]) -> None:
        super().__init__(params, sizes)
        self.queries = head_queries(params)
        self.weight, self.bias = torch.cat([params.wk, params.wv]), torch.cat([params.bk, params.bv])

    def _attend(self, v: torch.Tensor) -> Partial:
        projected = torch.nn.functional.linear(v, self.weight, self.bias).unflatten(-1, (2, self.params.heads, -1))
        keys, values = projected.permute(2, 0, 3, 1, 4)  # [B, H, p, D]
        queries = self.queries.expand(v.shape[0], -1, -1, -1)
        out, lse = chunked_attention(
            queries,
            keys,
            values,
            q_chunk=queries.shape[2],
            k_chunk=v.shape[1],
            scale=1.0,
            return_lse=True,
            backend="triton",
        )
        return Partial(out.transpose(1, 2).flatten(2), lse)


class ByProducts(_OfProjectedValues):
    """By library matrix products."""

    def __init__(self, params: LatentQueryParams, sizes: Sequence[int]) -> None:
        super().__init__(params, sizes)
        self.queries = head_queries(params)
        self.shift = key_shift(params, self.queries)
        pool_first = params.heads * params.queries.shape[0] < params.queries.shape[1]
        self.folded = fold_keys(params, self.queries) if pool_first else None

    def _attend(self, v: torch.Tensor) -> Partial:
        p, heads = self.params, self.params.heads
        if self.folded is not None:
            scores = torch.matmul(self.folded.flatten(0, 1), v.transpose(1, 2)).unflatten(1, (heads, -1))
        else:
            keys = torch.nn.functional.linear(v, p.wk).unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)
            scores = torch.matmul(self.queries, keys)  # [B, H, k, p]
        lse = scores.to(accumulate_dtype(v.dtype)).logsumexp(dim=-1)
        weights = (scores - lse[..., None]).exp().to(v.dtype)
        if self.folded is not None:
            pooled = torch.bmm(weights.flatten(1, 2), v).unflatten(1, (heads, -1))  # [B, H, k, d]
            out = torch.matmul(pooled, p.wv.unflatten(0, (heads, -1)).transpose(1, 2))  # [B, H, k, D]
        else:
            out = torch.matmul(weights, torch.nn.functional.linear(v, p.wv).unflatten(-1, (heads, -1)).transpose(1, 2))
        return Partial(out.transpose(1, 2).flatten(2) + p.bv, lse + self.shift)
