"""Compile every Triton kernel that a public function launches, on a machine without a GPU, and read the binaries.

    with compile_only("sm_90") as kernels:
        chunked_attention(q, k, v, q_chunk=448, backend="triton")     # tensors on the meta device
    resources(kernels[0])

A stand-in driver names the target, launches stop after compilation, and operators called on meta tensors run their
implementation instead of their fake. So the very specialisations of a real launch are compiled: divisibility, arguments
that equal 1, descriptors. Relies on `JITFunction.run` and `driver._active`, which are private: see `SUPPORTED`.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from aot.hazards import hazards
from mirasol.kernels.core.registration import implementation

SUPPORTED = ((3, 6), (3, 10))  # Triton versions whose internals this file has been run with: from, below
SHARED_MEMORY = {  # bytes a program may use
    "sm_80": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}
MULTIPROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
REGISTERS = 65536  # of 32 bits, an NVIDIA multiprocessor
_NVIDIA_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: its name, the target ("sm_90"), Triton's object and the constants it was compiled with."""

    name: str
    target: str
    compiled: Any
    options: dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """What a binary needs and holds.

    registers: a thread. shared: bytes. warps: a program, warp-specialised partitions included. stack: bytes a thread.
    spills: loads and stores of local memory (scratch, on AMD). instructions: how often each opcode stands in the code.
    """

    registers: int
    shared: int
    warps: int
    stack: int
    spills: int
    warp_specialized: bool
    instructions: Counter[str]

    @property
    def wgmma(self) -> int:
        return self.instructions["HGMMA"]

    @property
    def mma(self) -> int:
        """Warp-level matrix instructions: the fallback on Hopper, the right ones on Ampere."""
        return self.instructions["HMMA"]

    @property
    def tcgen05(self) -> int:
        """Blackwell's matrix instructions."""
        return self.instructions["UTCHMMA"] + self.instructions["UTCQMMA"]

    @property
    def tma_loads(self) -> int:
        return self.instructions["UTMALDG"]

    @property
    def programs_per_multiprocessor(self) -> int:
        """How many programs fit at a time by registers and shared memory (NVIDIA, 228 KiB of shared memory)."""
        by_registers = REGISTERS // (32 * self.warps * max(8 * -(-self.registers // 8), 24))
        return min(by_registers, 233472 // max(self.shared + 1024, 1024), 64 // self.warps)


class Driver:
    """The part of a Triton driver that specialisation and compilation read."""

    def __init__(self, name: str) -> None:
        self.name = name
        nvidia = name.startswith("sm_")
        self.target = GPUTarget("cuda", int(name[3:]), 32) if nvidia else GPUTarget("hip", name, 64)
        self.utils = self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_MEMORY[self.name],
            "multiprocessor_count": MULTIPROCESSORS[self.name],
            "max_num_regs": REGISTERS,
            "warpSize": self.target.warp_size,
        }

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 1000 + list(SHARED_MEMORY).index(self.name)  # Triton caches kernels by device: no clash with real ones

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        return lambda fn, **kwargs: [0.0, 0.0, 0.0]

    def map_python_to_cpp_type(self, type_name: str) -> str:
        return type_name


class RunImplementations(TorchDispatchMode):
    """Operators of this project run their implementation on meta tensors: host code and launches, no arithmetic."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        impl = implementation(func)
        if impl is None:
            return func(*args, **(kwargs or {}))
        with self:
            return impl(*_with_defaults(func, args), **(kwargs or {}))


def _with_defaults(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, those equal to the schema's defaults filled in again (the dispatcher leaves them out)."""
    missing = func._schema.arguments[len(args) :]
    return (*args, *(argument.default_value for argument in missing if argument.has_default_value()))


def check_supported() -> None:
    """Raise RuntimeError where Triton interprets kernels, or is of a version whose internals may differ."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("compiling needs a process without TRITON_INTERPRET=1")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not SUPPORTED[0] <= version < SUPPORTED[1]:
        raise RuntimeError(f"the compile-only harness was not yet tried with Triton {triton.__version__}")


@contextlib.contextmanager
def compile_only(target: str) -> Iterator[list[Kernel]]:
    """Yield a list that fills with the kernels that would be launched for `target` ("sm_90", "gfx942", ...).

    Raises AssertionError in the end where a kernel for Hopper writes what wgmma may still read: see `hazards`.
    """
    check_supported()
    seen: list[Kernel] = []
    run, active = JITFunction.run, driver._active

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        constants = dict(zip((p.name for p in self.params), args, strict=False)) | kwargs
        options = {k: v for k, v in constants.items() if isinstance(v, int | float | str | bool | None)}
        seen.append(Kernel(self.__name__, target, compiled, options))
        return compiled

    driver.set_active(Driver(target))
    JITFunction.run = record
    try:
        with RunImplementations():
            yield seen
    finally:
        JITFunction.run = run
        driver._active = active  # reset_active() would build a CUDA driver, and fail without one
    if target == "sm_90":
        for kernel in seen:
            found = hazards(kernel.compiled.asm["ttgir"], kernel.compiled.asm["ptx"])
            assert not found, f"{kernel.name}: {'; '.join(found)}"


def resources(kernel: Kernel) -> Resources:
    """Read registers, spills, shared memory and instructions from a kernel's binary."""
    return _nvidia_resources(kernel) if kernel.target.startswith("sm_") else _amd_resources(kernel)


def _nvidia_resources(kernel: Kernel) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    opcodes = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.MULTILINE))
    return Resources(
        registers=int(found[1]),
        shared=kernel.compiled.metadata.shared,
        warps=total_warps(kernel.compiled),
        stack=int(found[2]),
        spills=opcodes["LDL"] + opcodes["STL"],
        warp_specialized="ttg.warp_specialize" in kernel.compiled.asm["ttgir"],
        instructions=opcodes,
    )


def _amd_resources(kernel: Kernel) -> Resources:
    code = kernel.compiled.asm["amdgcn"]

    def note(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found is not None, f"no .{name} in the assembly of {kernel.name}"
        return int(found[1])

    opcodes = Counter(re.findall(r"^\s+([a-z][a-z0-9_]+)", code, re.MULTILINE))
    return Resources(
        registers=note("vgpr_count"),
        shared=note("group_segment_fixed_size") or kernel.compiled.metadata.shared,
        warps=total_warps(kernel.compiled),
        stack=note("private_segment_fixed_size"),
        spills=sum(count for opcode, count in opcodes.items() if opcode.startswith("scratch_")),
        warp_specialized=False,
        instructions=opcodes,
    )


def total_warps(compiled: Any) -> int:
    """Of a program, warp-specialised partitions included."""
    found = re.search(r'"ttg.total-num-warps" = (\d+)', compiled.asm["ttgir"])
    return int(found[1]) if found else compiled.metadata.num_warps


def _tool(name: str, *args: str) -> str:
    command = [os.path.join(_NVIDIA_TOOLS, name), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
