"""How Triton kernels are launched: the one place that names the compiler's options. Imports Triton."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from mirasol.kernels.core.device import on_device
from mirasol.kernels.core.precision import accumulate_dtype


def prepare(
    kernel: Any,
    programs: int | tuple[int, int],
    *,
    warps: int,
    stages: int = 1,
    registers: int = 0,
    memory: bool = False,
    **constants: Any,
) -> Callable[..., None]:
    """A launch of `kernel` that waits for its tensors and numbers only.

    Args:
        programs: along the grid's first axis, and if need be its second, which holds 65,535 at most.
        registers: the most that a thread may take; 0 leaves it to the compiler.
        memory: whether its programs need global memory of their own, as those that make descriptors do.
    """
    grid = (programs,) if isinstance(programs, int) else programs
    # Products and sums are fused whatever a Triton version does by default: what is compiled is what was checked.
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if registers:
        options["maxnreg"] = registers
    start = functools.partial(kernel[grid], **constants, **options)
    return functools.partial(_with_memory, start) if memory else start


def _with_memory(start: Callable[..., None], *args: Any) -> None:
    """Launch by the allocator that the caller gave Triton, if any, else by PyTorch's, which Triton then forgets."""
    from triton.runtime import _allocation  # private: only these launches may break where Triton changes it

    if isinstance(_allocation._allocator.get(), _allocation.NullAllocator):
        context = contextvars.copy_context()
        context.run(triton.set_allocator, _allocate)
        context.run(start, *args)
    else:
        start(*args)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """From the pool of the current stream, or of the graph being captured: what is freed is reused in its order."""
    return torch.empty(size, dtype=torch.int8, device=driver.active.get_active_torch_device())


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
