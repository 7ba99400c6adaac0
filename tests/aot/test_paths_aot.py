"""Key paths on Hopper: how many kernels a call launches, and how many machine instructions stand in each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness import Kernel, compile_only, resources
from mirasol.kernels import chunked_attention, combiner_project, ttm_read, ttm_scan, ttm_write
from test_attention_aot import LAYOUTS, VERSION
from test_ttm_aot import empty, learner

TARGET, BF16 = "sm_90", torch.bfloat16
D, S, R, N = 768, 96, 32, 448


def values(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=BF16)


def attend(width: int, layout: dict[str, Any], n_q: int = 2048) -> torch.Tensor:
    k, v = (values(2, 4, 2048, width) for _ in range(2))
    return chunked_attention(values(2, 4, n_q, width), k, v, **layout, backend="triton")


def project() -> torch.Tensor:
    parameters = (values(1024, 1024), *(values(1024) for _ in range(3)))
    return combiner_project(values(4, 16, 390, 1024), 32, *parameters, backend="triton")


def scan(chunks: int) -> torch.Tensor:
    read, write = (learner(D, k, 0, BF16) for k in (R, S))
    found, _ = ttm_scan(values(4, S, D), values(4, chunks, N, D), read, torch.tanh, write, backend="triton")
    return found


PATHS: dict[str, Callable[[], torch.Tensor]] = {
    "chunked_attention of 64": lambda: attend(64, LAYOUTS["aligned"]),
    "chunked_attention of 128": lambda: attend(128, LAYOUTS["aligned"]),
    "chunked_attention of 128, masked": lambda: attend(128, LAYOUTS["masked"]),
    "chunked_attention of 128, few queries": lambda: attend(128, {"q_chunk": 32, "k_chunk": 2048}, n_q=32),
    "combiner_project": project,
    "ttm_read": lambda: ttm_read(values(4, S, D), values(4, N, D), learner(D, R, 0, BF16), backend="triton"),
    "ttm_write": lambda: ttm_write(
        values(4, S, D), values(4, R, D), values(4, N, D), learner(D, S, 0, BF16), backend="triton"
    ),
    "ttm_scan, 2 chunks": lambda: scan(2),
    "ttm_scan, 3 chunks": lambda: scan(3),
}


def kernels_of(path: str) -> tuple[list[Kernel], list[Kernel]]:
    """What forward and backward launch, in order."""
    with compile_only(TARGET) as kernels:
        out = PATHS[path]()
        forward = len(kernels)
        out.sum().backward()
    return kernels[:forward], kernels[forward:]


def instructions(kernel: Kernel) -> int:
    """Those in the binary but for the padding at its end."""
    found = resources(kernel).instructions
    return found.total() - found["NOP"]


@pytest.mark.parametrize("path", PATHS)
def test_launches_and_instructions(path: str, figures) -> None:
    forward, backward = kernels_of(path)
    found = {f"forward: {name}": n for name, n in Counter(kernel.name for kernel in forward).items()}
    found |= {f"backward: {name}": n for name, n in Counter(kernel.name for kernel in backward).items()}
    figures(f"launches on {TARGET}: {path}", found)
    forms: dict[str, list[Kernel]] = {}
    for kernel in {kernel.compiled.hash: kernel for kernel in (*forward, *backward)}.values():
        forms.setdefault(kernel.name, []).append(kernel)
    counted = {name: sum(map(instructions, kernels)) for name, kernels in forms.items()}
    figures(f"instructions on {TARGET}, Triton {VERSION}: {path}", counted)
