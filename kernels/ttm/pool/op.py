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
from mirasol.kernels.ttm.pool.triton.config import COUNTERS
from mirasol.kernels.ttm.summary import PUBLIC, Partial


class Scores(NamedTuple):
    """What gives tokens their scores: a network with the norm folded into its first layer, or a linear map (w2 None).

    w1 [J, d], b1 [J]; w2 [K, J], b2 [K]; low: w1 in the dtype of the tokens where w1 itself, which gathers the
    gradients of all chunks, is in the precision of sums; low_sums [J]: what its rows sum to, of a network.
    counters: zeros, and so they are left: where programs of one launch, never of two at a time, are counted.
    """

    w1: torch.Tensor
    b1: torch.Tensor
    counters: torch.Tensor
    w2: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    low: torch.Tensor | None = None
    low_sums: torch.Tensor | None = None


def fold(params: TokenLearnerParams) -> Scores:
    """The score network of a TokenLearner, see `eager.fold`."""
    w1, b1, low, low_sums, counters = apply(PUBLIC, _Fold, *params[:4])
    return Scores(w1, b1, counters, params.w2, params.b2, low, low_sums)


def pool(
    sources: Sequence[torch.Tensor], positions: torch.Tensor | None, scores: Scores, carry: Partial | None
) -> Partial:
    """The tokens of all sources, each [B, p_i, d], with positions [p, d], pooled under their scores; see `ttm_pool`."""
    w1, b1, counters, w2, b2, low, low_sums = scores
    carried = (None, None) if carry is None else carry
    beside = torch.is_grad_enabled(), w1.detach() if low is None else low, low_sums, counters
    return Partial(*apply(PUBLIC, _Pool, *beside, positions, w1, b1, w2, b2, *carried, *sources))


@torch.no_grad()
def _forward(*args: Any) -> Any:
    from mirasol.kernels.ttm.pool.triton import host

    return host.forward(args[:8], *args[8:])


def _forward_fake(sources, positions, w1, b1, w2, b2, carry_out, carry_lse, w1_sums, counters, keep):
    first = sources[0]
    batch, _, d = first.shape
    j = w1.shape[0]
    k = j if w2 is None else w2.shape[0]
    tokens, acc = sum(v.shape[1] for v in sources), accumulate_dtype(first.dtype)
    stats = first.new_empty(2 * keep * (w2 is not None), batch, tokens, dtype=acc)
    lse = first.new_empty(batch, k, dtype=acc)
    return first.new_empty(batch, k, d), lse, first.new_empty(batch * keep, tokens, j), stats


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
    f"ttm_pool({_ARGUMENTS}, Tensor? w1_sums, Tensor counters, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=_forward,
    fake=_forward_fake,
    flops=_forward_flops,
)
"""Tokens of all sources [B, p_i, d] pooled, and merged with a carried partial.

w1 [J, d] in the dtype of the tokens, b1 [J], w2 [K, J], b2 [K]: norm weight and bias are folded into w1 and b1 and the
rows of w1 have mean zero (`eager.fold`). Without w2 and b2 scores are linear: S = v w1^T + b1, K = J, no norm.
positions [p, d] in the order of the sources. carry_out [B, K, d], carry_lse [B, K]: what other tokens gave.
w1_sums [J]: what the rows of w1 sum to, not needed for linear scores; counters: see `Scores`; keep: for a backward.
Returns out [B, K, d], lse [B, K] in the precision of sums, and for backward, which computes scores and weights again,
the hidden layer [B, p, J] and each token's mean and 1 / deviation [2, B, p] (none for linear scores, whose hidden layer
is the scores); both are empty unless `keep`.
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
    def forward(ctx, keep, low, low_sums, counters, positions, w1, b1, w2, b2, carry_out, carry_lse, *sources):
        args = positions, low, b1, w2, b2, carry_out, carry_lse
        out, lse, hidden, stats = ttm_pool(sources, *args, low_sums, counters, keep)
        ctx.save_for_backward(out, lse, hidden, stats, *args, *sources)
        ctx.dtype = w1.dtype
        return out, lse

    @staticmethod
    @differentiable_once(PUBLIC)
    def backward(ctx, grad_out, grad_lse):
        saved, args, sources = ctx.saved_tensors[:4], ctx.saved_tensors[4:11], ctx.saved_tensors[11:]
        wanted = list(ctx.needs_input_grad[11:])
        found = iter(ttm_pool_backward(grad_out, grad_lse, *saved, sources, *args, wanted))
        of_sources = [next(found) if want else None for want in wanted]
        of_positions, of_w1, *others = [None if given is None else next(found) for given in args]
        assert of_w1 is not None
        return None, None, None, None, of_positions, of_w1.to(ctx.dtype), *others, *of_sources


def _fold(*args: Any) -> Any:
    from mirasol.kernels.ttm.pool.triton import fold

    return fold.forward(*args)


def _fold_fake(norm_weight, norm_bias, w1, b1):
    rows = w1.new_empty(w1.shape, dtype=accumulate_dtype(w1.dtype))
    counters = w1.new_empty(COUNTERS, dtype=torch.int32)
    return rows, rows.new_empty(b1.shape), w1.new_empty(w1.shape), rows.new_empty(b1.shape), counters


def _fold_backward(*args: Any) -> Any:
    from mirasol.kernels.ttm.pool.triton import fold

    return fold.backward(*args)


def _fold_backward_fake(grad_w1, grad_b1, norm_weight, norm_bias, w1):
    d = w1.shape[1]
    return w1.new_empty(d), w1.new_empty(d), w1.new_empty(w1.shape), w1.new_empty(w1.shape[0])


ttm_fold = define(
    "ttm_fold(Tensor norm_weight, Tensor norm_bias, Tensor w1, Tensor b1) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    impl=_fold,
    fake=_fold_fake,
    flops=None,
)
"""`eager.fold` in one kernel: w1 [J, d] and b1 [J] in the precision of sums, w1 once more in its own dtype and what
the rows of this sum to [J]; and counters, see `Scores`."""

ttm_fold_backward = define(
    "ttm_fold_backward(Tensor grad_w1, Tensor grad_b1, Tensor norm_weight, Tensor norm_bias, Tensor w1) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    impl=_fold_backward,
    fake=_fold_backward_fake,
    flops=None,
)
"""Gradients of norm_weight [d], norm_bias [d], w1 [J, d] and b1 [J], in the parameters' dtype; rows of grad_w1 must
have mean zero, as `ttm_pool_backward` gives them."""


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, norm_weight, norm_bias, w1, b1):
        ctx.save_for_backward(norm_weight, norm_bias, w1)
        folded, bias, *others = ttm_fold(norm_weight, norm_bias, w1, b1)
        ctx.mark_non_differentiable(*others)
        return folded, bias, *others

    @staticmethod
    @differentiable_once(PUBLIC)
    def backward(ctx, grad_w1, grad_b1, *_):
        return ttm_fold_backward(grad_w1, grad_b1, *ctx.saved_tensors)
