"""The opaque operators behind the summaries, with their autograd: pooling under scores, and means over windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..core.precision import accumulate_dtype
from ..core.registration import define
from .flops import (
    linear_summary_backward_flops,
    linear_summary_flops,
    summary_backward_flops,
    summary_flops,
)


@torch.no_grad()
def _forward(sources, positions, w1, b1, w2, b2, carry_out, carry_lse):
    from . import triton_launch

    return triton_launch.summary_forward(sources, positions, w1, b1, w2, b2, carry_out, carry_lse)


def _forward_fake(sources, positions, w1, b1, w2, b2, carry_out, carry_lse):
    first = sources[0]
    batch, d = first.shape[0], first.shape[2]
    k = sum(w.shape[0] for w in w2) if w2 else w1.shape[0]
    tokens = sum(v.shape[1] for v in sources)
    acc = accumulate_dtype(first.dtype)
    out = first.new_empty(batch, k, d)
    lse = first.new_empty(batch, k, dtype=acc)
    hidden = first.new_empty(batch, tokens, w1.shape[0])
    return out, lse, hidden, first.new_empty(2 if w2 else 0, batch, tokens, dtype=acc)


def _forward_flops(sources, positions, w1, b1, w2, b2, *args: Any, **kwargs: Any) -> int:
    tokens = sum(v.shape[1] for v in sources)
    batch, _, d = sources[0].shape
    if not w2:
        return linear_summary_flops(batch, tokens, d, w1.shape[0])
    return summary_flops(batch, tokens, d, [w.shape[1] for w in w2], [w.shape[0] for w in w2])


@torch.no_grad()
def _backward(grad_out, grad_lse, out, lse, hidden, kept, *rest: Any) -> Any:
    from . import triton_launch

    return triton_launch.summary_backward(grad_out, grad_lse, out, lse, hidden, kept, *rest)


def _backward_fake(grad_out, grad_lse, out, lse, hidden, kept, *rest: Any) -> Any:
    sources, positions, w1, b1, w2, b2, carry_out, carry_lse, source_grads = rest
    shaped = [v for v, wanted in zip(sources, source_grads, strict=True) if wanted]
    shaped += [*positions, w1, b1, *w2, *b2]
    if carry_out is not None:
        shaped += [carry_out, carry_lse]
    return [t.new_empty(t.shape) for t in shaped]


def _backward_flops(grad_out, grad_lse, out, lse, hidden, kept, *rest: Any, **kwargs: Any) -> int:
    sources, positions, w1, _, w2, _, _, _, source_grads = rest
    tokens = sum(v.shape[1] for v in sources)
    wanted = sum(v.shape[1] for v, grad in zip(sources, source_grads, strict=True) if grad or positions)
    batch, _, d = sources[0].shape
    if not w2:
        return linear_summary_backward_flops(batch, tokens, d, w1.shape[0], wanted)
    hidden_sizes, k = [w.shape[1] for w in w2], [w.shape[0] for w in w2]
    return summary_backward_flops(batch, tokens, d, hidden_sizes, k, wanted, scores_again=True)


_ARGUMENTS = (
    "Tensor[] sources, Tensor[] positions, Tensor w1, Tensor b1, Tensor[] w2, Tensor[] b2, "
    "Tensor? carry_out, Tensor? carry_lse"
)

ttm_summary = define(
    f"ttm_summary({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=_forward,
    fake=_forward_fake,
    flops=_forward_flops,
)
"""Summaries of the tokens of all sources [B, p_i, d], merged with a carried partial.

