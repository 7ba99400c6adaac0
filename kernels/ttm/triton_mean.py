"""Means over windows of the tokens where they lie: kernels and launches of `ops.ttm_mean`.

Window i of k over `total` tokens holds tokens floor(i total / k) to ceil((i + 1) total / k) - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from mirasol.kernels.core.device import on_device
from mirasol.kernels.core.precision import accumulate_dtype
from mirasol.kernels.ttm.triton_common import load_tokens, pick, tile_of

ROWS = 16  # tokens, or windows, read at a time
LENGTHS = ["n_a", "n_b", "n_c", "offset_a", "offset_b", "offset_c", "total", "k"]


@triton.jit
def first_token(window, total, k):
    """floor(window total / k), with no product above k^2."""
    return window * (total // k) + window * (total % k) // k


@triton.jit
def end_token(window, total, k):
    """One past the window's last token: ceil((window + 1) total / k)."""
    return (window + 1) * (total // k) + tl.cdiv((window + 1) * (total % k), k)


@triton.jit
def sum_of_source(
    v, places, n, offset, start, end, stride_row, columns, acc, D: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr
):
    """acc [BD] plus the tokens of one source that lie in [start, end)."""
    for first in tl.range(tl.maximum(start - offset, 0), tl.minimum(end - offset, n), BP):
        token = first + tl.arange(0, BP)
        inside = token < tl.minimum(end - offset, n)
        at = None
        if places is not None:
            at = places + (token * D)[:, None]
        acc += tl.sum(load_tokens(v + (token * stride_row)[:, None], at, columns, inside, D, BD).to(acc.dtype), 0)
    return acc


@triton.jit(do_not_specialize=LENGTHS)
def mean_fwd_kernel(
    a, b, c, places_a, places_b, places_c, carry, out,
    n_a, n_b, n_c, offset_a, offset_b, offset_c, total, k,
    batch_a, batch_b, batch_c, row_a, row_b, row_c, carry_batch, carry_row,
    D: tl.constexpr, SOURCES: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Columns BD of one window: the sum of its tokens in the sources over its whole length, plus the carry."""
    item = tl.program_id(2).to(tl.int64)
    window = tl.program_id(0)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    start, end = first_token(window, total, k), end_token(window, total, k)
    acc = tl.zeros((BD,), ACC)
    acc = sum_of_source(a + item * batch_a, places_a, n_a, offset_a, start, end, row_a, columns, acc, D, BP, BD)
    if SOURCES > 1:
        acc = sum_of_source(b + item * batch_b, places_b, n_b, offset_b, start, end, row_b, columns, acc, D, BP, BD)
    if SOURCES > 2:
        acc = sum_of_source(c + item * batch_c, places_c, n_c, offset_c, start, end, row_c, columns, acc, D, BP, BD)
    acc = acc / (end - start).to(ACC)
    own = columns < D
    if carry is not None:
        acc += tl.load(carry + item * carry_batch + window * carry_row + columns, mask=own, other=0.0).to(ACC)
    tl.store(out + (item * k + window) * D + columns, acc.to(out.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=LENGTHS)
def mean_bwd_kernel(
    grad, grad_a, grad_b, grad_c,
    n_a, n_b, n_c, offset_a, offset_b, offset_c, total, k, batch, row,
    D: tl.constexpr, SOURCES: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Columns BD of the gradient of BP tokens: over the windows that hold a token, gradient / length."""
    item = tl.program_id(2).to(tl.int64)
    source, first, count, _ = tile_of(tl.program_id(0), n_a, n_b, n_c, BP, SOURCES)
    token = first + tl.arange(0, BP)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    own = columns < D
    offset = pick(source, offset_a, offset_b, offset_c, SOURCES)
    last = tl.minimum(first + BP, count) - 1 + offset
    low = ((first + offset).to(tl.int64) * k // total).to(tl.int32)
    high = tl.minimum(((last + 1).to(tl.int64) * k + total - 1) // total, k).to(tl.int32)
    acc = tl.zeros((BP, BD), ACC)
    for window in tl.range(low, high):
        start, end = first_token(window, total, k), end_token(window, total, k)
        holds = (token + offset >= start) & (token + offset < end)
        value = tl.load(grad + item * batch + window * row + columns, mask=own, other=0.0).to(ACC)
        acc += tl.where(holds, 1.0 / (end - start).to(ACC), 0.0)[:, None] * value[None, :]
    target = pick(source, grad_a, grad_b, grad_c, SOURCES) + (item * count + token)[:, None] * D + columns[None, :]
    tl.store(target, acc.to(target.dtype.element_ty), mask=(token < count)[:, None] & own[None, :])


def forward(
    sources: Sequence[torch.Tensor],
    positions: Sequence[torch.Tensor],
    carry: torch.Tensor | None,
    offsets: Sequence[int],
    total: int,
    k: int,
) -> torch.Tensor:
    """As `ops.ttm_mean`. Strides are taken as they are; a last dimension that is not contiguous costs a copy."""
    sources = [v if v.stride(-1) == 1 else v.contiguous() for v in sources]
    positions = [place.contiguous() for place in positions]
    if carry is not None and carry.stride(-1) != 1:
        carry = carry.contiguous()
    first = sources[0]
    batch, _, d = first.shape
    out = first.new_empty(batch, k, d)
    columns = _columns(d)
    given = _three(sources)
    with on_device(first):
        mean_fwd_kernel[(k, triton.cdiv(d, columns), batch)](
            *given, *_three(positions), carry, out, *_three([v.shape[1] for v in sources], 0), *_three(offsets, 0),
            total, k, *(0 if v is None else v.stride(dim) for dim in (0, 1) for v in given),
            *((0, 0) if carry is None else carry.stride()[:2]),
            D=d, SOURCES=len(sources), BP=ROWS, BD=columns, ACC=_acc(first), num_warps=4,
        )  # fmt: skip
    return out


def backward(
    grad: torch.Tensor, sizes: Sequence[int], offsets: Sequence[int], total: int, k: int
) -> list[torch.Tensor]:
    """As `ops.ttm_mean_backward`."""
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    batch, _, d = grad.shape
    grads = [grad.new_empty(batch, size, d) for size in sizes]
    columns = _columns(d)
    tiles = sum(triton.cdiv(size, ROWS) for size in sizes)
    with on_device(grad):
        mean_bwd_kernel[(tiles, triton.cdiv(d, columns), batch)](
            grad, *_three(grads), *_three(sizes, 0), *_three(offsets, 0), total, k, *grad.stride()[:2],
            D=d, SOURCES=len(sizes), BP=ROWS, BD=columns, ACC=_acc(grad), num_warps=4,
        )  # fmt: skip
    return grads


def _columns(d: int) -> int:
    return min(256, max(16, triton.next_power_of_2(d)))


def _acc(like: torch.Tensor) -> tl.dtype:
    return tl.float64 if accumulate_dtype(like.dtype) == torch.float64 else tl.float32


def _three(given: Sequence[Any], missing: Any = None) -> tuple[Any, Any, Any]:
    a, b, c = [*given, missing, missing, missing][:3]
    return a, b, c
