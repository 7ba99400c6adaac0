"""Which backend serves a call, and what it does to tensors first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

Backend = Literal["auto", "triton", "torch", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "torch", "reference")


def choose_backend(op: str, backend: str, on_gpu: bool, triton_refusals: Sequence[str]) -> str:
    """Resolve `backend` to "triton", "torch" or "reference".

    "auto" takes Triton for tensors on a GPU that it serves, and eager PyTorch otherwise.

    Args:
        triton_refusals: one sentence for each reason why the Triton kernels cannot serve this call.
    Raises:
        ValueError: an unknown name, or "triton" where there are refusals; the message holds them.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, was {backend!r}")
    if backend == "auto":
        return "triton" if on_gpu and not triton_refusals else "torch"
    if backend == "triton" and triton_refusals:
        raise ValueError(f'{op} cannot run with backend="triton": ' + " ".join(triton_refusals))
    return backend


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which `autocast` hands a tensor on: its own where autocast is off, and for float64."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensor.dtype
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast floating tensors to the autocast dtype where autocast is on, as PyTorch's own matmuls do.

    Opaque operators are invisible to autocast, so their public functions call this before they check that dtypes agree.
    float64 and whatever is not a tensor are left alone.
    """
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return tensors
    return tuple([t.to(autocast_dtype(t)) if isinstance(t, torch.Tensor) else t for t in tensors])


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy: what kernels ask of every tensor."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
