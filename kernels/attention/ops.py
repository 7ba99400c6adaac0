"""The opaque operators of chunked attention: schema, fake, FLOPs, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mirasol.kernels.attention.layout import Layout, count_pairs, make_layout
from mirasol.kernels.core.precision import accumulate_dtype
from mirasol.kernels.core.registration import define

_LAYOUT = (
    "SymInt q_chunk, SymInt k_chunk, Tensor? q_edges, Tensor? k_edges, Tensor? cu_q, Tensor? cu_k, "
    "SymInt? window, SymInt sinks, bool causal, float scale, str backend"
)


def read_layout(
    n_q: int,
    n_k: int,
    q_chunk: int,
    k_chunk: int,
    q_edges: torch.Tensor | None,
    k_edges: torch.Tensor | None,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    window: int | None,
    sinks: int,
    causal: bool,
) -> Layout:
    """The layout that the operators' arguments describe; edges replace chunk lengths where they are given."""
    q_given = q_chunk if q_edges is None else q_edges
    k_given = k_chunk if k_edges is None else k_edges
    return make_layout(n_q, n_k, q_given, k_given, window, sinks, causal, cu_q, cu_k)


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *where, scale, backend = args
    if backend == "triton":
        from mirasol.kernels.attention import triton_launch

        return triton_launch.forward(q, k, v, triton_launch.Where(*where), scale)
    from mirasol.kernels.attention import eager

    return eager.forward(q, k, v, read_layout(q.shape[2], k.shape[2], *where), scale)


def _forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


def _forward_flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    pairs = count_pairs(read_layout(q.shape[2], k.shape[2], *args[:-2]))
    return 4 * q.shape[0] * q.shape[1] * q.shape[3] * pairs


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
    *where, scale, backend = args
    if backend == "triton":
        from mirasol.kernels.attention import triton_launch

        return triton_launch.backward(grad, grad_lse, q, k, v, out, lse, triton_launch.Where(*where), scale)
    from mirasol.kernels.attention import eager

    layout = read_layout(q.shape[2], k.shape[2], *where)
    return eager.backward(grad, grad_lse, q, k, v, out, lse, layout, scale)


def _backward_fake(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


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
    pairs = count_pairs(read_layout(q.shape[2], k.shape[2], *args[:-2]))
    return 10 * q.shape[0] * q.shape[1] * q.shape[3] * pairs


_FORWARD = define(
    f"chunked_attention(Tensor q, Tensor k, Tensor v, {_LAYOUT}) -> (Tensor, Tensor)",
    impl=_forward,
    fake=_forward_fake,
    flops=_forward_flops,
)
_BACKWARD = define(
    "chunked_attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_LAYOUT}) -> (Tensor, Tensor, Tensor)",
    impl=_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)


class ChunkedAttention(torch.autograd.Function):
    """(q, k, v, then the operator's layout arguments) -> (out, lse); both are differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _FORWARD(q, k, v, *args)
        q_chunk, k_chunk, q_edges, k_edges, cu_q, cu_k, *rest = args
        ctx.save_for_backward(q, k, v, out, lse, q_edges, k_edges, cu_q, cu_k)
        ctx.chunks, ctx.rest = (q_chunk, k_chunk), rest
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> Any:
        q, k, v, out, lse, *edges = ctx.saved_tensors
        grads: tuple[torch.Tensor | None, ...] = (None, None, None)
        if grad is not None or grad_lse is not None:
            grad = torch.zeros_like(out) if grad is None else grad
            grads = _BACKWARD(grad, grad_lse, q, k, v, out, lse, *ctx.chunks, *edges, *ctx.rest)
        return (*grads, *(None for _ in range(len(ctx.chunks) + len(edges) + len(ctx.rest))))
