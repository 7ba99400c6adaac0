"""What this process can reach at most: copy bandwidth and the rate of a large matrix product."""

from __future__ import annotations

import time
from typing import Any

import torch

from core.harness import Clock, quantile
from core.rows import Row, Settings, dtype_name


def measure(settings: Settings) -> dict[str, Any]:
    """Copy bandwidth in GB/s (bytes read plus bytes written) and matrix products in TFLOP/s per dtype.

    Buffers are far larger than any cache and hold random data (zeros run faster). Medians of a few samples. On a
    processor without instructions for bfloat16 its rate shows that.
    """
    gpu = settings.device.type == "cuda"
    size = 8192 if gpu else (512 if settings.effort == "quick" else 2048)
    elements = (1 << 30) if gpu else ((1 << 23) if settings.effort == "quick" else (1 << 26))
    found: dict[str, Any] = {"copy_gbps": _copy(settings, elements), "copy_bytes": 4 * elements, "gemm_size": size}
    for dtype in (torch.float32, torch.bfloat16):
        found[f"gemm_tflops_{dtype_name(dtype)}"] = _gemm(settings, size, dtype)
    return found


def peak(roofline: dict[str, Any], dtype: str) -> float | None:
    """The measured matrix-product rate for a dtype, in TFLOP/s."""
    return roofline.get(f"gemm_tflops_{'bfloat16' if dtype == 'float16' else dtype}")


def place(rows: list[Row], roofline: dict[str, Any]) -> None:
    """Write into every timed row how much of its roof it reaches, in percent."""
    for row in rows:
        gemm = row.roof == "gemm"
        rate, roof = (row.tflops, peak(roofline, row.dtype)) if gemm else (row.gbps, roofline["copy_gbps"])
        if row.roof and rate and roof:
            row.roof_pct = 100 * rate / roof


def drift(start: dict[str, Any], end: dict[str, Any]) -> float:
    """The largest relative change of any rate between two measurements: how steady the machine was."""
    rates = [name for name in start if name.startswith(("copy_gbps", "gemm_tflops"))]
    return max(abs(end[name] / start[name] - 1) for name in rates)


def _copy(settings: Settings, elements: int) -> float:
    source = settings.randn(elements, dtype=torch.float32)
    target = torch.empty_like(source)
    return 8 * elements / _median_ms(settings, lambda: target.copy_(source)) / 1e6


def _gemm(settings: Settings, size: int, dtype: torch.dtype) -> float:
    a = settings.randn(size, size, dtype=dtype, seed=1)
    b = settings.randn(size, size, dtype=dtype, seed=2)
    out = torch.empty_like(a)
    return 2 * size**3 / _median_ms(settings, lambda: torch.mm(a, b, out=out)) / 1e9


def _median_ms(settings: Settings, call: Any) -> float:
    clock = Clock(settings.device)
    times: list[float] = []
    call()
    clock.wait()
    started = time.perf_counter()
    while len(times) < 3 or (len(times) < 15 and time.perf_counter() - started < 0.3):
        times.append(clock.sample(call, 1))
    return quantile(times, 0.5)
