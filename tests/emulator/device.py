"""A GPU of the emulator: real host code on CPU tensors, real compiled kernels.

    with emulated("sm_90", seed=1, late=True) as launches:
        chunked_attention(q, k, v, q_chunk=448, backend="triton")     # tensors on the CPU
    assert not launches.errors

A stand-in driver names the target, Triton compiles as for a GPU, as far as PTX, and a launch runs that PTX. What
torch.empty makes is filled with NaN meanwhile, so that nothing unwritten passes. Relies on `JITFunction.run` and
`driver._active`, as tests/aot/harness.py does.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from aot.harness import Driver, check_supported, total_warps
from emulator.library import BUILD
from emulator.machine import Kernel, Launch, Launches, Module, Schedule, storage, tensor_map
from mirasol.kernels.core import device as devices

NUMBERS = dict(fp32="f", fp64="d", i1="?", i8="b", i16="h", i32="i", i64="q", u1="?", u8="B", u16="H", u32="I", u64="Q")
_device_numbers = itertools.count(5000)  # Triton caches kernels by device


class _Gpu(Driver):
    def __init__(self, name: str, multiprocessors: int) -> None:
        super().__init__(name)
        self.multiprocessors, self.number = multiprocessors, next(_device_numbers)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return super().get_device_properties(device) | {"multiprocessor_count": self.multiprocessors}

    def get_current_device(self) -> int:
        return self.number

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


_gpu = cache(_Gpu)


@contextlib.contextmanager
def emulated(
    target: str,
    *,
    multiprocessors: int = 8,
    seed: int = 0,
    late: bool = False,
    count: bool = False,
    check: bool = True,
    programs: Sequence[int] | None = None,
    mutate: Callable[[str], str] = str,
) -> Iterator[Launches]:
    """Run Triton launches for `target` ("sm_80" or "sm_90") in the emulator; yield a list that fills with them.

    Args:
        multiprocessors: of the device, as host code sees it.
        programs: run only these of each launch (results are incomplete then); None: all.
        seed, late, count, check: see `machine.Schedule`.
        mutate: changes the PTX before it runs, to see what is noticed.
    """
    check_supported()
    launches, schedule = Launches(), Schedule(seed, late, count, check, programs)
    run = JITFunction.run

    def emulate(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        bound = dict(zip((p.name for p in self.params), args, strict=False)) | kwargs
        sizes = grid(bound) if callable(grid) else grid
        found = kernel(mutate(compiled.asm["ptx"]), compiled.metadata.name)
        launches.append(_launch(found, compiled, [p.name for p in self.params], bound, sizes, schedule))
        return compiled

    with (
        mock.patch.object(JITFunction, "run", emulate),
        mock.patch.object(driver, "_active", _gpu(target, multiprocessors)),
        mock.patch.object(CUDABackend, "make_cubin", return_value=b""),
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(BUILD / "triton")),  # of kernels without a binary
        mock.patch.object(devices, "DEVICES", (*devices.DEVICES, "cpu")),
        _unwritten_is_nan(),
    ):
        yield launches


@contextlib.contextmanager
def _unwritten_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@cache
def kernel(ptx: str, name: str) -> Kernel:
    return Kernel(Module(ptx), name)


def _launch(
    found: Kernel, compiled: Any, names: Sequence[str], bound: dict[str, Any], grid: Sequence[int], schedule: Schedule
) -> Launch:
    sizes = (*grid, *[1] * (3 - len(grid)))
    values, tensors = _arguments(compiled, names, bound)
    scratch = np.zeros(compiled.metadata.global_scratch_size * int(np.prod(sizes)) + 128, np.uint8)
    begin = -(-scratch.ctypes.data // 128) * 128
    values += [struct.pack("Q", begin), struct.pack("Q", 0)]  # the second one: a profiler's
    tensors.append((begin, scratch.nbytes - (begin - scratch.ctypes.data), "scratch"))
    parameters = bytearray(sum(p.size for p in found.code.parameters) + 1024)
    for parameter, value in zip(found.code.parameters, values, strict=True):
        if parameter.size < len(value):
            raise TypeError(
                f"{parameter.name} of {found.code.name} has {parameter.size} bytes, its argument {len(value)}"
            )
        parameters[parameter.offset : parameter.offset + len(value)] = value
    threads = 32 * total_warps(compiled)
    options = {k: v for k, v in bound.items() if isinstance(v, int | float | str | bool | None)}
    shared = compiled.metadata.shared
    launch = found.launch(sizes, threads, bytes(parameters), tensors, shared=shared, schedule=schedule)
    return replace(launch, options=options)


def _arguments(
    compiled: Any, names: Sequence[str], bound: dict[str, Any]
) -> tuple[list[bytes], list[tuple[int, int, str]]]:
    """The bytes of each parameter, and the storages behind them, each once."""
    values: list[bytes] = []
    tensors: dict[int, tuple[int, int, str]] = {}
    descriptors = iter(getattr(compiled.metadata, "tensordesc_meta", None) or [])

    def pointer(tensor: torch.Tensor | None, name: str) -> bytes:
        if tensor is None:
            return struct.pack("Q", 0)
        tensors.setdefault(tensor.untyped_storage().data_ptr(), storage(tensor, name))
        return struct.pack("Q", tensor.data_ptr())

    for name in names:
        kind, value = compiled.src.signature.get(name, "constexpr"), bound.get(name)
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            base = pointer(value.base, name)
            described = next(descriptors, None)
            if described is None:  # read by pointers: sm_80
                values += [
                    base,
                    *[struct.pack("q", n) for n in (*value.shape, *value.strides)],
                    struct.pack("?", False),
                ]
            else:
                values.append(described_map(value, described))
            values += [struct.pack("i", n) for n in value.shape] + [struct.pack("q", n) for n in value.strides]
        elif kind.startswith("*"):
            values.append(pointer(value, name))
        else:
            values.append(struct.pack(NUMBERS[kind], value))
    return values, list(tensors.values())


def described_map(descriptor: Any, described: dict[str, Any]) -> bytes:
    """What the driver makes of a descriptor; refused where it would be."""
    size, box = described["elem_size"], list(described["block_size"])
    strides = [stride * size for stride in descriptor.strides[:-1]]
    aligned = descriptor.base.data_ptr() % 16 == 0 and all(0 < s < 2**40 and s % 16 == 0 for s in strides)
    if not aligned or not all(1 <= b <= 256 for b in box) or box[-1] * size % 16 or not all(descriptor.shape):
        raise ValueError(f"no tensor map has strides of {strides} bytes and boxes of {box} elements")
    return tensor_map(descriptor.base.data_ptr(), descriptor.shape, strides, box, size, described["swizzle"])
