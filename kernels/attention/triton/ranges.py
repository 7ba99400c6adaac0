"""Which keys a row sees and which rows a key, for a tile of either: the rule of `visibility`, compiled.

Even chunks of one sequence need arithmetic only; uneven and packed ones are read from the table that `table` makes.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import triton
import triton.language as tl

from mirasol.kernels.attention import visibility


@triton.jit
def _minimum(a, b):
    return tl.minimum(a, b)


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _where(condition, a, b):
    return tl.where(condition, a, b)


def _compiled(rule: Any) -> Any:
    """A function of `visibility` for kernels: the same code, with Triton's minimum, maximum and where for numpy's."""
    names = {"minimum": _minimum, "maximum": _maximum, "where": _where, "tl": tl, "__name__": __name__}
    return triton.jit(FunctionType(rule.__code__, names, rule.__name__))


visible_key_chunks = _compiled(visibility.visible_key_chunks)
seeing_query_chunks = _compiled(visibility.seeing_query_chunks)
causal_end = _compiled(visibility.causal_end)


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
        chunk = i // q_chunk
        own = chunk + shift
        sink_end, low, high = visible_key_chunks(own, window, sinks)
        s0, s1 = i * 0, sink_end * k_chunk
        k0, k1 = low * k_chunk, tl.minimum(high * k_chunk, n_k)
        if CAUSAL:
            before_end = tl.minimum((chunk + 1) * q_chunk, n_q) - 1 - i
            k1 = causal_end(k1, tl.maximum(own, 0) * k_chunk, before_end)
    return s0, s1, k0, k1


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
        chunk = j // k_chunk
        own = chunk - shift
        first, last = seeing_query_chunks(own, chunk, window, sinks, tl.cdiv(n_q, q_chunk))
        q0, q1 = tl.minimum(first * q_chunk, n_q), tl.minimum(last * q_chunk, n_q)
        if CAUSAL:
            before_end = tl.minimum((chunk + 1) * k_chunk, n_k) - 1 - j
            later = causal_end(tl.minimum((own + 1) * q_chunk, n_q) - 1, q0, before_end)
            q0 = tl.where(own >= 0, later, q0)
    return q0, q1


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
