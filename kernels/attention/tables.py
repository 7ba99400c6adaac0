"""Visibility of uneven and packed chunks as integer tables, made on the device without waiting for it.

The same arithmetic as `layout`, for all tokens at once: what a Triton program cannot compute from two integers it
reads here. Edges are not checked: their values never leave the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class _Side:
    """Chunks of the queries or of the keys: S sequences packed along n tokens, chunks counted in each sequence."""

    n: int
    chunk: int
    edges: torch.Tensor | None
    borders: torch.Tensor  # [S + 1]

    @property
    def starts(self) -> torch.Tensor:
        return self.borders[:-1]

    def firsts(self) -> torch.Tensor:
        """[S + 1] index of the first edge of every sequence in `edges`."""
        assert self.edges is not None
        first = torch.searchsorted(self.edges, self.borders, right=False)
        first[-1] = self.edges.shape[0] - 1  # empty chunks at the end count
        first[0] = 0
        return first

    def chunks(self) -> torch.Tensor:
        """[S] chunks of every sequence."""
        if self.edges is not None:
            return self.firsts().diff()
        return (self.borders.diff() + self.chunk - 1) // self.chunk

    def edge(self, sequence: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Token at which chunk `index` of `sequence` begins; an index beyond the last chunk gives the end."""
        if self.edges is None:
            return torch.minimum(self.starts[sequence] + index * self.chunk, self.borders[sequence + 1])
        firsts = self.firsts()
        return self.edges[torch.minimum(firsts[sequence] + index, firsts[sequence + 1])]

    def places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[n] each: token, its sequence, its chunk in the sequence."""
        token = torch.arange(self.n, device=self.borders.device)
        sequence = torch.searchsorted(self.borders, token, right=True) - 1
        if self.edges is None:
            return token, sequence, (token - self.starts[sequence]) // self.chunk
        chunk = torch.searchsorted(self.edges, token, right=True) - 1
        return token, sequence, chunk - self.firsts()[sequence]


def visibility_tables(
    n_q: int,
    n_k: int,
    q_chunk: int,
    k_chunk: int,
    q_edges: torch.Tensor | None,
    k_edges: torch.Tensor | None,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    window: int | None,
    sinks: int,
    causal: bool,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranges of keys for every query, and of queries for every key.

    Returns:
        rows: [4, Nq] int32: query i sees keys [rows[0, i], rows[1, i]) (sinks) and [rows[2, i], rows[3, i]).
        columns: [2, Nk] int32: key j is seen by queries [columns[0, j], columns[1, j]).
    """
    queries = _Side(n_q, q_chunk, _long(q_edges, device), _borders(cu_q, n_q, device))
    keys = _Side(n_k, k_chunk, _long(k_edges, device), _borders(cu_k, n_k, device))
    shift = keys.chunks() - queries.chunks()
    rows = _rows(queries, keys, shift, window, sinks, causal)
    columns = _columns(queries, keys, shift, window, sinks, causal)
    return rows.to(torch.int32).contiguous(), columns.to(torch.int32).contiguous()


def _rows(
    queries: _Side, keys: _Side, shift: torch.Tensor, window: int | None, sinks: int, causal: bool
) -> torch.Tensor:
    token, s, c = queries.places()
    own = c + shift[s]
    sees = own >= 0
    own = own.clamp(min=0)
    first, own0, end = keys.starts[s], keys.edge(s, own), keys.edge(s, own + 1)
    low = torch.zeros_like(own) if window is None else (own - window + 1).clamp(min=0)
    k0 = keys.edge(s, low)
    s1 = torch.minimum(keys.edge(s, torch.full_like(own, sinks)), own0)
    touching = s1 >= k0
    k0, s1 = torch.where(touching, first, k0), torch.where(touching, first, s1)
    if causal:
        end = torch.maximum(end - (queries.edge(s, c + 1) - 1 - token), own0)
    table = torch.stack([first, s1, k0, end])
    return torch.where(sees, table, first)


def _columns(
    queries: _Side, keys: _Side, shift: torch.Tensor, window: int | None, sinks: int, causal: bool
) -> torch.Tensor:
    token, s, c = keys.places()
    own = c - shift[s]  # negative for keys before the first query chunk
    q0 = queries.edge(s, own.clamp(min=0))
    last = queries.borders[s + 1]
    q1 = last if window is None else queries.edge(s, (own + window).clamp(min=0))
    q1 = torch.where(c < sinks, last, q1)
    if causal:
        before_end = keys.edge(s, c + 1) - 1 - token
        later = torch.maximum(queries.edge(s, (own + 1).clamp(min=0)) - 1 - before_end, q0)
        q0 = torch.where(own >= 0, later, q0)
    return torch.stack([q0, torch.maximum(q0, q1)])


def _long(edges: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if edges is None else edges.to(device=device, dtype=torch.long, non_blocking=True)


def _borders(cu: torch.Tensor | None, n: int, device: torch.device) -> torch.Tensor:
    whole = torch.arange(2, device=device) * n if cu is None else _long(cu, device)
    assert whole is not None
    return whole
