"""Which backend serves a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

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
    if kind == "meta" or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Cast floating tensors to the autocast dtype where autocast is on, as PyTorch's own matmuls do.

    Opaque operators are invisible to autocast, so their public functions call this first. float64 is left alone.
    """
    return [t if t is None or t.dtype == autocast_dtype(t) else t.to(autocast_dtype(t)) for t in tensors]
