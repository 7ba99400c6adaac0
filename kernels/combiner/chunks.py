"""Which rows are the last m of a chunk. Even chunks need no index: their rows are a view."""

from __future__ import annotations

import torch


def last_m_index(boundaries: torch.Tensor, m: int) -> torch.Tensor:
    """Positions of the last m tokens of every chunk: boundaries [T+1] -> [T, m], int64, on the same device."""
    ends = boundaries[1:].long()
    return ends[:, None] + torch.arange(-m, 0, device=boundaries.device)


def take_last_m(x: torch.Tensor, m: int, boundaries: torch.Tensor | None) -> torch.Tensor:
    """[B, T, n, d], or [B, N, d] with boundaries [T+1] -> [B, T, m, d]; a view for even chunks."""
    if boundaries is None:
        return x.narrow(2, x.shape[2] - m, m)
    index = last_m_index(boundaries, m)
    return x.index_select(1, index.flatten()).unflatten(1, index.shape)
