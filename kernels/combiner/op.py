"""The opaque operators around the Triton kernels of `combiner_project`, and their autograd."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from mirasol.kernels.core.checks import expect
from mirasol.kernels.core.registration import define, differentiable_once


def _forward(*args: Any) -> Tensor:
    from mirasol.kernels.combiner.triton.forward import forward

    return forward(*args)


def _forward_fake(x: Tensor, m: int, weight: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], _chunks(x, args[-1]), m, weight.shape[0])


def _backward_rows(*args: Any) -> tuple[Tensor, ...]:
    from mirasol.kernels.combiner.triton.backward import backward_rows

    return backward_rows(*args)


def _backward_rows_fake(grad_y: Tensor | None, x: Tensor, m: int, *args: Any) -> tuple[Tensor, ...]:
    boundaries, needs = args[-2:]
    d = x.shape[-1]
    shapes = (x.shape, (x.shape[0] * _chunks(x, boundaries) * m, d), (2, d))
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _chunks(x: Tensor, boundaries: Tensor | None) -> int:
    return x.shape[1] if boundaries is None else boundaries.shape[0] - 1


combiner_project_fwd = define(  # norm is "layer", "rms" or "none"
    "combiner_project_fwd(Tensor x, SymInt m, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps, str norm, Tensor? boundaries) -> Tensor",
    impl=_forward,
    fake=_forward_fake,
    flops=lambda x, m, weight, *args, out_val, **kwargs: 2 * out_val.numel() * weight.shape[1],
)

# From the gradient of the normalised rows [B T m, d]: that of x, the normalised rows themselves, and the gradients of
# norm_weight and norm_bias [2, d]; an empty tensor where `needs` does not ask for one.
combiner_project_bwd_rows = define(
    "combiner_project_bwd_rows(Tensor? grad_y, Tensor x, SymInt m, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "str norm, Tensor? boundaries, bool[] needs) -> (Tensor, Tensor, Tensor)",
    impl=_backward_rows,
    fake=_backward_rows_fake,
    flops=None,
)


class CombinerProject(torch.autograd.Function):
    """Autograd around the kernels, and backward's products; keeps the inputs alone."""

    @staticmethod
    def forward(ctx, x, m, weight, bias, norm_weight, norm_bias, eps, norm, boundaries):
        ctx.save_for_backward(x, weight, norm_weight, norm_bias, boundaries)
        ctx.settings = m, eps, norm
        return combiner_project_fwd(x, m, weight, bias, norm_weight, norm_bias, eps, norm, boundaries)

    @staticmethod
    @differentiable_once("combiner_project")
    def backward(ctx, grad):
        x, weight, norm_weight, norm_bias, boundaries = ctx.saved_tensors
        m, eps, norm = ctx.settings
        need_x, _, need_weight, need_bias, need_norm_weight, need_norm_bias = ctx.needs_input_grad[:6]
        need_sums = need_norm_weight or need_norm_bias
        grad = grad.flatten(0, 2)
        dx = dweight = dnorm_weight = dnorm_bias = None
        if need_x or need_weight or need_sums:
            grad_y = grad @ weight if need_x or need_sums else None
            needs = [need_x, need_weight, need_sums]
            dx, y, sums = combiner_project_bwd_rows(grad_y, x, m, norm_weight, norm_bias, eps, norm, boundaries, needs)
            dx = dx if need_x else None
            dweight = grad.T @ y if need_weight else None
            dnorm_weight = sums[0] if need_norm_weight else None
            dnorm_bias = sums[1] if need_norm_bias else None
        dbias = grad.sum(0) if need_bias else None
        return dx, None, dweight, dbias, dnorm_weight, dnorm_bias, None, None, None


def _checked(boundaries: Tensor, m: int, tokens: int) -> Tensor:
    check_edges(boundaries.tolist(), m, tokens)
    return boundaries.clone()


checked_boundaries = define(  # compiled code sees no values; what follows takes the result, so that the check stays
    "combiner_checked_boundaries(Tensor boundaries, SymInt m, SymInt tokens) -> Tensor",
    impl=_checked,
    fake=lambda boundaries, m, tokens: torch.empty_like(boundaries),
    flops=None,
)


def check_edges(edges: list[int], m: int, tokens: int) -> None:
    """Raise ValueError unless `edges` cut `tokens` tokens into chunks of at least m."""
    expect(len(edges) >= 2, "boundaries", "hold at least two positions", edges)
    expect(edges[0] == 0, "boundaries", "begin with 0", edges[0])
    expect(edges[-1] == tokens, "boundaries", f"end with the {tokens} tokens of x", edges[-1])
    shortest = min(end - start for start, end in itertools.pairwise(edges))
    expect(shortest >= m, "boundaries", f"leave every chunk at least m = {m} tokens", shortest)
