"""Two kernels that Triton compiles to races on Hopper, small: what `hazards` and the emulator must find."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def product_and_sums_kernel(x, y, out, sums, K: tl.constexpr, BLOCK: tl.constexpr):
    """x [64, K] @ y [64, K]^T and the sums of x's rows: one load feeds the product and the sums."""
    rows = tl.arange(0, 64)
    acc = tl.zeros((64, 64), tl.float32)
    total = tl.zeros((64,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        tile = tl.load(x + rows[:, None] * K + k[None, :])
        acc = tl.dot(tile, tl.load(y + rows[:, None] * K + k[None, :]).T, acc)
        total += tl.sum(tile.to(tl.float32), 1)
    tl.store(out + rows[:, None] * 64 + rows[None, :], acc)
    tl.store(sums + rows, total)


@triton.jit
def product_of_sum_kernel(x, z, y, out, K: tl.constexpr, BLOCK: tl.constexpr):
    """(x + z) [64, K] @ y [64, K]^T: the left operand is computed in registers."""
    rows = tl.arange(0, 64)
    acc = tl.zeros((64, 64), tl.float32)
    for start in range(0, K, BLOCK):
        at = rows[:, None] * K + (start + tl.arange(0, BLOCK))[None, :]
        acc = tl.dot(tl.load(x + at) + tl.load(z + at), tl.load(y + at).T, acc)
    tl.store(out + rows[:, None] * 64 + rows[None, :], acc)


def launch_product_and_sums(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out, sums = x.new_empty(64, 64, dtype=torch.float32), x.new_empty(64, dtype=torch.float32)
    product_and_sums_kernel[(1,)](x, y, out, sums, x.shape[1], 64, num_warps=4, num_stages=3)
    return out


def launch_product_of_sum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(64, 64, dtype=torch.float32)
    product_of_sum_kernel[(1,)](x, x, y, out, x.shape[1], 64, num_warps=4, num_stages=3)
    return out
