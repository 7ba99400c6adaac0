"""Launches of PTX kernels in the emulator."""

from __future__ import annotations

import ctypes
import re
import struct
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from emulator.encode import Code, Module
from emulator.library import library

LIMIT = 2 * 10**8  # warp instructions, after which a launch is taken to hang
_ERROR_BYTES = 1 << 16


@dataclass(frozen=True)
class Counters:
    """What a launch executed and moved.

    Requests are a warp's instructions; sectors have 32 bytes; wavefronts are cycles of shared memory, `ideal` their
    number without bank conflicts, and stores of cp.async and stmatrix are among those to shared memory. copy: cp.async;
    bulk: by tensor maps. Matrix instructions are counted a warp: mma.sync, and wgmma, of which a group has four.
    distinct: sectors of global memory, each counted once.
    """

    warp_instructions: int
    thread_instructions: int
    load_requests: int
    load_sectors: int
    load_bytes: int
    store_requests: int
    store_sectors: int
    store_bytes: int
    copy_requests: int
    copy_sectors: int
    copy_bytes: int
    bulk_requests: int
    bulk_bytes: int
    shared_load_requests: int
    shared_load_wavefronts: int
    shared_load_ideal: int
    shared_store_requests: int
    shared_store_wavefronts: int
    shared_store_ideal: int
    ldmatrix_wavefronts: int
    ldmatrix_ideal: int
    matrix_instructions: int
    wgmma_instructions: int
    matrix_flops: int
    barriers: int
    distinct_read_bytes: int
    distinct_written_bytes: int


@dataclass(frozen=True)
class Schedule:
    """How a launch runs.

    seed: of the order of blocks and of turns of warps; 0 takes blocks in their order. late: asynchronous operations
    complete as late as the program allows, else at once. count: fill the counters of memory. check: races, reads of
    shared memory that was never written. blocks: which run; None: all.
    """

    seed: int = 0
    late: bool = False
    count: bool = False
    check: bool = True
    blocks: Sequence[int] | None = None


@dataclass(frozen=True)
class Launch:
    """One launch: its grid, threads a program, bytes of shared memory, what was found wrong, what was counted.

    executed: how often a warp ran each PTX opcode. options: the numbers and flags that Triton launched it with.
    """

    name: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    errors: list[str]
    seconds: float
    counters: Counters
    executed: Counter[str]
    options: dict[str, Any] = field(default_factory=dict)


class Launches(list[Launch]):
    @property
    def errors(self) -> list[str]:
        """Of all launches, each with the kernel's name in front."""
        return [f"{launch.name}: {error}" for launch in self for error in launch.errors]


def storage(tensor: torch.Tensor, name: str) -> tuple[int, int, str]:
    """What a kernel that is given the tensor may touch, as `Kernel.launch` takes it."""
    whole = tensor.untyped_storage()
    return whole.data_ptr(), whole.nbytes(), name


def tensor_map(
    base: int, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], itemsize: int, swizzle: int
) -> bytes:
    """A map of a tensor in global memory: `TensorMap` of core/asynchronous.cpp.

    shape, strides (bytes, without that of the last dimension, which is contiguous) and box: the last dimension last.
    """
    ones = [1] * (5 - len(box))
    sizes = *strides[::-1], *ones, *shape[::-1], *ones, *box[::-1], *ones
    kind = {1: 0, 2: 1, 4: 2, 8: 4}[itemsize]  # unsigned integers of that size
    return struct.pack("<Q4Q5I5IBBB45x", base, *sizes, len(box) - 1, kind, swizzle)


class _Arguments(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ["kernel", "parameters", "low", "high", "names", "blocks", "counters", "executed", "errors"]
        ),
        *((name, ctypes.c_uint64) for name in ("seed", "limit")),
        *((name, ctypes.c_uint32) for name in ("parameter_bytes", "range_count", "block_count")),
        ("grid", ctypes.c_uint32 * 3),
        *((name, ctypes.c_uint32) for name in ("threads", "shared_bytes", "error_bytes")),
        *((name, ctypes.c_uint8) for name in ("late", "count", "check")),
    )


