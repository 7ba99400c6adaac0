"""The specification of chunked attention: one dense mask, written out from the definition."""

from __future__ import annotations

from itertools import pairwise

import torch

from mirasol.kernels.attention.visibility import Rule
from mirasol.kernels.core.precision import accumulate_dtype


def chunked_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention under `visible_mask`: q [B, H, Nq, D], k and v [B, Hkv, Nk, D] -> out [B, H, Nq, D], lse [B, H, Nq].

    Computed in float32 (float64 for float64 inputs) and differentiable by plain autograd.
    """
    rule.read(q.shape[2], k.shape[2])  # refuses edges that do not fit
    q_chunk = rule.q_chunk if rule.q_edges is None else rule.q_edges
    k_chunk = rule.k_chunk if rule.k_edges is None else rule.k_edges
    mask = visible_mask(
        q.shape[2],
        k.shape[2],
        q_chunk=q_chunk,
        k_chunk=k_chunk,
        window=rule.window,
        sinks=rule.sinks,
        causal=rule.causal,
        cu_seqlens_q=rule.cu_q,
        cu_seqlens_k=rule.cu_k,
    ).to(q.device)
    acc = accumulate_dtype(q.dtype)
    groups = q.shape[1] // k.shape[1]
    k_all, v_all = k.to(acc).repeat_interleave(groups, 1), v.to(acc).repeat_interleave(groups, 1)
    scores = (q.to(acc) @ k_all.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    seen = mask.any(-1)
    scores = scores.masked_fill(~seen[:, None], 0.0)  # softmax of a row of -inf would be NaN
    weights = scores.softmax(-1).masked_fill(~seen[:, None], 0.0)
    lse = (
        scores.logsumexp(-1).masked_fill(~seen, float("-inf"))
        if k.shape[2]
        else scores.new_full(q.shape[:3], -torch.inf)
    )
    return (weights @ v_all).to(q.dtype), lse


def visible_mask(
    n_q: int,
    n_k: int,
    *,
    q_chunk: int | torch.Tensor,
    k_chunk: int | torch.Tensor | None = None,
    window: int | None = None,
    sinks: int = 0,
    causal: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
) -> torch.Tensor:
    """[Nq, Nk] bool, True where query i sees key j: the rule of `chunked_attention`, token by token."""
    seq_q, cq, before_end_q, chunks_q = _places(n_q, q_chunk, cu_seqlens_q)
    k_chunk = q_chunk if k_chunk is None else k_chunk
    seq_k, ck, before_end_k, chunks_k = _places(n_k, k_chunk, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k)
    shift = chunks_k - chunks_q  # per sequence: the last query chunk is the last key chunk
    cq = (cq + shift[seq_q])[:, None]
    ck = ck[None, :]
    visible = ck <= cq
    if window is not None:
        visible &= (ck > cq - window) | (ck < sinks)
    if causal:
        visible &= (ck < cq) | (before_end_k[None, :] >= before_end_q[:, None])
    return visible & (seq_q[:, None] == seq_k[None, :])


def _places(
    n: int, chunk: int | torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per token: sequence, chunk in the sequence, tokens before the end of the chunk. Per sequence: its chunks."""
    borders = [0, n] if cu_seqlens is None else cu_seqlens.tolist()
    edges_given = None if isinstance(chunk, int) else chunk.tolist()
    sequence, index, before_end, chunks = [], [], [], []
    for s, (start, stop) in enumerate(pairwise(borders)):
        if isinstance(chunk, int):
            edges = [*range(start, stop, chunk), stop]
        else:
            assert edges_given is not None
            edges = [e for e in edges_given if start <= e <= stop]
        chunks.append(len(edges) - 1)
        for c, (a, b) in enumerate(pairwise(edges)):
            for token in range(a, b):
                sequence.append(s)
                index.append(c)
                before_end.append(b - 1 - token)
    as_long = [torch.tensor(values, dtype=torch.long) for values in (sequence, index, before_end, chunks)]
    return as_long[0], as_long[1], as_long[2], as_long[3]
