"""The opaque operators that pool by Triton kernels, with their autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from mirasol.kernels.core.precision import accumulate_dtype
from mirasol.kernels.core.registration import apply, define, differentiable_once
from mirasol.kernels.ttm.flops import (
    linear_summary_backward_flops,
    linear_summary_flops,
    summary_backward_flops,
    summary_flops,
)
from mirasol.kernels.ttm.params import TokenLearnerParams
from mirasol.kernels.ttm.summary import PUBLIC, Partial


class Scores(NamedTuple):
    """What gives tokens their scores: a network with the norm folded into its first layer, or a linear map (w2 None).

    w1 [J, d], b1 [J]; w2 [K, J], b2 [K]; low: w1 in the dtype of the tokens where w1 itself, which gathers the
    gradients of all chunks, is in the precision of sums.
    """

    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    low: torch.Tensor | None = None


def fold(params: TokenLearnerParams) -> Scores:
    """The score network of a TokenLearner, see `eager.fold`."""
    w1, b1, low = apply(PUBLIC, _Fold, params.norm_weight, params.norm_bias, params.w1, params.b1)
    return Scores(w1, b1, params.w2, params.b2, low)


def pool(
    sources: Sequence[torch.Tensor], positions: torch.Tensor | None, scores: Scores, carry: Partial | None
) -> Partial:
    """The tokens of all sources, each [B, p_i, d], with positions [p, d], pooled under their scores; see `ttm_pool`."""
    w1, b1, w2, b2, low = scores
    carried = (None, None) if carry is None else carry
    low = w1.detach() if low is None else low
    return Partial(*apply(PUBLIC, _Pool, low, positions, w1, b1, w2, b2, *carried, *sources))


@torch.no_grad()
def _forward(*args: Any) -> Any:
    from mirasol.kernels.ttm.pool.triton import host

    return host.forward(*args)


def _forward_fake(sources, positions, w1, b1, w2, b2, carry_out, carry_lse):
    first = sources[0]
    batch, _, d = first.shape
    j = w1.shape[0]
    k = j if w2 is None else w2.shape[0]
    tokens, acc = sum(v.shape[1] for v in sources), accumulate_dtype(first.dtype)
    stats = first.new_empty(0 if w2 is None else 2, batch, tokens, dtype=acc)
    lse = first.new_empty(batch, k, dtype=acc)
    return first.new_empty(batch, k, d), lse, first.new_empty(batch, tokens, j), stats


def _forward_flops(sources, positions, w1, b1, w2, *args: Any, **kwargs: Any) -> int:
    tokens = sum(v.shape[1] for v in sources)
    batch, _, d = sources[0].shape
    if w2 is None:
        return linear_summary_flops(batch, tokens, d, w1.shape[0])
    return summary_flops(batch, tokens, d, w1.shape[0], w2.shape[0])


@torch.no_grad()
def _backward(*args: Any) -> Any:
    from mirasol.kernels.ttm.pool.triton import host

    return host.backward(*args)


def _backward_fake(grad_out, grad_lse, out, lse, hidden, stats, *rest: Any) -> Any:
    sources, positions, w1, b1, w2, b2, carry_out, carry_lse, source_grads = rest
    acc = accumulate_dtype(out.dtype)
    found = [v.new_empty(v.shape) for v, wanted in zip(sources, source_grads, strict=True) if wanted]
    found += [] if positions is None else [positions.new_empty(positions.shape)]
    found += [w1.new_empty(w1.shape, dtype=acc), b1.new_empty(b1.shape, dtype=acc)]
    return found + [t.new_empty(t.shape) for t in (w2, b2, carry_out, carry_lse) if t is not None]


def _backward_flops(grad_out, grad_lse, out, lse, hidden, stats, *rest: Any, **kwargs: Any) -> int:
    sources, positions, w1, _, w2, _, _, _, source_grads = rest
    tokens = sum(v.shape[1] for v in sources)
    placed = positions is not None
    wanted = sum(v.shape[1] for v, grad in zip(sources, source_grads, strict=True) if grad or placed)
    batch, _, d = sources[0].shape
    if w2 is None:
        return linear_summary_backward_flops(batch, tokens, d, w1.shape[0], wanted)
    return summary_backward_flops(batch, tokens, d, w1.shape[0], w2.shape[0], wanted, scores_again=True)


_ARGUMENTS = (
    "Tensor[] sources, Tensor? positions, Tensor w1, Tensor b1, Tensor? w2, Tensor? b2, Tensor? carry_out, "
    "Tensor? carry_lse"
)

ttm_pool = define(
    f"ttm_pool({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=_forward,
    fake=_forward_fake,
    flops=_forward_flops,
)
"""Tokens of all sources [B, p_i, d] pooled, and merged with a carried partial.