class Kernel:
    """A kernel of a PTX module, ready to be launched."""

    def __init__(self, module: Module, name: str) -> None:
        self.module = module
        self.code = code = module.code(name)
        lists, values = np.array(code.lists, np.int32), np.array([*code.constants], np.uint64)
        slots, which = np.array([*code.constants.values()], np.int32), np.array([*code.specials], np.int32)
        special_slots = np.array([*code.specials.values()], np.int32)
        handle = library().emulator_kernel(
            _pointer(code.instructions), len(code.instructions), _pointer(lists), len(lists), code.registers,
            _pointer(slots), _pointer(values), len(values), _pointer(special_slots), _pointer(which), len(which),
            code.static_shared, code.local_bytes, code.registers_a_thread,
        )  # fmt: skip
        self.handle = ctypes.c_void_p(handle)

    def launch(
        self,
        grid: Sequence[int],
        threads: int,
        parameters: bytes,
        tensors: Sequence[tuple[int, int, str]],
        *,
        shared: int = 0,
        schedule: Schedule = Schedule(),
    ) -> Launch:
        """Run it; `tensors`: address, bytes and name of each storage that it may touch."""
        if self.code.threads not in (None, threads):
            raise ValueError(f"threads must be {self.code.threads}, as the kernel says, it was {threads}")
        tensors = [*tensors, *((data.ctypes.data, data.nbytes, name) for name, data in self.module.variables.items())]
        low = np.array([address for address, _, _ in tensors], np.uint64)
        high = low + np.array([size for _, size, _ in tensors], np.uint64)
        names = (ctypes.c_char_p * len(tensors))(*[name.encode() for _, _, name in tensors])
        store = np.zeros(len(parameters) + 128, np.uint8)
        aligned = store[-store.ctypes.data % 64 :][: len(parameters)]
        aligned[:] = np.frombuffer(parameters, np.uint8)
        blocks = np.arange(np.prod(grid, dtype=np.int64)) if schedule.blocks is None else np.array(schedule.blocks)
        blocks = blocks.astype(np.uint32)
        counters = np.zeros(len(_counter_names()), np.uint64)
        executed = np.zeros(len(self.code.instructions), np.uint64)
        errors = ctypes.create_string_buffer(_ERROR_BYTES)
        arguments = _Arguments(
            self.handle, *map(_pointer, (aligned, low, high)), ctypes.cast(names, ctypes.c_void_p),
            *map(_pointer, (blocks, counters, executed)), ctypes.cast(errors, ctypes.c_void_p), schedule.seed, LIMIT,
            len(parameters), len(tensors), len(blocks), (ctypes.c_uint32 * 3)(*grid), threads, shared, _ERROR_BYTES,
            schedule.late, schedule.count, schedule.check,
        )  # fmt: skip
        start = time.perf_counter()
        count = library().emulator_launch(ctypes.byref(arguments))
        seconds = time.perf_counter() - start
        found = [self._with_statement(line) for line in errors.value.decode().splitlines()]
        if count > len(found):
            found.append(f"{count} errors in all")
        by_opcode: Counter[str] = Counter()
        for opcode, times in zip(self.code.opcodes, executed.tolist(), strict=True):
            by_opcode[opcode] += times
        counted = Counters(**dict(zip(_counter_names(), counters.tolist(), strict=True)))
        held = shared + self.code.static_shared
        return Launch(self.code.name, tuple(grid), threads, held, found, seconds, counted, by_opcode)

    def _with_statement(self, error: str) -> str:
        line = re.search(r"\[line (\d+)\]", error)
        return f"{error} {self.code.lines.get(int(line[1]), '')[:120]}" if line else error


@cache
def _counter_names() -> list[str]:
    names: list[str] = library().emulator_counters().decode().split()
    return names


def _pointer(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


__all__ = ["Code", "Counters", "Kernel", "Launch", "Launches", "Module", "Schedule", "storage", "tensor_map"]
