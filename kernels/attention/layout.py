"""Which keys a query sees, as integer arithmetic: the one place where chunks become ranges of rows and keys.

Eager code, FLOP formulas, cost models and the tables of the Triton kernels all read it; nothing here touches a device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

from mirasol.kernels.core.checks import expect

Edges = tuple[int, ...]


class Run(NamedTuple):
    """Neighbouring query rows that see the same keys, or one key more from row to row.

    Row i of [q0, q1) sees keys [s0, s1) (sink chunks, empty where they touch the rest) and [k0, end), where end is k1
    if not `causal`, else k1 - (q1 - 1 - i): the last row sees up to k1, every earlier row one key less.
    """

    q0: int
    q1: int
    s0: int
    s1: int
    k0: int
    k1: int
    causal: bool

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of the run."""
        rows = self.q1 - self.q0
        hidden = rows * (rows - 1) // 2 if self.causal else 0
        return rows * (self.s1 - self.s0 + self.k1 - self.k0) - hidden


@dataclass(frozen=True)
class Layout:
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

    def canonical(self) -> Layout:
        """Token-causal attention is one chunk that is causal inside: fewer, larger runs for the same visibility."""
        if self.q_chunk == 1 and self.k_chunk == 1 and self.window is None:
            return replace(self, q_chunk=max(self.n_q, 1), k_chunk=max(self.n_k, 1), sinks=0, causal=True)
        return self

    def sequences(self) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        """Edges of the query chunks and of the key chunks of each packed sequence."""
        if self.cu_q is None or self.cu_k is None:
            whole_q = self.q_chunk if isinstance(self.q_chunk, tuple) else _chunk_edges(self.q_chunk, 0, self.n_q)
            whole_k = self.k_chunk if isinstance(self.k_chunk, tuple) else _chunk_edges(self.k_chunk, 0, self.n_k)
            yield whole_q, whole_k
            return
        for (q0, q1), (k0, k1) in zip(pairwise(self.cu_q), pairwise(self.cu_k), strict=True):
            yield _chunk_edges(self.q_chunk, q0, q1), _chunk_edges(self.k_chunk, k0, k1)


def _chunk_edges(chunk: int | Edges, start: int, stop: int) -> Sequence[int]:
    """Edges of the chunks between two tokens; a chunk length that does not divide leaves a shorter last chunk."""
    if isinstance(chunk, int):
        return [*range(start, stop, chunk), stop]
    return chunk[bisect_left(chunk, start) : bisect_left(chunk, stop) + 1]


def runs(layout: Layout) -> tuple[Run, ...]:
    """All query rows in order, as runs; rows that see nothing have empty ranges."""
    return _runs(layout.canonical())


@lru_cache(maxsize=1024)
def _runs(layout: Layout) -> tuple[Run, ...]:
    return tuple(run for q, k in layout.sequences() for run in _sequence_runs(layout, q, k) if run.q1 > run.q0)


def _sequence_runs(layout: Layout, q: Sequence[int], k: Sequence[int]) -> Iterator[Run]:
    first, chunks = k[0], len(k) - 1
    shift = chunks - (len(q) - 1)  # chunks are aligned at the end: the last query chunk is the last key chunk
    sink_end = k[min(layout.sinks, chunks)]
    for c in range(len(q) - 1):
        own = c + shift
        q0, q1 = q[c], q[c + 1]
        if own < 0:
            yield Run(q0, q1, first, first, first, first, False)
            continue
        low = 0 if layout.window is None else max(0, own - layout.window + 1)
        k0, own0, k1 = k[low], k[own], k[own + 1]
        s0, s1 = first, min(sink_end, own0)
        if s1 >= k0:
            k0, s1 = s0, s0
        if not layout.causal:
            yield Run(q0, q1, s0, s1, k0, k1, False)
            continue
        blind = max(0, (q1 - q0) - (k1 - own0))  # rows before the first key of their own chunk
        if blind:
            yield Run(q0, q0 + blind, s0, s1, k0, own0, False)
        yield Run(q0 + blind, q1, s0, s1, k0, k1, q1 - q0 - blind > 1)


