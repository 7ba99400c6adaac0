"""The tubes' CUDA kernels in the emulator, below their real host code: csrc/ linked with cudart.cpp."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pybind11
import torch

from emulator.machine import Kernel, Launches, Module, Schedule, storage
from mirasol.kernels.tubes import native

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
ARCHITECTURES = ("80", "90")
_GRID, _ARGUMENTS = ctypes.POINTER(ctypes.c_uint * 3), ctypes.POINTER(ctypes.c_void_p)
ON_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, _GRID, ctypes.c_uint, _ARGUMENTS, ctypes.c_size_t)


def find_nvcc() -> str | None:
    named = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    return str(named) if named.exists() else shutil.which("nvcc")


def nvcc_flags() -> list[str]:
    """Those of setup.py, read from its text: to import it would be to build."""
    (listed,) = re.findall(r"^NVCC_FLAGS = (.*)$", (ROOT / "setup.py").read_text(), re.MULTILINE)
    return list(ast.literal_eval(listed))


@functools.cache
def build() -> Path:
    """Compile csrc/ for the emulator, once for every content of its sources.

    Returns:
        The folder of `_cuda.so` and of `tubes_cuda.compute_80.ptx` and `tubes_cuda.compute_90.ptx`, all of one run of
        the compiler: kernels in unnamed namespaces have other names in every run.
    Raises:
        RuntimeError: there is no nvcc, or it failed, with its words.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc was found")
    compiled = [ROOT / "csrc" / "tubes_cuda.cu", ROOT / "csrc" / "bind_cuda.cpp", HERE / "cudart.cpp"]
    read = [*compiled, *sorted((ROOT / "csrc").glob("*.h")), ROOT / "setup.py", Path(__file__)]
    content = hashlib.sha256(b"".join(path.read_bytes() for path in read)).hexdigest()
    target = ROOT / "build" / "emulated" / f"tubes-{content[:16]}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        command = [nvcc, *nvcc_flags(), "-shared", "-cudart=none", "--keep", f"--keep-dir={scratch}"]
        command += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ARCHITECTURES]
        command += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", *map(str, compiled)]
        run = subprocess.run([*command, "-o", str(made / "_cuda.so")], capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(run.stdout + run.stderr)
        for arch in ARCHITECTURES:
            Path(scratch, f"tubes_cuda.compute_{arch}.ptx").rename(made / f"tubes_cuda.compute_{arch}.ptx")
        with contextlib.suppress(OSError):  # another process was faster
            made.rename(target)
    return target


@contextlib.contextmanager
def emulated(target: str, *, seed: int = 0, count: bool = False) -> Iterator[Launches]:
    """Native code runs the CUDA kernels on CPU tensors for `target` ("sm_80" or "sm_90"); see `device.emulated`.

    What they are to fill is NaN before (255 in bytes). What the emulator raises reaches the caller of `extract_tubes`.
    """
    text = (build() / f"tubes_cuda.compute_{target[3:]}.ptx").read_text()
    ptx, module, library = Module(text), _module(), ctypes.CDLL(str(build() / "_cuda.so"))
    launches, raised, tensors = Launches(), [], []

    @ON_LAUNCH
    def on_launch(name: bytes, grid: Any, threads: int, arguments: Any, shared: int) -> int:
        try:
            kernel = Kernel(ptx, name.decode())
            values = bytearray(max(p.offset + p.size for p in kernel.code.parameters))
            for p, address in zip(kernel.code.parameters, arguments, strict=False):
                values[p.offset : p.offset + p.size] = ctypes.string_at(address, p.size)
            schedule = Schedule(seed=seed, count=count)
            found = kernel.launch(
                tuple(grid.contents), threads, bytes(values), tensors, shared=shared, schedule=schedule
            )
            launches.append(found)
        except BaseException as error:  # which ctypes would print and drop
            raised.append(error)
        return 719 if raised else 0  # cudaErrorLaunchFailure

    def call(function: str, numbers: tuple[Any, ...], threads: int, isa: str) -> None:
        try:
            getattr(module, function)(numbers, 0)
        except RuntimeError as error:
            raise (raised.pop() if raised else error) from None

    def run(function: Any, video: torch.Tensor, tubes: Any, scale: Any, shift: Any, tokens: Any) -> None:
        for t in tokens if function == "extract" else [video]:
            t.view(torch.uint8).fill_(255)
        tensors[:] = [storage(video, "video"), *(storage(t, f"tokens of tube {i}") for i, t in enumerate(tokens))]
        real(function, video, tubes, scale, shift, tokens)

    real = native.run
    stand_in = SimpleNamespace(**{name: functools.partial(call, name) for name in ("extract", "scatter")})
    library.emulate(on_launch)
    try:
        with mock.patch.object(native, "_load", return_value=(stand_in, "")), mock.patch.object(native, "run", run):
            yield launches
    finally:
        library.emulate(None)


@functools.cache
def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulated._cuda", build() / "_cuda.so")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module
