"""Precisions in which statistics, sums and products are kept."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_precision(dtype: torch.dtype) -> str:
    """How Triton multiplies: "tf32" for float32 where PyTorch's own products may be rounded so, else "ieee"."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
