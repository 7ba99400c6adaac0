"""The opaque operators behind the Triton backend of the erase-add write, with their autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...core.precision import accumulate_dtype
from ...core.registration import define
from ..params import EraseAddParams
from .configs import widths_of
from .flops import erase_add_backward_flops, erase_add_flops
from .records import Records, flatten, unflatten


@torch.no_grad()
def _forward(memory, outputs, params, official):
    from . import triton_launch

    return triton_launch.forward(memory, outputs, params, official)


def _forward_fake(memory, outputs, params, official):
    w = widths_of(unflatten(params, official))
    batch, s, d = memory.shape
    acc = accumulate_dtype(memory.dtype)
    return (
        memory.new_empty(memory.shape),
        memory.new_empty(batch, w.slots, s, dtype=acc),
        memory.new_empty(2, batch, w.slots, d, dtype=acc),
        memory.new_empty(2, batch, w.channels, w.slots, dtype=acc),
        memory.new_empty(batch, s + outputs.shape[1], dtype=acc),
        memory.new_empty(batch, s + outputs.shape[1], dtype=acc),
        memory.new_empty(2, w.select, dtype=acc),
        memory.new_empty(batch, s, w.select),
        memory.new_empty(2, batch, w.slots, d),
    )


def _forward_flops(memory, outputs, params, official, **kwargs: Any) -> int:
    return erase_add_flops(memory.shape[0], memory.shape[1], unflatten(params, official))


@torch.no_grad()
def _backward(grad_out, saved, memory, outputs, params, official):
    from . import triton_launch

    return triton_launch.backward(grad_out, saved, memory, outputs, params, official)


def _backward_fake(grad_out, saved, memory, outputs, params, official):
    total = Records(widths_of(unflatten(params, official))).total
    return memory.new_empty(memory.shape), outputs.new_empty(outputs.shape), memory.new_empty(total)


def _backward_flops(grad_out, saved, memory, outputs, params, official, **kwargs: Any) -> int:
    return erase_add_backward_flops(memory.shape[0], memory.shape[1], unflatten(params, official))


ttm_erase_add = define(
    "ttm_erase_add(Tensor memory, Tensor outputs, Tensor[] params, bool official) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    impl=_forward,
    fake=_forward_fake,
    flops=_forward_flops,
)
"""The new memory [B, s, d] from memory [B, s, d] and outputs [B, r, d], and what backward needs (`Saved`).

params: the 26 tensors of EraseAddParams in order (`records.flatten`).
"""

ttm_erase_add_backward = define(
    "ttm_erase_add_backward(Tensor grad_out, Tensor[] saved, Tensor memory, Tensor outputs, Tensor[] params, "
    "bool official) -> (Tensor, Tensor, Tensor)",
    impl=_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)
"""Gradients of memory, of outputs, and of all parameters in one flat tensor (`records.Records`)."""

_SAVED = 8


class _EraseAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, official, memory, outputs, *params):
        out, *saved = ttm_erase_add(memory, outputs, params, official)
        ctx.save_for_backward(*saved, memory, outputs, *params)
        ctx.official = official
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        saved, (memory, outputs, *flat) = ctx.saved_tensors[:_SAVED], ctx.saved_tensors[_SAVED:]
        params = unflatten(flat, ctx.official)
        found = ttm_erase_add_backward(grad_out.contiguous(), saved, memory, outputs, flat, ctx.official)
        grad_memory, grad_outputs, grads = found
        return None, grad_memory, grad_outputs, *Records(widths_of(params)).gradients(grads, params)


def erase_add(memory: torch.Tensor, outputs: torch.Tensor, params: EraseAddParams) -> torch.Tensor:
    """`ttm_erase_add` with gradients: the new memory [B, s, d]."""
    return _EraseAdd.apply(params.official, memory, outputs, *flatten(params))
