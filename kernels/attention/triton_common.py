"""What the attention kernels share: which keys a row sees, which queries a key, and how tiles cover a range.

Rows are packed: row r is query r // GROUP under head r % GROUP of the GROUP query heads that share a key head. So one
tile serves all of them, and grouped heads need no loop of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Never specialised: a new length, chunk or batch compiles nothing.
LENGTHS = ["n_q", "n_k", "q_chunk", "k_chunk", "shift", "window", "sinks", "batch", "heads_k"]
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_ranges(i, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL: tl.constexpr, TABLE: tl.constexpr):
    """Keys [s0, s1) and [k0, k1) that query i sees; the two do not overlap. Rows beyond the last see what it sees."""
    i = tl.minimum(i, n_q - 1)
    if TABLE:
        s0 = tl.load(table + i)
        s1 = tl.load(table + n_q + i)
        k0 = tl.load(table + 2 * n_q + i)
        k1 = tl.load(table + 3 * n_q + i)
    else:
        c = i // q_chunk
        own = c + shift
        own0 = own * k_chunk
        k1 = tl.minimum(own0 + k_chunk, n_k)
        k0 = tl.maximum(own - window + 1, 0) * k_chunk
        s0 = i * 0
        s1 = tl.minimum(sinks * k_chunk, own0)
        touching = s1 >= k0
        k0 = tl.where(touching, 0, k0)
        s1 = tl.where(touching, 0, s1)
        if CAUSAL:
            before_end = tl.minimum((c + 1) * q_chunk, n_q) - 1 - i
            k1 = tl.maximum(k1 - before_end, own0)
        sees = own >= 0
        s1 = tl.where(sees, s1, 0)
        k0 = tl.where(sees, k0, 0)
        k1 = tl.where(sees, k1, 0)
    return s0, s1, k0, k1


@triton.jit
def tile_of_rows(
    first, last, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL: tl.constexpr, TABLE: tl.constexpr
):
    """What queries first..last see: sink keys [s0, s1), keys [low, high), and keys [begin, end) that all of them see.

    Both ends of both ranges grow with the query, so two queries tell: scalars, which take no vector registers, and
    loops over them need no care for threads that part.
    """
    s0, _, low, end = row_ranges(
        first, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, TABLE
    )  # fmt: skip
    _, s1, begin, high = row_ranges(
        last, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, TABLE
    )  # fmt: skip
    return s0, s1, low, high, begin, end


@triton.jit
def column_ranges(
    j, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL: tl.constexpr, TABLE: tl.constexpr
):
    """Queries [q0, q1) that see key j; keys beyond the last are seen by those that see it."""
    j = tl.minimum(j, n_k - 1)
    if TABLE:
        q0 = tl.load(table + j)
        q1 = tl.load(table + n_k + j)
    else:
        chunks = (n_q + q_chunk - 1) // q_chunk
        ck = j // k_chunk
        own = ck - shift  # query chunk; negative before the first
        q0 = tl.maximum(own, 0) * q_chunk
        q1 = tl.minimum(tl.minimum(tl.maximum(own + window, 0), chunks) * q_chunk, n_q)
        q1 = tl.where(ck < sinks, n_q, q1)
        if CAUSAL:
            before_end = tl.minimum((ck + 1) * k_chunk, n_k) - 1 - j
            later = tl.maximum(tl.minimum((own + 1) * q_chunk, n_q) - 1 - before_end, q0)
            q0 = tl.where(own >= 0, later, q0)
        q1 = tl.maximum(q0, q1)
    return q0, q1


@triton.jit
def tile_of_columns(
    n, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks,
    BN: tl.constexpr, CAUSAL: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Queries [low, high) that see some of the keys n .. n + BN - 1, and [begin, end) that see all of them.

    Both ends grow with the key, but for the second where the sinks of a sequence end.
    """
    if TABLE:  # of many sequences
        q0, q1 = column_ranges(
            n + tl.arange(0, BN), table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, TABLE
        )
        low, high, begin, end = tl.min(q0, 0), tl.max(q1, 0), tl.max(q0, 0), tl.min(q1, 0)
    else:
        last = n + BN - 1
        after_sinks = tl.minimum(tl.maximum(sinks * k_chunk, n), last)
        low, q1 = column_ranges(n, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, TABLE)
        begin, high = column_ranges(last, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, TABLE)
        _, end = column_ranges(after_sinks, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, TABLE)
        high, end = tl.maximum(high, q1), tl.minimum(end, q1)
    return low, high, begin, end


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in the dtype of acc."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


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
        start = n.to(tl.int64) * stride
        tile = load_rows(source + start, tl.arange(0, BN) * stride, inside, WIDTH, PADDED, MASKED)
    return tile


@triton.jit
def load_packed(
    source, b, hk, r, stride_h, stride_n, inside,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """[BM, PADDED] packed rows from row r: by the descriptor of [B, N, H, D], or from the pointer of the first head."""
    first = r // GROUP
    if TMA:
        tile = source.load([b, first, hk * GROUP, 0]).reshape([BM, PADDED])
    else:
        rows = r + tl.arange(0, BM)
        offsets = (rows // GROUP - first) * stride_n + (rows % GROUP) * stride_h
        tile = load_rows(source + first.to(tl.int64) * stride_n, offsets, inside, WIDTH, PADDED, MASKED)
    return tile


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
