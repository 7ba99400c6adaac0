"""The emulator's core: built when its sources change, called by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

CORE = Path(__file__).parent / "core"
BUILD = Path(__file__).parents[2] / "build" / "emulated"
FLAGS = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-Wall", "-Wextra"]


@cache
def library() -> ctypes.CDLL:
    sources, digest = sorted(CORE.glob("*.cpp")), hashlib.sha256()
    for file in sorted(CORE.iterdir()):
        digest.update(file.read_bytes())
    built = BUILD / f"emulator-{digest.hexdigest()[:16]}.so"
    if not built.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        scratch = BUILD / f"build-{os.getpid()}"
        scratch.mkdir()
        compiler = os.environ.get("CXX", "g++")
        jobs = [subprocess.Popen([compiler, *FLAGS, "-c", s, "-o", scratch / f"{s.stem}.o"]) for s in sources]
        failed = [job.wait() for job in jobs]
        if any(failed):
            raise RuntimeError("the emulator's core does not compile, see above")
        objects = [scratch / f"{s.stem}.o" for s in sources]
        subprocess.run([compiler, "-shared", *objects, "-o", scratch / built.name], check=True)
        os.replace(scratch / built.name, built)
        shutil.rmtree(scratch)
    loaded = ctypes.CDLL(str(built))
    loaded.emulator_counters.restype = ctypes.c_char_p
    loaded.emulator_kernel.restype = ctypes.c_void_p
    loaded.emulator_launch.restype = ctypes.c_uint64
    return loaded


@cache
def operation_index(name: str) -> int:
    """-1 where the core has no such operation."""
    found: int = library().emulator_operation(name.encode())
    return found