w1 [J, d] in the dtype of the tokens, b1 [J], w2 [K, J], b2 [K]: norm weight and bias are folded into w1 and b1 and the
rows of w1 have mean zero (`eager.fold`). Without w2 and b2 scores are linear: S = v w1^T + b1, K = J, no norm.
positions [p, d] in the order of the sources. carry_out [B, K, d], carry_lse [B, K]: what other tokens gave.
Returns out [B, K, d], lse [B, K] in the precision of sums, and for backward, which computes scores and weights again,
the hidden layer [B, p, J] and each token's mean and 1 / deviation [2, B, p] (none for linear scores, whose hidden layer
is the scores).
"""

ttm_pool_backward = define(
    "ttm_pool_backward(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, Tensor hidden, Tensor stats, "
    f"{_ARGUMENTS}, bool[] source_grads) -> Tensor[]",
    impl=_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)
"""Gradients of the sources whose `source_grads` is true, positions, w1, b1 (both in the precision of sums), w2, b2 and
both carries, each if it was given."""


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, low, positions, w1, b1, w2, b2, carry_out, carry_lse, *sources):
        args = positions, low, b1, w2, b2, carry_out, carry_lse
        out, lse, hidden, stats = ttm_pool(sources, *args)
        ctx.save_for_backward(out, lse, hidden, stats, *args, *sources)
        ctx.dtype = w1.dtype
        return out, lse

    @staticmethod
    @differentiable_once(PUBLIC)
    def backward(ctx, grad_out, grad_lse):
        saved, args, sources = ctx.saved_tensors[:4], ctx.saved_tensors[4:11], ctx.saved_tensors[11:]
        wanted = list(ctx.needs_input_grad[8:])
        found = iter(ttm_pool_backward(grad_out, grad_lse, *saved, sources, *args, wanted))
        of_sources = [next(found) if want else None for want in wanted]
        of_positions, of_w1, *others = [None if given is None else next(found) for given in args]
        assert of_w1 is not None
        return None, of_positions, of_w1.to(ctx.dtype), *others, *of_sources


def _fold(*args: Any) -> Any:
    from mirasol.kernels.ttm.pool.triton import fold

    return fold.forward(*args)


def _fold_fake(norm_weight, norm_bias, w1, b1):
    acc = accumulate_dtype(w1.dtype)
    return w1.new_empty(w1.shape, dtype=acc), b1.new_empty(b1.shape, dtype=acc), w1.new_empty(w1.shape)


def _fold_backward(*args: Any) -> Any:
    from mirasol.kernels.ttm.pool.triton import fold

    return fold.backward(*args)


def _fold_backward_fake(grad_w1, grad_b1, norm_weight, norm_bias, w1):
    d = w1.shape[1]
    return w1.new_empty(d), w1.new_empty(d), w1.new_empty(w1.shape), w1.new_empty(w1.shape[0])


ttm_fold = define(
    "ttm_fold(Tensor norm_weight, Tensor norm_bias, Tensor w1, Tensor b1) -> (Tensor, Tensor, Tensor)",
    impl=_fold,
    fake=_fold_fake,
    flops=None,
)
"""`eager.fold` in one kernel: w1 [J, d] and b1 [J] in the precision of sums, and w1 once more in its own dtype."""

ttm_fold_backward = define(
    "ttm_fold_backward(Tensor grad_w1, Tensor grad_b1, Tensor norm_weight, Tensor norm_bias, Tensor w1) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    impl=_fold_backward,
    fake=_fold_backward_fake,
    flops=None,
)
"""Gradients of norm_weight [d], norm_bias [d], w1 [J, d] and b1 [J], in the parameters' dtype."""


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, norm_weight, norm_bias, w1, b1):
        ctx.save_for_backward(norm_weight, norm_bias, w1)
        folded, bias, low = ttm_fold(norm_weight, norm_bias, w1, b1)
        ctx.mark_non_differentiable(low)
        return folded, bias, low

    @staticmethod
    @differentiable_once(PUBLIC)
    def backward(ctx, grad_w1, grad_b1, grad_low):
        return ttm_fold_backward(grad_w1, grad_b1, *ctx.saved_tensors)
