"""Summaries of parts of the tokens, and how partial results merge.

The tokens come in up to three parts (memory, inputs, outputs). A score depends on its own token only, so a summary of
some parts, with the logarithm of its softmax denominator, can be merged exactly with that of the others: this is what
lets `ttm_scan` summarise the inputs of all chunks at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from ..core.numerics import accumulate_dtype
from . import ops
from .params import LatentQueryParams, MeanPoolParams, SummaryParams, TokenLearnerParams

MEMORY, INPUTS, OUTPUTS = 0, 1, 2


class Partial(NamedTuple):
    """Summary of some of the tokens.

    out: [B, k, d], the weighted mean over these tokens; lse: logarithm of the softmax denominator over them, [B, k] or
    [B, H, k]; None where weights need no softmax, then `out` is a weighted sum and partials add up.
    """

    out: torch.Tensor
    lse: torch.Tensor | None


class Summary(Protocol):
    """A summary prepared for parts of known sizes."""

    def partial(self, parts: Mapping[int, torch.Tensor]) -> Partial:
        """Summarise some of the parts, each [B, p_i, d]."""
        ...

    def finish(self, parts: Mapping[int, torch.Tensor], carry: Partial | None = None) -> torch.Tensor:
        """Summarise parts merged with a partial of the others: [B, k, d]."""
        ...


def prepare(params: SummaryParams, sizes: Sequence[int], backend: str) -> Summary:
    """The summary that `params` describe, for parts of `sizes` tokens in the order memory, inputs, outputs."""
    if isinstance(params, TokenLearnerParams):
        return TokenLearner(params, sizes, backend)
    if isinstance(params, LatentQueryParams):
        return LatentQuery(params, sizes)
    return MeanPool(params, sizes)


class Folded(NamedTuple):
    """A score network with the LayerNorm's weight and bias folded into the first layer: w1 [J, d], b1 [J]."""

    w1: torch.Tensor
    b1: torch.Tensor


def fold(params: TokenLearnerParams) -> Folded:
    """W1 (x g + c) + b1 = (W1 g) x + (W1 c + b1); rows of W1 g are centred, which is free as x has mean zero."""
    acc = accumulate_dtype(params.w1.dtype)
    w1 = params.w1.to(acc)
    weighted = w1 * params.norm_weight.to(acc)
    bias = params.b1.to(acc) + (w1 * params.norm_bias.to(acc)).sum(dim=-1)
    return Folded(weighted - weighted.mean(dim=-1, keepdim=True), bias)


class TokenLearner:
    """TokenLearner v1.1 by the fused operator."""

    def __init__(self, params: TokenLearnerParams, sizes: Sequence[int], backend: str) -> None:
        self.folded = fold(params)
        self.w2, self.b2 = params.w2, params.b2
        self.positions = None if params.positions is None else params.positions.split(list(sizes))
        self.backend = backend

    def partial(self, parts: Mapping[int, torch.Tensor]) -> Partial:
        return Partial(*self._run(parts, None))

    def finish(self, parts: Mapping[int, torch.Tensor], carry: Partial | None = None) -> torch.Tensor:
        return self._run(parts, carry)[0]

    def _run(self, parts: Mapping[int, torch.Tensor], carry: Partial | None) -> tuple[torch.Tensor, torch.Tensor]:
        positions = [] if self.positions is None else [self.positions[part] for part in parts]
        carry_out, carry_lse = (None, None) if carry is None else carry
        return ops.summary(
            list(parts.values()), positions, *self.folded, [self.w2], [self.b2], carry_out, carry_lse, self.backend
        )


class LatentQuery:
    """Attention of learned queries, made of library matrix products.

    The queries are constants, so that scores need no projected keys: q_h (Wk_h v) = (q_h Wk_h) v; the key bias is one
    number a query, which falls out of the softmax but belongs to lse. The values are projected after pooling where that
    is less work (H k < d), before it otherwise.
    """

    def __init__(self, params: LatentQueryParams, sizes: Sequence[int]) -> None:
        self.params = params
        self.positions = None if params.positions is None else params.positions.split(list(sizes))
        heads = params.heads
        width = params.wq.shape[0] // heads
        queries = torch.nn.functional.linear(params.queries, params.wq, params.bq) * width**-0.5
        per_head = queries.unflatten(-1, (heads, width)).transpose(0, 1)  # [H, k, D]
        self.queries = per_head
        self.shift = torch.bmm(per_head, params.bk.unflatten(0, (heads, width, 1)))  # [H, k, 1]
        self.pool_first = heads * queries.shape[0] < queries.shape[1]
        self.folded = torch.bmm(per_head, params.wk.unflatten(0, (heads, width))) if self.pool_first else None

    def partial(self, parts: Mapping[int, torch.Tensor]) -> Partial:
        return self._merge([self._one(part, v) for part, v in parts.items()])

    def finish(self, parts: Mapping[int, torch.Tensor], carry: Partial | None = None) -> torch.Tensor:
        partials = [self._one(part, v) for part, v in parts.items()] + ([] if carry is None else [carry])
        return torch.nn.functional.linear(self._merge(partials).out, self.params.wo, self.params.bo)

    def _one(self, part: int, v: torch.Tensor) -> Partial:
        """Mean of the projected values under each head's weights [B, k, d] and lse [B, H, k]."""
        v = v if self.positions is None else v + self.positions[part]
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
        return Partial(out.transpose(1, 2).flatten(2) + p.bv, lse + self.shift[..., 0])

    def _merge(self, partials: Sequence[Partial]) -> Partial:
        if len(partials) == 1:
            return partials[0]
        lses = torch.stack([partial.lse for partial in partials if partial.lse is not None])
        lse = lses.logsumexp(dim=0)
        shares = (lses - lse).exp().transpose(2, 3)[..., None]  # [parts, B, k, H, 1]
        outs = torch.stack([partial.out for partial in partials]).unflatten(-1, (self.params.heads, -1))
        return Partial((outs * shares.to(outs.dtype)).sum(dim=0).flatten(2), lse)


class MeanPool:
    """Means over windows of tokens: a constant matrix [k, p], cut at the borders of the parts."""

    def __init__(self, params: MeanPoolParams, sizes: Sequence[int]) -> None:
        self.k, self.sizes = params.k, list(sizes)
        self.positions = None if params.positions is None else params.positions.split(self.sizes)

    def partial(self, parts: Mapping[int, torch.Tensor]) -> Partial:
        outs = [torch.matmul(self._weights(part, v), self._tokens(part, v)) for part, v in parts.items()]
        return Partial(outs[0] if len(outs) == 1 else torch.stack(outs).sum(dim=0), None)

    def finish(self, parts: Mapping[int, torch.Tensor], carry: Partial | None = None) -> torch.Tensor:
        out = self.partial(parts).out
        return out if carry is None else out + carry.out

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
