"""Registration of opaque operators in the `mirasol` namespace.

An operator is opaque to the compiler: `torch.compile` sees one node with a fake, never the kernels inside. Autograd is
a `torch.autograd.Function` around a forward and a backward operator, written beside each operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_LIBRARY = torch.library.Library("mirasol", "FRAGMENT")
_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def define(schema: str, *, impl: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int] | None) -> Any:
    """Register one operator for CPU and CUDA and return its overload, ready to be called.

    Args:
        schema: name and signature, for example "add(Tensor a, Tensor b) -> Tensor".
        impl: what runs. Outputs are new and contiguous.
        fake: shapes, dtypes and (contiguous) strides of the outputs, as a function of the inputs' shapes alone.
        flops: floating-point operations as `torch.utils.flop_counter` counts them (2 per multiply-add of a matrix
            product; softmax, norms and elementwise work count nothing). It receives the arguments themselves and
            `out_val`. None for an operator without matrix products.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _IMPLEMENTATIONS[f"mirasol::{name}"] = impl
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, impl, key)
    torch.library.register_fake(f"mirasol::{name}", fake, lib=_LIBRARY)
    packet = getattr(torch.ops.mirasol, name)
    register_flop_formula(packet, get_raw=True)(flops if flops is not None else _no_flops)
    return packet.default


def implementation(op: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """What runs behind an operator defined here, None for any other: lets kernels be compiled for `meta` tensors."""
    return _IMPLEMENTATIONS.get(op.name())


def _no_flops(*args: Any, **kwargs: Any) -> int:
    return 0
