"""What the erase-add kernels share: lengths, normalised rows, and the vectors of a slot."""

from __future__ import annotations

import triton
import triton.language as tl

from mirasol.kernels.ttm.triton_common import load_tile

# Never specialised: a new number of memory tokens or a new batch compiles nothing.
LENGTHS = [
    "n_memory",
    "n_outputs",
    "tiles",
    "items",
    "blocks",
    "parts",
    "splits",
    "parts_select",
    "parts_split",
    "parts_program",
]


@triton.jit
def either(network, ERASE: tl.constexpr, ADD: tl.constexpr):
    """A width of the network at hand, 0 erases and 1 adds; a constant where both are alike."""
    if ERASE == ADD:
        return ERASE
    return tl.where(network == 0, ERASE, ADD)


@triton.jit
def append(vectors, more):
    """A tuple with one more entry: Triton adds tuples, it does not unpack them."""
    return vectors + (more,)  # noqa: RUF005


@triton.jit
def norm_statistics(rows, inside, eps, D: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr):
    """Mean and 1 / deviation of rows of D numbers, BK at a time; `rows` are pointers [BP, 1]."""
    mean = tl.zeros((BP,), ACC)
    squares = tl.zeros((BP,), ACC)
    for start in tl.range(0, D, BK):
        columns = start + tl.arange(0, BK)
        v = load_tile(rows, columns, inside, D, BK).to(ACC)
        part = tl.minimum(D - start, BK).to(ACC)
        part_mean = tl.sum(v, 1) / part
        centred = tl.where((columns < D)[None, :], v - part_mean[:, None], 0.0)
        step = part_mean - mean
        squares += tl.sum(centred * centred, 1) + step * step * (start * part / (start + part))
        mean += step * (part / (start + part))
    return mean, 1.0 / tl.sqrt(squares / D + eps)


@triton.jit
def normalised_columns(
    outputs, means, rstds, columns, row, item, batch, stride, n_memory,
    D: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x [columns, rows] of the normalised outputs of one item, before weight and bias; zero in rows beyond R."""
    at = outputs + item * batch + (row * stride)[None, :] + columns[:, None]
    v = tl.load(at, mask=(row < R)[None, :] & (columns < D)[:, None], other=0.0).to(ACC)
    place = item * (n_memory + R) + n_memory
    mean = tl.load(means + place + row, mask=row < R, other=0.0)
    rstd = tl.load(rstds + place + row, mask=row < R, other=0.0)
    return (v - mean[None, :]) * rstd[None, :]


@triton.jit
def erased(weights, slots, slot, token, inside, columns, items, item, n_memory, S: tl.constexpr, D: tl.constexpr):
    """w_i e_i [tokens, columns] of one slot: what its factor 1 - w_i e_i takes away."""
    w = tl.load(weights + (item * S + slot) * n_memory + token, mask=inside, other=0.0)
    e = tl.load(slots + (item * S + slot) * D + columns, mask=columns < D, other=0.0)
    return w[:, None] * e[None, :]
