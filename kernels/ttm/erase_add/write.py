"""Which implementation serves an erase-add write."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..params import EraseAddParams
from . import eager, ops
from .configs import size_refusals


@dataclass(frozen=True)
class EraseAdd:
    """The write of chunk after chunk by one backend, "triton" or "torch".

    Sizes that the kernels do not serve are left to PyTorch, so that summaries beside this write keep their kernels.
    """

    params: EraseAddParams
    backend: str

    def write(self, memory: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """The memory [B, s, d] after a chunk whose outputs are [B, r, d]; the same shape, contiguous."""
        form = ops if self.backend == "triton" and not size_refusals(self.params) else eager
        return form.erase_add(memory, outputs, self.params)
