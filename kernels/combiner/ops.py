"""The opaque operators around the Triton kernels of `combiner_project`, and their autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mirasol.kernels.core.precision import accumulate_dtype
from mirasol.kernels.core.registration import define


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from mirasol.kernels.combiner import triton_forward

    return triton_forward.forward(*args)


def _forward_fake(
    x: torch.Tensor, m: int, weight: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    boundaries = args[-1]
    chunks = x.shape[1] if boundaries is None else boundaries.shape[0] - 1
    leading = (x.shape[0], chunks, m)
    wide = accumulate_dtype(x.dtype)
    return x.new_empty((*leading, weight.shape[0])), x.new_empty(leading, dtype=wide), x.new_empty(leading, dtype=wide)


def _forward_flops(x: torch.Tensor, m: int, weight: torch.Tensor, *args: Any, out_val: Any, **kwargs: Any) -> int:
    return 2 * out_val[0].numel() * weight.shape[1]


def _backward(grad: torch.Tensor, x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    from mirasol.kernels.combiner import triton_backward

    grads = triton_backward.backward(grad, x, *args)
    return tuple(g if g is not None else x.new_empty(0) for g in grads)


def _backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    m: int,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    norm: str,
    boundaries: torch.Tensor | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    d_out, d = weight.shape
    shapes = (x.shape, (d_out, d), (d_out,), (d,), (d,))
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _backward_flops(*args: Any, **kwargs: Any) -> int:
    grad, weight, needs = args[0], args[5], args[10]
    products = int(needs[1]) + int(needs[0] or needs[3] or needs[4])
    return products * 2 * grad.numel() * weight.shape[1]


# norm is "layer", "rms" or "none". The results are out [B, T, m, d_out] and, [B, T, m] each, the mean that was
# subtracted and the factor that followed.
combiner_project_fwd = define(
    "combiner_project_fwd(Tensor x, SymInt m, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps, str norm, Tensor? boundaries) -> (Tensor, Tensor, Tensor)",
    impl=_forward,
    fake=_forward_fake,
    flops=_forward_flops,
)

# The gradients of x, weight, bias, norm_weight and norm_bias; an empty tensor where `needs` does not ask for one.
combiner_project_bwd = define(
    "combiner_project_bwd(Tensor grad, Tensor x, Tensor mean, Tensor rstd, SymInt m, Tensor weight, "
    "Tensor? norm_weight, Tensor? norm_bias, str norm, Tensor? boundaries, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    impl=_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)


class CombinerProject(torch.autograd.Function):
    """Autograd around the two operators; keeps x itself and two numbers for each kept row."""

    @staticmethod
    def forward(ctx, x, m, weight, bias, norm_weight, norm_bias, eps, norm, boundaries):
        out, mean, rstd = combiner_project_fwd(x, m, weight, bias, norm_weight, norm_bias, eps, norm, boundaries)
        ctx.save_for_backward(x, mean, rstd, weight, norm_weight, norm_bias, boundaries)
        ctx.settings = m, norm
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, rstd, weight, norm_weight, norm_bias, boundaries = ctx.saved_tensors
        m, norm = ctx.settings
        need_x, _, *need_parameters = ctx.needs_input_grad[:6]
        needs = [need_x, *need_parameters]
        grads = combiner_project_bwd(grad, x, mean, rstd, m, weight, norm_weight, norm_bias, norm, boundaries, needs)
        dx, *parameters = (g if need else None for g, need in zip(grads, needs, strict=True))
        return dx, None, *parameters, None, None, None
