"""How Triton kernels are launched: the one place that names the compiler's options. Imports Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl

from mirasol.kernels.core.device import on_device
from mirasol.kernels.core.precision import accumulate_dtype


def prepare(
    kernel: Any, programs: int | tuple[int, int], *, warps: int, stages: int = 1, registers: int = 0, **constants: Any
) -> Callable[..., None]:
    """A launch of `kernel` that waits for its tensors and numbers only.

    Args:
        programs: along the grid's first axis, and if need be its second, which holds 65,535 at most.
        registers: the most that a thread may take; 0 leaves it to the compiler.
    """
    grid = (programs,) if isinstance(programs, int) else programs
    # Products and sums are fused whatever a Triton version does by default: what is compiled is what was checked.
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if registers:
        options["maxnreg"] = registers
    return functools.partial(kernel[grid], **constants, **options)


def launch(
    kernel: Any,
    programs: int | tuple[int, int],
    tensors: Sequence[Any],
    numbers: Sequence[Any] = (),
    *,
    on: torch.Tensor,
    **options: Any,
) -> None:
    """Launch `kernel(*tensors, *numbers)` on the device of the tensor `on`; options as for `prepare`.

    Args:
        tensors: tensors, tensor descriptors or None; numbers: the run-time arguments after them.
    """
    with on_device(on):
        prepare(kernel, programs, **options)(*tensors, *numbers)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of the dtype in which tensors of `dtype` are summed."""
    return tl.float64 if accumulate_dtype(dtype) == torch.float64 else tl.float32