Several summaries of the same tokens run side by side: summary i owns rows of w1 [J, d] and b1 [J] in order, and has
w2[i] [k_i, J_i], b2[i] [k_i]; K is the sum of k_i. Norm weight and bias are folded into w1 and b1 and the rows of w1
have mean zero (`fold` in summaries.py). positions: empty, or one [p_i, d] a source. carry_out [B, K, d], carry_lse
[B, K]: the summary of other tokens and the logarithm of its softmax denominator.
Without second layers (w2 and b2 empty) scores are linear: S = v w1^T + b1, K = J, no norm.
Returns out [B, K, d], lse [B, K] in the precision of sums, and for backward, which computes scores and weights again,
the hidden layer [B, p, J] and each token's mean and 1 / deviation [2, B, p] (none for linear scores, whose hidden layer
is the scores).
"""

ttm_summary_backward = define(
    "ttm_summary_backward(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, Tensor hidden, Tensor kept, "
    f"{_ARGUMENTS}, bool[] source_grads) -> Tensor[]",
    impl=_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)
"""Gradients of: the sources whose `source_grads` is true, positions, w1, b1, w2, b2, and, if given, both carries."""


class _Summary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, n_sources, n_positions, n_sets, *tensors):
        sources, positions, w1, b1, w2, b2, carry = _unflatten(tensors, n_sources, n_positions, n_sets)
        out, lse, *kept = ttm_summary(sources, positions, w1, b1, w2, b2, *carry)
        ctx.save_for_backward(out, lse, *kept, *tensors)
        ctx.settings = n_sources, n_positions, n_sets
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        n_sources, n_positions, n_sets = ctx.settings
        out, lse, hidden, kept, *tensors = ctx.saved_tensors
        sources, positions, w1, b1, w2, b2, carry = _unflatten(tensors, n_sources, n_positions, n_sets)
        needed = list(ctx.needs_input_grad[3 : 3 + n_sources])
        grads = ttm_summary_backward(
            grad_out.contiguous(),
            grad_lse,
            out,
            lse,
            hidden,
            kept,
            sources,
            positions,
            w1,
            b1,
            w2,
            b2,
            *carry,
            needed,
        )
        given = iter(grads)
        of_sources = [next(given) if wanted else None for wanted in needed]
        rest = list(given)
        rest += [None] * (len(tensors) - n_sources - len(rest))
        return None, None, None, *of_sources, *rest


def _unflatten(tensors: Sequence[Any], n_sources: int, n_positions: int, n_sets: int) -> Any:
    taken = iter(tensors)

    def take(count: int) -> list[Any]:
        return [next(taken) for _ in range(count)]

    sources, positions, (w1, b1) = take(n_sources), take(n_positions), take(2)
    return sources, positions, w1, b1, take(n_sets), take(n_sets), take(2)


def summary(
    sources: Sequence[torch.Tensor],
    positions: Sequence[torch.Tensor],
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: Sequence[torch.Tensor],
    b2: Sequence[torch.Tensor],
    carry_out: torch.Tensor | None,
    carry_lse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ttm_summary` with gradients: out [B, K, d] and lse [B, K]."""
    tensors = (*sources, *positions, w1, b1, *w2, *b2, carry_out, carry_lse)
    return _Summary.apply(len(sources), len(positions), len(w2), *tensors)


def _mean(sources, positions, carry, offsets, total, k):
    from . import triton_mean

    return triton_mean.forward(sources, positions, carry, offsets, total, k)


def _mean_fake(sources, positions, carry, offsets, total, k):
    return sources[0].new_empty(sources[0].shape[0], k, sources[0].shape[2])


def _mean_backward(grad, sizes, offsets, total, k):
    from . import triton_mean

    return triton_mean.backward(grad, sizes, offsets, total, k)


def _mean_backward_fake(grad, sizes, offsets, total, k):
    return [grad.new_empty(grad.shape[0], size, grad.shape[2]) for size in sizes]


ttm_mean = define(
    "ttm_mean(Tensor[] sources, Tensor[] positions, Tensor? carry, SymInt[] offsets, SymInt total, SymInt k) -> Tensor",
    impl=_mean,
    fake=_mean_fake,
    flops=None,
)
"""The part of the means over k windows [B, k, d] that comes from some of `total` tokens, plus `carry`. Triton only.

Sources [B, p_i, d] begin at token `offsets[i]` of all; a window is divided by its whole length, so that parts add up.
"""

