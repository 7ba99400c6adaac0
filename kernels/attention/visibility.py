"""Who sees whom: the rule of `chunked_attention`, written once as arithmetic on chunk numbers.

A query chunk sees two ranges of key chunks, a key chunk is seen by one range of query chunks. numpy runs the three
functions below for eager code, FLOPs and cost models; `triton.ranges` compiles the same functions for the kernels, so
only `minimum`, `maximum`, `where` and operators may stand in them, and no types. The reference states the rule
independently.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy import maximum, minimum, where

from mirasol.kernels.core.checks import expect

NO_WINDOW = 2**30  # as many chunks as no sequence has


def visible_key_chunks(own, window, sinks):
    """The query chunk that is aligned with key chunk `own` sees key chunks [0, sink_end) and [low, high)."""
    high = maximum(own + 1, 0)
    low = minimum(maximum(high - window, 0), high)
    sink_end = minimum(sinks, low)
    low = where(sink_end < low, low, 0)
    sink_end = where(low > 0, sink_end, 0)
    return sink_end, low, high


def seeing_query_chunks(own, key_chunk, window, sinks, chunks):
    """Key chunk `key_chunk`, aligned with query chunk `own` of `chunks`, is seen by query chunks [first, last)."""
    first = minimum(maximum(own, 0), chunks)
    last = minimum(maximum(own + window, 0), chunks)
    last = where(key_chunk < sinks, chunks, last)
    return first, maximum(first, last)


def causal_end(end, first, before_end):
    """Where a row's keys end in its own chunk [first, end) if `before_end` rows of the chunk follow it."""
    return maximum(end - before_end, first)


Edges = tuple[int, ...]


@dataclass(frozen=True)
class Chunks:
    """The arguments of `chunked_attention` that decide who sees whom, as plain numbers (hashable).

    `q_chunk` and `k_chunk` are tokens a chunk, or the edges of uneven chunks; `cu_q` and `cu_k` the edges of packed
    sequences, None for one sequence.
    """

    n_q: int
    n_k: int
    q_chunk: int | Edges
    k_chunk: int | Edges
    window: int | None = None
    sinks: int = 0
    causal: bool = False
    cu_q: Edges | None = None
    cu_k: Edges | None = None


class Ranges(NamedTuple):
    """For every query chunk, int64 arrays of its tokens and of the keys that its rows see.

    Rows [q0, q1) see keys [s0, s1) (sinks; empty where they touch the rest) and [k0, k1), of which [own0, k1) are their
    own chunk. With `causal`, a row that e rows of its chunk follow sees its own chunk up to key max(k1 - e, own0).
    """

    q0: np.ndarray
    q1: np.ndarray
    s0: np.ndarray
    s1: np.ndarray
    k0: np.ndarray
    own0: np.ndarray
    k1: np.ndarray


@lru_cache(maxsize=256)
def ranges(chunks: Chunks) -> Ranges:
    """The two key ranges of every query chunk that holds rows, all sequences, in the order of the rows."""
    parts = [_sequence_ranges(chunks, q, k) for q, k in _sequences(chunks)]
    joined = np.concatenate(parts, axis=1) if parts else np.zeros((7, 0), np.int64)
    return Ranges(*joined[:, joined[1] > joined[0]])


