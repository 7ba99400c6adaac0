"""The ranges of every token of uneven and packed chunks, looked up once in a table that all layers of a step share.

Edges are clamped to the tokens there are: a wrong edge on a device gives wrong numbers, never an access out of bounds.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from mirasol.kernels.attention.triton.ranges import causal_end, seeing_query_chunks, visible_key_chunks
from mirasol.kernels.attention.visibility import NO_WINDOW, Rule
from mirasol.kernels.core.launch import launch

_MOST_KEPT = 8
_kept: OrderedDict[Any, tuple[list[weakref.ref[torch.Tensor]], torch.Tensor]] = OrderedDict()


def visibility_table(
    side: Literal["rows", "columns"], n_q: int, n_k: int, rule: Rule, device: torch.device
) -> torch.Tensor:
    """Ranges of keys for every query [4, Nq], or of queries for every key [2, Nk]; int32, on `device`.

    A table is kept until PyTorch counts a new version of one of the rule's edges, or others crowd it out.
    """
    given = [t for t in rule.edges if t is not None]
    if not _may_keep(given, device):
        return _make(side, n_q, n_k, rule, device)
    versions = tuple([(id(t), t._version) if t is not None else None for t in rule.edges])
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    chunks = rule.q_chunk, rule.k_chunk, rule.window, rule.sinks, rule.causal
    key = side, n_q, n_k, versions, chunks, device, stream
    if key in _kept:
        owners, table = _kept[key]
        if all(owner() is t for owner, t in zip(owners, given, strict=True)):
            _kept.move_to_end(key)
            return table
    table = _make(side, n_q, n_k, rule, device)
    _kept[key] = [weakref.ref(t) for t in given], table
    if len(_kept) > _MOST_KEPT:
        _kept.popitem(last=False)
    return table


def _may_keep(edges: list[torch.Tensor], device: torch.device) -> bool:
    """Not where edges can change unseen: on the CPU others may hold their memory, in a graph they change by replay."""
    if device.type != "cuda":
        return False
    hidden = any(t.device.type == "cpu" or t.is_inference() for t in edges)
    return not hidden and not torch.cuda.is_current_stream_capturing()


def _make(side: str, n_q: int, n_k: int, rule: Rule, device: torch.device) -> torch.Tensor:
    q_edges, k_edges, cu_q, cu_k = (
        None if t is None else t.to(device, non_blocking=True).contiguous() for t in rule.edges
    )
    rows = side == "rows"
    n = n_q if rows else n_k
    table = torch.empty((4 if rows else 2, n), dtype=torch.int32, device=device)
    if n > 0:
        window = NO_WINDOW if rule.window is None else min(rule.window, NO_WINDOW)
        counts = [0 if t is None else t.shape[0] - 1 for t in (q_edges, k_edges, cu_q)]
        launch(
            attention_table_kernel,
            triton.cdiv(n, 128),
            (table, q_edges, k_edges, cu_q, cu_k),
            (n_q, n_k, max(rule.q_chunk, 1), max(rule.k_chunk, 1), *counts, window, min(rule.sinks, NO_WINDOW)),
            on=table,
            warps=4,
            ROWS=rows,
            CAUSAL=rule.causal,
            BLOCK=128,
        )
    return table


@triton.jit
def _edge(edges, at, last, n):
    """Edge number `at`, of 0..last, never beyond the n tokens."""
    return tl.minimum(tl.maximum(tl.load(edges + tl.minimum(tl.maximum(at, 0), last)), 0), n)


@triton.jit
def _edges_below(edges, value, last, n, INCLUSIVE: tl.constexpr):
    """How many of the edges 0..last lie below `value` (INCLUSIVE: or at it): a binary search."""
    low = value * 0
    high = low + last + 1
    size = last + 1
    while size > 0:
        middle = (low + high) // 2
        found = _edge(edges, middle, last, n)
        below = (found <= value) if INCLUSIVE else (found < value)
        open_ = low < high
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & (below == 0), middle, high)
        size = size // 2
    return low


@triton.jit
def _sequence_of(token, cu, sequences, n):
    """The packed sequence of a token."""
    s = token * 0
    if cu is not None:
        s = tl.minimum(tl.maximum(_edges_below(cu, token, sequences, n, True) - 1, 0), sequences - 1)
    return s


@triton.jit
def _side(s, cu, edges, chunk, count, sequences, n):
    """Chunks of sequence s: tokens [start, stop), the number of the first edge in `edges`, and how many chunks."""
    start, stop, base = s * 0, s * 0 + n, s * 0
    if cu is not None:
        start, stop = _edge(cu, s, sequences, n), _edge(cu, s + 1, sequences, n)
    if edges is None:
        chunks = tl.cdiv(tl.maximum(stop - start, 0), chunk)
    else:
        chunks = base + count
        if cu is not None:
            base = _edges_below(edges, start, count, n, False)
            chunks = _edges_below(edges, stop, count, n, False) - base
    return start, stop, base, chunks


@triton.jit
def _chunk_edge(index, start, stop, base, edges, chunk, count, n):
    """Token at which chunk `index` of a sequence begins, or where the last one ends."""
    if edges is None:
        found = tl.minimum(start + index * chunk, stop)
    else:
        found = _edge(edges, base + index, count, n)
    return found


@triton.jit
def _chunk_of(token, start, base, edges, chunk, count, n):
    """The chunk, in its sequence, that a token lies in."""
    if edges is None:
        found = (token - start) // chunk
    else:
        found = _edges_below(edges, token, count, n, True) - 1 - base
    return found


@triton.jit(
    do_not_specialize=["n_q", "n_k", "q_chunk", "k_chunk", "count_q", "count_k", "sequences", "window", "sinks"]
)
def attention_table_kernel(
    table, q_edges, k_edges, cu_q, cu_k, n_q, n_k, q_chunk, k_chunk, count_q, count_k, sequences, window, sinks,
    ROWS: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Ranges of BLOCK tokens: with ROWS table [4, Nq], what `row_ranges` returns of queries, else [2, Nk] of keys.

    q_edges [count_q + 1], k_edges [count_k + 1], cu_q and cu_k [sequences + 1]: int32, or None.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if ROWS:
        inside = token < n_q
        s = _sequence_of(token, cu_q, sequences, n_q)
    else:
        inside = token < n_k
        s = _sequence_of(token, cu_k, sequences, n_k)
    start_q, stop_q, base_q, chunks_q = _side(s, cu_q, q_edges, q_chunk, count_q, sequences, n_q)
    start_k, stop_k, base_k, chunks_k = _side(s, cu_k, k_edges, k_chunk, count_k, sequences, n_k)
    shift = chunks_k - chunks_q
    if ROWS:
        chunk = _chunk_of(token, start_q, base_q, q_edges, q_chunk, count_q, n_q)
        own = chunk + shift
        sink_end, low, high = visible_key_chunks(own, window, sinks)
        s1 = _chunk_edge(sink_end, start_k, stop_k, base_k, k_edges, k_chunk, count_k, n_k)
        k0 = _chunk_edge(low, start_k, stop_k, base_k, k_edges, k_chunk, count_k, n_k)
        k1 = _chunk_edge(high, start_k, stop_k, base_k, k_edges, k_chunk, count_k, n_k)
        if CAUSAL:
            end = _chunk_edge(chunk + 1, start_q, stop_q, base_q, q_edges, q_chunk, count_q, n_q)
            first = _chunk_edge(tl.maximum(own, 0), start_k, stop_k, base_k, k_edges, k_chunk, count_k, n_k)
            k1 = causal_end(k1, first, end - 1 - token)
        tl.store(table + token, start_k, mask=inside)
        tl.store(table + n_q + token, s1, mask=inside)
        tl.store(table + 2 * n_q + token, k0, mask=inside)
        tl.store(table + 3 * n_q + token, k1, mask=inside)
    else:
        chunk = _chunk_of(token, start_k, base_k, k_edges, k_chunk, count_k, n_k)
        own = chunk - shift
        first, last = seeing_query_chunks(own, chunk, window, sinks, chunks_q)
        q0 = _chunk_edge(first, start_q, stop_q, base_q, q_edges, q_chunk, count_q, n_q)
        q1 = _chunk_edge(last, start_q, stop_q, base_q, q_edges, q_chunk, count_q, n_q)
        if CAUSAL:
            end = _chunk_edge(chunk + 1, start_k, stop_k, base_k, k_edges, k_chunk, count_k, n_k)
            of_own = _chunk_edge(own + 1, start_q, stop_q, base_q, q_edges, q_chunk, count_q, n_q)
            later = causal_end(of_own - 1, q0, end - 1 - token)
            q0 = tl.where(own >= 0, later, q0)
        tl.store(table + token, q0, mask=inside)
        tl.store(table + n_k + token, tl.maximum(q0, q1), mask=inside)