ttm_mean_backward = define(
    "ttm_mean_backward(Tensor grad, SymInt[] sizes, SymInt[] offsets, SymInt total, SymInt k) -> Tensor[]",
    impl=_mean_backward,
    fake=_mean_backward_fake,
    flops=None,
)
"""Gradients [B, sizes[i], d] of sources that begin at `offsets[i]`."""


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, offsets, total, k, n_sources, carry, *tensors):
        sources, positions = list(tensors[:n_sources]), list(tensors[n_sources:])
        ctx.settings = [v.shape[1] for v in sources], offsets, total, k
        return ttm_mean(sources, positions, carry, offsets, total, k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        sizes, offsets, total, k = ctx.settings
        needed = ctx.needs_input_grad[5:]
        of_sources, of_positions = needed[: len(sizes)], needed[len(sizes) :]
        wanted = [i for i in range(len(sizes)) if of_sources[i] or (of_positions and of_positions[i])]
        grads: list[torch.Tensor | None] = [None] * len(sizes)
        if wanted:
            given = [sizes[i] for i in wanted], [offsets[i] for i in wanted]
            for i, found in zip(wanted, ttm_mean_backward(grad, *given, total, k), strict=True):
                grads[i] = found
        places = [None if g is None else g.sum(dim=0) for g in grads] if of_positions else []
        return None, None, None, None, grad if ctx.needs_input_grad[4] else None, *grads, *places


def mean(
    sources: Sequence[torch.Tensor],
    positions: Sequence[torch.Tensor],
    carry: torch.Tensor | None,
    offsets: list[int],
    total: int,
    k: int,
) -> torch.Tensor:
    """`ttm_mean` with gradients: [B, k, d]."""
    return _Mean.apply(offsets, total, k, len(sources), carry, *sources, *positions)


def _fold(norm_weight, norm_bias, w1, b1):
    from . import triton_fold

    return triton_fold.forward(norm_weight, norm_bias, w1, b1)


def _fold_fake(norm_weight, norm_bias, w1, b1):
    return w1.new_empty(w1.shape), b1.new_empty(b1.shape, dtype=accumulate_dtype(b1.dtype))


def _fold_backward(grad_w1, grad_b1, norm_weight, norm_bias, w1):
    from . import triton_fold

    return triton_fold.backward(grad_w1, grad_b1, norm_weight, norm_bias, w1)


def _fold_backward_fake(grad_w1, grad_b1, norm_weight, norm_bias, w1):
    return *(norm_weight.new_empty(w1.shape[1]) for _ in range(2)), w1.new_empty(w1.shape), w1.new_empty(w1.shape[0])


ttm_fold = define(
    "ttm_fold(Tensor norm_weight, Tensor norm_bias, Tensor w1, Tensor b1) -> (Tensor, Tensor)",
    impl=_fold,
    fake=_fold_fake,
    flops=None,
)
"""`summaries.fold` in one kernel: w1 [J, d] in its own dtype, b1 [J] in the precision of sums. Triton only."""

ttm_fold_backward = define(
    "ttm_fold_backward(Tensor grad_w1, Tensor grad_b1, Tensor norm_weight, Tensor norm_bias, Tensor w1) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    impl=_fold_backward,
    fake=_fold_backward_fake,
    flops=None,
)
"""Gradients of norm_weight [d], norm_bias [d], w1 [J, d] and b1 [J], in the parameters' dtype."""


class Fold(torch.autograd.Function):
    """(norm_weight, norm_bias, w1, b1) -> folded w1 and b1, differentiable once."""

    @staticmethod
    def forward(ctx, norm_weight, norm_bias, w1, b1):
        ctx.save_for_backward(norm_weight, norm_bias, w1)
        return ttm_fold(norm_weight, norm_bias, w1, b1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_w1, grad_b1):
        return ttm_fold_backward(grad_w1, grad_b1, *ctx.saved_tensors)
