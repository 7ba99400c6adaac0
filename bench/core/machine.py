"""The machine line: what a figure was measured on."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]


def describe(device: torch.device) -> dict[str, Any]:
    """CPU, threads, versions, GPU and date, as plain values for JSON."""
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": _load(),
        "memory_gib": _memory_gib(),
        "os": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "cuda": torch.version.cuda,
        "driver": None,
        "gpu": None,
        "native_extension": _native(),
    }
    if device.type == "cuda":
        facts.update(_gpu(device))
    return facts


def line(facts: dict[str, Any]) -> str:
    """The same in a line or two for people."""
    dirty = ", with uncommitted changes" if facts.get("dirty") else ""
    what = facts.get("gpu") or facts["cpu"]
    parts = [
        f"{what}, {facts['threads']} threads of {facts['cores']} cores",
        f"torch {facts['torch']}, triton {facts['triton'] or 'none'}, CUDA {facts['cuda'] or 'none'}"
        + (f", driver {facts['driver']}" if facts.get("driver") else ""),
        f"commit {facts.get('commit') or 'unknown'}{dirty}",
        str(facts["date"]),
    ]
    return "; ".join(parts)


def slug(facts: dict[str, Any]) -> str:
    """A short name for files: "cpu", or the GPU's ("h200")."""
    gpu = facts.get("gpu")
    if not gpu:
        return "cpu"
    words = [word for word in re.findall(r"[a-z0-9]+", gpu.lower()) if word not in ("nvidia", "geforce", "amd")]
    return words[0] if words else "gpu"


def cpu_model() -> str:
    """The processor's own name where the system tells it."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if platform.system() == "Darwin":
            return _run("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or platform.machine()


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_multiprocessors": properties.multi_processor_count,
    }
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        answer = _run("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={device.index or 0}")
        names = ("driver", "clock_sm", "clock_sm_max", "clock_memory", "power_limit")
        facts.update(zip(names, (value.strip() for value in answer.split(",")), strict=True))
    return facts


def _native() -> Any:
    try:
        from mirasol.kernels import build_info

        return build_info()
    except Exception as why:
        return f"unknown: {why}"


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
