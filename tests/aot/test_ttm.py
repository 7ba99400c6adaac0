"""The summary's kernels compiled through the public functions: no spills, shared memory, matrix units."""

from __future__ import annotations

import pytest
import torch

from harness import SHARED_MEMORY, Kernel, compile_only, resources
from mirasol.kernels import TokenLearnerParams, ttm_read, ttm_scan, ttm_write

PRODUCTS = {
    "summary_hidden_fwd_kernel",
    "summary_pool_fwd_kernel",
    "summary_bwd_scores_kernel",
    "summary_bwd_tokens_kernel",
    "summary_bwd_w1_kernel",
    "summary_bwd_w2_kernel",
}
ROWS = {"summary_merge_fwd_kernel", "summary_bwd_rows_kernel"}
CASES = [  # d, n, s, r, dtype
    (768, 448, 96, 32, torch.bfloat16),
    (1024, 390, 96, 64, torch.float16),
    (2048, 294, 128, 16, torch.bfloat16),
]


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)


def params(d: int, k: int, positions: int, dtype: torch.dtype, hidden: int = 64) -> TokenLearnerParams:
    shapes = ((d,), (d,), (hidden, d), (hidden,), (k, hidden), (k,))
    place = empty(positions, d, dtype=dtype) if positions else None
    return TokenLearnerParams(*[empty(*shape, dtype=dtype) for shape in shapes], place)


def compiled(target: str, d: int, n: int, s: int, r: int, dtype: torch.dtype, positions: bool) -> list[Kernel]:
    """Forward and backward of a read, a write and, without positions, of a scan."""
    B, T = 2, 2
    memory, inputs, outputs = (empty(B, p, d, dtype=dtype) for p in (s, n, r))
    read, write = params(d, r, (s + n) * positions, dtype), params(d, s, (s + n + r) * positions, dtype)
    with compile_only(target) as kernels:
        ttm_read(memory, inputs, read, backend="triton").sum().backward()
        ttm_write(memory, outputs, inputs, write, backend="triton").sum().backward()
        if not positions:
            chunks = empty(B, T, n, d, dtype=dtype)
            found, last = ttm_scan(memory, chunks, read, torch.tanh, write, form="parallel", backend="triton")
            (found.sum() + last.sum()).backward()
    unique = {(k.name, k.compiled.hash): k for k in kernels}
    return list(unique.values())


def check(kernel: Kernel, target: str) -> None:
    found = resources(kernel)
    where = f"{kernel.name} {kernel.options}"
    assert found.spills == 0, f"{where}: {found.spills} spills"
    assert found.stack == 0, f"{where}: {found.stack} bytes of stack"
    assert found.shared <= SHARED_MEMORY[target], f"{where}: {found.shared} bytes of shared memory"
    if kernel.name in PRODUCTS:
        units = {"sm_80": found.mma, "sm_90": found.wgmma, "sm_100": found.tcgen05 + found.mma}
        assert units[target] > 0, f"{where}: no matrix instructions"
        if target == "sm_90":
            assert found.mma == 0, f"{where}: {found.mma} products on the older matrix instructions"


@pytest.mark.parametrize(("d", "n", "s", "r", "dtype"), CASES)
def test_hopper(d, n, s, r, dtype):
    kernels = compiled("sm_90", d, n, s, r, dtype, positions=False)
    assert {k.name for k in kernels} >= PRODUCTS | {"summary_bwd_rows_kernel"}
    for kernel in kernels:
        check(kernel, "sm_90")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_positions_and_other_targets(target):
    for kernel in compiled(target, 768, 448, 96, 32, torch.bfloat16, positions=True):
        check(kernel, target)


def test_float32_on_hopper():
    for kernel in compiled("sm_90", 768, 448, 96, 32, torch.float32, positions=False):
        found = resources(kernel)
        assert (found.spills, found.stack) == (0, 0), kernel.name


def test_lengths_compile_nothing_new():
    names = []
    read = params(768, 32, 0, torch.bfloat16)
    for n in (17, 294, 448, 449, 667, 1176):
        memory, inputs = empty(2, 96, 768, dtype=torch.bfloat16), empty(2, n, 768, dtype=torch.bfloat16)
        with compile_only("sm_90") as kernels:
            ttm_read(memory, inputs, read, backend="triton").sum().backward()
        names += [(k.name, k.compiled.hash) for k in kernels]
    for name in PRODUCTS | ROWS:
        assert len({h for kind, h in names if kind == name}) <= 6, name
