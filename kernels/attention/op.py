"""The opaque operators of chunked attention: schema, fake, FLOPs, autograd."""

from __future__ import annotations

from typing import Any

import torch

from mirasol.kernels.attention.visibility import Rule, count_pairs
from mirasol.kernels.core.precision import accumulate_dtype
from mirasol.kernels.core.registration import apply, define, differentiable_once, refuse_transforms

_RULE = (  # `visibility.Rule`
    "SymInt q_chunk, SymInt k_chunk, Tensor? q_edges, Tensor? k_edges, Tensor? cu_q, Tensor? cu_k, "
    "SymInt? window, SymInt sinks, bool causal"
)


def tokens_first(t: torch.Tensor) -> bool:
    """Whether a tensor [B, H, N, D] lies in memory as [B, N, H, D], the order that its outputs then follow."""
    return t.stride(2) > t.stride(1)


def strides_like(t: torch.Tensor) -> tuple[int, int, int, int]:
    """Strides of new memory for a tensor [B, H, N, D]: laid out as [B, N, H, D] where `t` is, else as it reads."""
    _, heads, n, width = t.shape
    if tokens_first(t):
        return n * heads * width, width, heads * width, 1
    return heads * n * width, n * width, width, 1


def empty_like(t: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """New memory of the shape, dtype (unless another is given) and order of dimensions of a tensor [B, H, N, D]."""
    return t.new_empty_strided(t.shape, strides_like(t), dtype=dtype)


def _backend(name: str) -> Any:
    """The module that serves a backend; Triton is imported at first use."""
    if name == "triton":
        from mirasol.kernels.attention.triton import host

        return host
    from mirasol.kernels.attention import eager

    return eager


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *rule, scale, backend = args
    return _backend(backend).forward(q, k, v, Rule(*rule), scale)


def _forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_like(q), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


def _flops(q: torch.Tensor, k: torch.Tensor, rule: Rule, products: int) -> int:
    """`products` matrix products of 2 operations for every visible pair and column."""
    return 2 * products * q.shape[0] * q.shape[1] * q.shape[3] * count_pairs(rule.read(q.shape[2], k.shape[2]))


def _forward_flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    return _flops(q, k, Rule(*args[:-2]), 2)


def _backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *args: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *rule, scale, backend = args
    return _backend(backend).backward(grad, grad_lse, q, k, v, out, lse, Rule(*rule), scale)


def _backward_fake(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_like(q), empty_like(k), empty_like(v)


def _backward_flops(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _flops(q, k, Rule(*args[:-2]), 5)


_FORWARD = define(
    f"chunked_attention(Tensor q, Tensor k, Tensor v, {_RULE}, float scale, str backend) -> (Tensor, Tensor)",
    impl=_forward,
    fake=_forward_fake,
    flops=_forward_flops,
)
_BACKWARD = define(
    "chunked_attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_RULE}, float scale, str backend) -> (Tensor, Tensor, Tensor)",
    impl=_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)


class ChunkedAttention(torch.autograd.Function):
    """(q, k, v, *rule, scale, backend) -> (out, lse); both are differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _FORWARD(q, k, v, *args)
        ctx.save_for_backward(q, k, v, out, lse, *args[2:6])
        ctx.chunks, ctx.rest = args[:2], args[6:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @differentiable_once("chunked_attention")
    def backward(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> Any:
        q, k, v, out, lse, *edges = ctx.saved_tensors
        grads: tuple[torch.Tensor | None, ...] = (None, None, None)
        if grad is not None or grad_lse is not None:
            grad = torch.zeros_like(out) if grad is None else grad
            grads = _BACKWARD(grad, grad_lse, q, k, v, out, lse, *ctx.chunks, *edges, *ctx.rest)
        return (*grads, *(None for _ in range(len(ctx.chunks) + len(edges) + len(ctx.rest))))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule, scale: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse by an opaque backend; autograd's machinery is left out where nobody asks for gradients."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return apply("chunked_attention", ChunkedAttention, q, k, v, *rule, scale, backend)
    refuse_transforms("chunked_attention")
    return _FORWARD(q, k, v, *rule, scale, backend)
