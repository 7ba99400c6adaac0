"""Which implementation serves an erase-add write."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..params import EraseAddParams
from . import eager


@dataclass(frozen=True)
class EraseAdd:
    """The write of chunk after chunk by one backend, "triton" or "torch"."""

    params: EraseAddParams
    backend: str

    def write(self, memory: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """The memory [B, s, d] after a chunk whose outputs are [B, r, d]; the same shape, contiguous."""
        return eager.erase_add(memory, outputs, self.params)
