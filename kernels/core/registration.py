"""Registration of opaque operators in the `mirasol` namespace, and how they are differentiated.

An operator is opaque to the compiler: `torch.compile` sees one node with a fake, never the kernels inside. Autograd is
a `torch.autograd.Function` around a forward and a backward operator, written beside each operator, called by `apply`;
its backward is `differentiable_once`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

_LIBRARY = torch.library.Library("mirasol", "FRAGMENT")
_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def define(schema: str, *, impl: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int] | None) -> Any:
    """Register one operator, for every kind of device, and return its overload, ready to be called.

    Args:
        schema: name and signature, for example "add(Tensor a, Tensor b) -> Tensor".
        impl: what runs. Outputs are new.
        fake: shapes, dtypes and strides of the outputs, as a function of the inputs' shapes and strides.
        flops: floating-point operations as `torch.utils.flop_counter` counts them (2 per multiply-add of a matrix
            product; softmax, norms and elementwise work count nothing). It receives the arguments themselves and
            `out_val`. None for an operator without matrix products.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _IMPLEMENTATIONS[f"mirasol::{name}"] = impl
    _LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mirasol::{name}", fake, lib=_LIBRARY)
    packet = getattr(torch.ops.mirasol, name)
    register_flop_formula(packet, get_raw=True)(flops if flops is not None else _no_flops)
    return packet.default


def implementation(op: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """What runs behind an operator defined here, None for any other: lets kernels be compiled for `meta` tensors."""
    return _IMPLEMENTATIONS.get(op.name())


def _no_flops(*args: Any, **kwargs: Any) -> int:
    return 0


def transformed() -> bool:
    """Whether `torch.func` (vmap, grad, jvp, ...) or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_transforms(op: str) -> None:
    """What the public function `op` does before it calls an operator.

    Raises:
        NotImplementedError: inside `torch.func` transforms or forward-mode differentiation.
    """
    if not torch.compiler.is_compiling() and transformed():
        raise NotImplementedError(
            f"{op} does not support torch.func transforms and forward-mode differentiation (vmap, grad, jvp): "
            'pass backend="reference", which does.'
        )


def apply(op: str, function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)` for the public function `op`; the same tensor may be passed twice."""
    refuse_transforms(op)
    return function.apply(*(_distinct(args) if torch.compiler.is_compiling() else args))


def _distinct(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`torch.compile` does not trace a Function that is given a tensor twice: the second time it is given a view."""
    seen: list[Any] = []
    for arg in args:
        again = isinstance(arg, torch.Tensor) and any(arg is other for other in seen)
        seen.append(arg.view_as(arg) if again else arg)
    return tuple(seen)


def differentiable_once(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a Function's backward: its gradients raise where someone differentiates through them again."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def guarded(ctx: Any, *grads: Any) -> Any:
            with torch.no_grad():
                found = backward(ctx, *grads)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return found
            found = found if isinstance(found, tuple) else (found,)
            return tuple(_Once.apply(op, g.detach().requires_grad_()) if g is not None else None for g in found)

        return guarded

    return decorate


class _Once(torch.autograd.Function):
    """A gradient that may be used, but not differentiated."""

    @staticmethod
    def forward(ctx: Any, op: str, grad: torch.Tensor) -> torch.Tensor:
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise NotImplementedError(
            f'{ctx.op} has no second derivative: pass backend="reference", which can be differentiated twice.'
        )