def _sequence_ranges(chunks: Chunks, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """[7, Tq] of one sequence, whose chunks begin and end at the edges q [Tq + 1] and k [Tk + 1]."""
    own = np.arange(len(q) - 1) + len(k) - len(q)  # the last query chunk is the last key chunk
    window = NO_WINDOW if chunks.window is None else chunks.window
    sink_end, low, high = visible_key_chunks(own, window, chunks.sinks)
    first = np.full_like(own, k[0])
    return np.stack([q[:-1], q[1:], first, k[sink_end], k[low], k[maximum(own, 0)], k[high]])


def _sequences(chunks: Chunks) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Edges of the query chunks and of the key chunks of each packed sequence."""
    cu_q = (0, chunks.n_q) if chunks.cu_q is None else chunks.cu_q
    cu_k = (0, chunks.n_k) if chunks.cu_k is None else chunks.cu_k
    uneven_q, uneven_k = (
        None if isinstance(chunk, int) else np.asarray(chunk, np.int64) for chunk in (chunks.q_chunk, chunks.k_chunk)
    )
    packed = chunks.cu_q is not None
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        yield _edges_in(chunks.q_chunk, uneven_q, q0, q1, packed), _edges_in(chunks.k_chunk, uneven_k, k0, k1, packed)


def _edges_in(chunk: int | Edges, uneven: np.ndarray | None, start: int, stop: int, packed: bool) -> np.ndarray:
    """Edges of the chunks between two tokens; a chunk length that does not divide leaves a shorter last chunk."""
    if isinstance(chunk, int):
        return np.append(np.arange(start, stop, chunk), stop)
    assert uneven is not None
    if not packed:
        return uneven
    return uneven[np.searchsorted(uneven, start) : np.searchsorted(uneven, stop) + 1]


@lru_cache(maxsize=256)
def count_pairs(chunks: Chunks) -> int:
    """Visible (query, key) pairs."""
    r = ranges(chunks)
    rows = r.q1 - r.q0
    pairs = rows * (r.s1 - r.s0 + r.k1 - r.k0)
    if chunks.causal:  # the row that e rows follow does not see the last min(e, keys) keys of its own chunk
        keys, last = r.k1 - r.own0, rows - 1
        inside = minimum(last, keys)
        pairs = pairs - inside * (inside + 1) // 2 - maximum(last - keys, 0) * keys
    return int(pairs.sum())


class Rule(NamedTuple):
    """The same as the operators take them: tokens a chunk or int32 edges in its place, int32 borders of sequences."""

    q_chunk: int
    k_chunk: int
    q_edges: torch.Tensor | None
    k_edges: torch.Tensor | None
    cu_q: torch.Tensor | None
    cu_k: torch.Tensor | None
    window: int | None
    sinks: int
    causal: bool

    @property
    def edges(self) -> tuple[torch.Tensor | None, ...]:
        """What has to be looked up; all None for even chunks of one sequence."""
        return self[2:6]

    def read(self, n_q: int, n_k: int) -> Chunks:
        """As plain numbers, for Nq queries and Nk keys; waits for edges on a device.

        Raises:
            ValueError: edges that do not run from 0 to the number of tokens, that fall, or that cut a packed sequence
                inside a chunk.
        """
        cu_q, cu_k = _read("cu_seqlens_q", self.cu_q, n_q), _read("cu_seqlens_k", self.cu_k, n_k)
        q_chunk = self.q_chunk if self.q_edges is None else _uneven("q_chunk", self.q_edges, n_q, cu_q)
        k_chunk = self.k_chunk if self.k_edges is None else _uneven("k_chunk", self.k_edges, n_k, cu_k)
        return Chunks(n_q, n_k, q_chunk, k_chunk, self.window, self.sinks, self.causal, cu_q, cu_k)


def _read(name: str, value: torch.Tensor | None, n: int) -> Edges | None:
    if value is None:
        return None
    edges = tuple(value.tolist())
    expect(edges[0] == 0 and edges[-1] == n, name, f"run from 0 to {n} (the tokens)", edges)
    expect(all(a <= b for a, b in pairwise(edges)), name, "never fall", edges)
    return edges


def _uneven(name: str, value: torch.Tensor, n: int, packed: Edges | None) -> Edges:
    edges = _read(name, value, n)
    assert edges is not None
    if packed is not None:
        expect(len(set(edges)) == len(edges), name, "have no empty chunk where sequences are packed", edges)
        expect(set(packed) <= set(edges), name, f"have an edge at every sequence border {packed}", edges)
    return edges
