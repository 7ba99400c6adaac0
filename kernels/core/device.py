"""Questions about the device that Triton kernels run on, and the reasons common to all of them to refuse a call.

Triton is imported inside the functions: importing this module needs neither Triton nor a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Target:
    """What configurations depend on.

    arch: 80, 90, 100, ... for NVIDIA (compute capability times ten), 0 for AMD and for the interpreter.
    kind: "cuda", "hip" or "interpreter".
    multiprocessors: how many programs run at the same time, at least.
    shared_memory: bytes a program may use.
    triton: major and minor version of the compiler; some need other tiles than others.
    """

    arch: int
    kind: str
    multiprocessors: int
    shared_memory: int
    triton: tuple[int, int] = (3, 6)

    @property
    def forgets_registers(self) -> bool:
        """Whether a loop may write registers that wgmma still reads, as Triton before 3.8 waits for too few products.

        See triton-lang/triton issue 9433.
        """
        return self.kind == "cuda" and self.arch == 90 and self.triton < (3, 8)


INTERPRETER = Target(arch=0, kind="interpreter", multiprocessors=4, shared_memory=1 << 30)


DEVICES = ("cuda", "meta")  # types of devices that compiled kernels are launched for

# Triton decides where a kernel is defined whether it is interpreted, so both answers hold for the whole process.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = _HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def has_triton() -> bool:
    """Whether Triton is installed (it need not find a GPU)."""
    return _HAS_TRITON


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int] | None:
    """Major and minor version of the Triton that is installed, None without it."""
    if not _HAS_TRITON:
        return None
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on any device: TRITON_INTERPRET=1 before Python starts."""
    return _INTERPRETED


def target(device: torch.device) -> Target:
    """The target of kernels launched for tensors on `device`; of the driver in force for tensors on `meta`."""
    if interpreted():
        return INTERPRETER
    from triton.runtime import driver

    index = device.index if device.type == "cuda" and device.index is not None else driver.active.get_current_device()
    return _target(driver.active, index)


@lru_cache(maxsize=64)
def _target(active: object, index: int) -> Target:
    device_guard = torch.cuda.device(index) if torch.cuda.is_available() else contextlib.nullcontext()
    with device_guard:
        current = active.get_current_target()  # type: ignore[attr-defined]
    properties = active.utils.get_device_properties(index)  # type: ignore[attr-defined]
    return Target(
        arch=int(current.arch) if current.backend == "cuda" else 0,
        kind=current.backend,
        multiprocessors=properties["multiprocessor_count"],
        shared_memory=properties["max_shared_mem"],
        triton=triton_version() or (0, 0),
    )


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the device of `tensor` current, as Triton launches on the current one; nothing to do where it is."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device_of(tensor)


def triton_refusals(*tensors: torch.Tensor | None) -> list[str]:
    """One sentence for each reason, shared by all operators, why Triton kernels cannot serve these tensors."""
    if not has_triton():
        return ["Triton is not installed."]
    given = [t for t in tensors if t is not None]
    dtypes = {t.dtype for t in given}
    if interpreted():
        # Its bfloat16 dots and sums are wrong (triton-lang/triton issue 11584).
        return ["Triton's interpreter does not compute in bfloat16."] if torch.bfloat16 in dtypes else []
    reasons = []
    if torch.float64 in dtypes:
        reasons.append("Its kernels serve float64 in Triton's interpreter only.")
    if any(t.device.type not in DEVICES for t in given):
        reasons.append("Its kernels need tensors on a GPU (or TRITON_INTERPRET=1 before Python starts).")
    return reasons
