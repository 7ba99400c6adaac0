"""What the attention kernels share: loads and stores of rows, and in which order tiles are taken.

Rows are packed: row r is query r // GROUP under head r % GROUP of the GROUP query heads that share a key head. So one
tile serves all of them, and grouped heads need no loop of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Never specialised: a new length, chunk or batch compiles nothing.
LENGTHS = ["n_q", "n_k", "q_chunk", "k_chunk", "shift", "window", "sinks", "batch", "heads_k"]


@triton.jit
def load_rows(base, offsets, mask, WIDTH: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """[rows, PADDED] at row `offsets` from `base`; zero where `mask` is False (if MASKED) and beyond WIDTH columns."""
    cols = tl.arange(0, PADDED)
    pointers = base + (offsets[:, None] + cols[None, :])
    if MASKED:
        if WIDTH != PADDED:
            return tl.load(pointers, mask=mask[:, None] & (cols < WIDTH)[None, :], other=0.0)
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    if WIDTH != PADDED:
        return tl.load(pointers, mask=(cols < WIDTH)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_keys(
    source, b, hk, n, stride, inside,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[BN, PADDED] keys or values from token n: by the descriptor of [B, Hkv, N, D], or from the head's pointer."""
    if TMA:
        tile = source.load([b, hk, n, 0]).reshape([BN, PADDED])
    else:
        offsets = (n + tl.arange(0, BN)).to(tl.int64) * stride
        tile = load_rows(source, offsets, inside, WIDTH, PADDED, MASKED)
    return tile


@triton.jit
def load_packed(
    source, b, hk, r, stride_h, stride_n, inside,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """[BM, PADDED] packed rows from row r: by a descriptor, or from the pointer of the first head.

    The descriptor is of [B, N, H, D]; where heads are not grouped, of [B, H, N, D] as that of keys.
    """
    if TMA:
        if GROUP == 1:
            tile = source.load([b, hk, r, 0]).reshape([BM, PADDED])
        else:
            tile = source.load([b, r // GROUP, hk * GROUP, 0]).reshape([BM, PADDED])
    else:
        offsets = packed_offsets(r + tl.arange(0, BM), stride_h, stride_n, GROUP)
        tile = load_rows(source, offsets, inside, WIDTH, PADDED, MASKED)
    return tile


@triton.jit
def halved_row(tile, ROWS: tl.constexpr):
    """tile * ROWS, where descriptors load a tile whose halves two groups of warps take.

    For the second group the compiler adds half a tile to this number, and to whatever it finds to be the same one. So
    it is made by way of int64, unlike all others.
    """
    return (tile.to(tl.int64) * ROWS).to(tl.int32)


@triton.jit
def packed_offsets(rows, stride_h, stride_n, GROUP: tl.constexpr):
    """Where packed rows lie behind the first of their heads."""
    return (rows // GROUP).to(tl.int64) * stride_n + (rows % GROUP).to(tl.int64) * stride_h


@triton.jit
def head(pointer, b, h, stride_b, stride_h):
    """Where head h of batch element b begins."""
    return pointer + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def store_rows(base, offsets, mask, value, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Store [rows, PADDED] at row `offsets` from `base`, where `mask` is True, WIDTH columns of it."""
    cols = tl.arange(0, PADDED)
    pointers = base + (offsets[:, None] + cols[None, :])
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask[:, None] & (cols < WIDTH)[None, :])


@triton.jit
def tile_order(pid, tiles, batch_heads, NEIGHBOURS: tl.constexpr):
    """(batch and head, tile) of a program: the last tiles first, as they see most; a few neighbours share a head."""
    group = pid // (NEIGHBOURS * batch_heads)
    first = group * NEIGHBOURS
    width = tl.minimum(tiles - first, NEIGHBOURS)
    rest = pid - first * batch_heads
    return rest // width, tiles - 1 - first - rest % width


@triton.jit
def full_range(begin, end, high, BLOCK: tl.constexpr, MASKS: tl.constexpr):
    """The tiles of [begin, end) that need no mask: (where they begin, how many).

    None where MASKS is "all" or no whole tile fits; they then begin at `high`, so that all is left of them.
    """
    if MASKS == "all":
        begin, count = high, high * 0
    else:
        count = tl.maximum(end - begin, 0) // BLOCK
        begin = tl.where(count > 0, begin, high)
    return begin, count


@triton.jit
def share(count):
    """Which of `count` tiles belong to this program, of those along the grid's second axis: from, below."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    return count * split // splits, count * (split + 1) // splits