def visible_pairs(
    n_q: int,
    n_k: int,
    *,
    q_chunk: int | torch.Tensor | Sequence[int],
    k_chunk: int | torch.Tensor | Sequence[int] | None = None,
    window: int | None = None,
    sinks: int = 0,
    causal: bool = False,
    cu_seqlens_q: torch.Tensor | Sequence[int] | None = None,
    cu_seqlens_k: torch.Tensor | Sequence[int] | None = None,
) -> int:
    """The exact number of (query, key) pairs that `chunked_attention` with these arguments computes, per head.

    Args:
        n_q, n_k: queries and keys, Nq and Nk.
        q_chunk, k_chunk, window, sinks, causal, cu_seqlens_q, cu_seqlens_k: as in `chunked_attention`; edges may also
            be given as plain ints.
    Returns:
        A plain int. Forward costs `4 * pairs * D` floating-point operations a head, backward 2.5 times that.
    """
    layout = make_layout(n_q, n_k, q_chunk, k_chunk, window, sinks, causal, cu_seqlens_q, cu_seqlens_k)
    return count_pairs(layout)


def count_pairs(layout: Layout) -> int:
    """Visible (query, key) pairs of a layout."""
    return sum(run.pairs for run in runs(layout))


def make_layout(
    n_q: int,
    n_k: int,
    q_chunk: int | torch.Tensor | Sequence[int],
    k_chunk: int | torch.Tensor | Sequence[int] | None,
    window: int | None,
    sinks: int,
    causal: bool,
    cu_q: torch.Tensor | Sequence[int] | None,
    cu_k: torch.Tensor | Sequence[int] | None,
) -> Layout:
    """Read the arguments of `chunked_attention` into plain numbers and check the values of boundary tensors.

    Raises:
        ValueError: edges that do not run from 0 to the number of tokens, that fall, or that cut a packed sequence
            inside a chunk; packed queries and keys with different numbers of sequences.
    """
    k_chunk = q_chunk if k_chunk is None else k_chunk
    cu_k = cu_q if cu_k is None else cu_k
    edges_q, edges_k = _edges("cu_seqlens_q", cu_q, n_q), _edges("cu_seqlens_k", cu_k, n_k)
    if edges_q is not None and edges_k is not None:
        expect(len(edges_q) == len(edges_k), "cu_seqlens_k", f"hold {len(edges_q)} edges like cu_seqlens_q", cu_k)
    return Layout(
        n_q=n_q,
        n_k=n_k,
        q_chunk=_chunk("q_chunk", q_chunk, n_q, edges_q),
        k_chunk=_chunk("k_chunk", k_chunk, n_k, edges_k),
        window=window,
        sinks=sinks,
        causal=causal,
        cu_q=edges_q,
        cu_k=edges_k,
    )


def _edges(name: str, value: torch.Tensor | Sequence[int] | None, n: int) -> Edges | None:
    if value is None:
        return None
    edges = tuple(value.tolist() if isinstance(value, torch.Tensor) else value)
    expect(len(edges) >= 2 and edges[0] == 0 and edges[-1] == n, name, f"run from 0 to {n} (the tokens)", edges)
    rising = all(a <= b for a, b in pairwise(edges))
    expect(rising, name, "never fall", edges)
    return edges


def _chunk(name: str, value: int | torch.Tensor | Sequence[int], n: int, packed: Edges | None) -> int | Edges:
    if isinstance(value, int):
        return value
    edges = _edges(name, value, n)
    assert edges is not None
    if packed is not None:
        expect(len(set(edges)) == len(edges), name, "have no empty chunk where sequences are packed", edges)
        expect(set(packed) <= set(edges), name, f"have an edge at every sequence border {packed}", edges)
    return edges
