"""The harness itself, on a kernel whose binary is known."""

from __future__ import annotations

import contextlib

import pytest
import torch
import triton
import triton.language as tl

from aot.hazardous import launch_product_and_sums, launch_product_of_sum
from harness import Kernel, compile_only, resources

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@triton.jit
def _matmul_kernel(x, y, out, N: tl.constexpr):
    rows = tl.arange(0, N)
    at = rows[:, None] * N + rows[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


def compile_matmul(target: str, n: int) -> Kernel:
    x = torch.empty(n, n, device="meta", dtype=torch.bfloat16)
    with compile_only(target) as kernels:
        _matmul_kernel[(1,)](x, x, torch.empty(n, n, device="meta"), n, num_warps=4)
    (kernel,) = kernels
    assert kernel.name == "_matmul_kernel"
    return kernel


@pytest.mark.parametrize("target", TARGETS)
def test_a_matrix_product_uses_the_matrix_units(target: str) -> None:
    found = resources(compile_matmul(target, 64))
    assert found.spills == 0
    assert found.stack == 0
    assert 0 < found.registers < 256
    assert found.warps == 4
    used = {
        "sm_80": found.mma,
        "sm_90": found.wgmma,
        "sm_100": found.tcgen05,
        "gfx942": sum(n for op, n in found.instructions.items() if op.startswith("v_mfma")),
    }
    assert used[target] > 0, found.instructions


def test_spills_are_seen() -> None:
    found = resources(compile_matmul("sm_80", 256))  # 64 K accumulators for 128 threads
    assert found.spills > 0
    assert found.stack > 0


def test_the_driver_is_put_back() -> None:
    from triton.runtime import driver

    before = driver._active
    with compile_only("sm_90"):
        pass
    assert driver._active is before


def test_a_tile_that_wgmma_still_reads_is_not_refilled() -> None:
    x = torch.empty(64, 512, device="meta", dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="2 buffers for 2 copies ahead"), compile_only("sm_90"):
        launch_product_and_sums(x, x)
    with compile_only("sm_80"):
        launch_product_and_sums(x, x)


def test_registers_that_wgmma_still_reads_are_not_written() -> None:
    x = torch.empty(64, 512, device="meta", dtype=torch.bfloat16)
    forgets = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8)
    with (
        pytest.raises(AssertionError, match="is written while wgmma") if forgets else contextlib.nullcontext(),
        compile_only("sm_90"),
    ):
        launch_product_of_sum(x, x)
