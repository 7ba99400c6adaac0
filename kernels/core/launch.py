"""How Triton kernels are launched: the one place that names the compiler's options. Imports Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl

from mirasol.kernels.core.device import on_device
from mirasol.kernels.core.precision import accumulate_dtype


def launch(
    kernel: Any,
    programs: int | tuple[int, int],
    tensors: Sequence[Any],
    numbers: Sequence[Any] = (),
    *,
    on: torch.Tensor,
    warps: int,
    stages: int = 1,
    registers: int = 0,
    **constants: Any,
) -> None:
    """Launch `kernel(*tensors, *numbers, **constants)` on the device of the tensor `on`.

    Args:
        programs: along the grid's first axis, and if need be its second, which holds 65,535 at most.
        tensors: tensors, tensor descriptors or None; numbers: the run-time arguments after them.
        registers: the most that a thread may take; 0 leaves it to the compiler.
    """
    options = {"maxnreg": registers} if registers else {}
    grid = (programs,) if isinstance(programs, int) else programs
    with on_device(on):
        # Products and sums are fused whatever a Triton version does by default: what is compiled is what was checked.
        kernel[grid](
            *tensors, *numbers, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True, **options
        )


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of the dtype in which tensors of `dtype` are summed."""
    return tl.float64 if accumulate_dtype(dtype) == torch.float64 else tl.float32


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy: what kernels ask of every tensor."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
