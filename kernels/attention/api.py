"""Public functions of chunked attention."""

from __future__ import annotations

from typing import Literal, overload

import torch

from mirasol.kernels.attention.configs import MOST_WIDTH
from mirasol.kernels.attention.eager import merge_partials
from mirasol.kernels.attention.ops import ChunkedAttention
from mirasol.kernels.attention.reference import chunked_attention_reference
from mirasol.kernels.core.checks import expect, expect_int, expect_number, expect_shape, expect_tensor
from mirasol.kernels.core.device import triton_refusals
from mirasol.kernels.core.dispatch import Backend, autocast, choose_backend


@overload
def chunked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_chunk: int | torch.Tensor,
    k_chunk: int | torch.Tensor | None = ...,
    window: int | None = ...,
    sinks: int = ...,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    cu_seqlens_q: torch.Tensor | None = ...,
    cu_seqlens_k: torch.Tensor | None = ...,
    backend: Backend = ...,
) -> torch.Tensor: ...


@overload
def chunked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_chunk: int | torch.Tensor,
    k_chunk: int | torch.Tensor | None = ...,
    window: int | None = ...,
    sinks: int = ...,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    cu_seqlens_q: torch.Tensor | None = ...,
    cu_seqlens_k: torch.Tensor | None = ...,
    backend: Backend = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def chunked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_chunk: int | torch.Tensor,
    k_chunk: int | torch.Tensor | None = None,
    window: int | None = None,
    sinks: int = 0,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in which a token sees its own chunk and earlier ones: all of them, or a window and the first few.

    Query chunks and key chunks are aligned at the end: the last query chunk is the last key chunk, so a decode step
    passes its own queries and the whole cache. Key j is visible to query i if, with cq and ck their chunks,
    `ck <= cq` and (`window` is None or `ck > cq - window` or `ck < sinks`). Special cases: `q_chunk = n`
    chunk-causal; `q_chunk = m, k_chunk = n` the last m rows of each chunk of n; `q_chunk = 1` causal; one chunk full;
    `window=1` each chunk alone. A row that sees nothing has out 0, lse -inf and gradients 0.

    Args:
        q: [B, H, Nq, D], float32, bfloat16, float16 or float64, any strides.
        k, v: [B, Hkv, Nk, D], dtype of q; H is a multiple of Hkv and head h reads key head h // (H / Hkv).
        q_chunk: tokens a chunk, counted from the first query; a last chunk may be shorter. Or an int32 tensor [Tq + 1]
            of edges from 0 to Nq, for chunks of any lengths.
        k_chunk: likewise for keys; None means `q_chunk`. A stream whose queries begin inside a chunk passes edges.
        window: chunks visible, own chunk included; None means all earlier ones.
        sinks: first chunks (of each sequence) that stay visible beyond the window.
        causal: also order the tokens inside a chunk, aligned at the chunk's end: key number a of l sees no query
            before number a + m - l of m. With `q_chunk == k_chunk`: no token sees a later one.
        scale: factor of the scores, 1 / sqrt(D) if None.
        return_lse: also return the logarithm of the sum of exponentials of each row's scores, which is differentiable.
        cu_seqlens_q, cu_seqlens_k: int32 [S + 1], edges of S sequences packed along Nq and Nk, the same for every b.
            Chunks are counted in each sequence, and nothing is seen across sequences. Keys default to the queries'.
        backend: "auto", "triton", "torch" or "reference". Tensors of edges may lie on the CPU or beside q; "torch"
            and "reference" read their values, which waits for the device if they lie there.
    Returns:
        out [B, H, Nq, D], contiguous, dtype of q; with `return_lse` also lse [B, H, Nq], float32 (float64 for float64).
    Raises:
        TypeError, ValueError: shapes, dtypes or edges that do not fit; a backend that cannot serve the call.

    Formula: design 2.1 of this project; softmax attention as in Vaswani et al. 2017, merged over key ranges as in Dao
    et al. 2022 (arXiv 2205.14135).
    """
    _check_tensors(q, k, v)
    k_chunk = q_chunk if k_chunk is None else k_chunk
    _check_chunk("q_chunk", q_chunk)
    _check_chunk("k_chunk", k_chunk)
    if window is not None:
        expect_int("window", window)
    expect_int("sinks", sinks, minimum=0)
    _check_packing(cu_seqlens_q, cu_seqlens_k, q.shape[2], k.shape[2])
    if scale is None:
        scale = q.shape[-1] ** -0.5
    expect_number("scale", scale)
    scale = float(scale)
    q, k, v = autocast(q, k, v)  # type: ignore[assignment]
    refusals = _triton_refusals(q, k, v, scale) if q.is_cuda or backend == "triton" else []
    chosen = choose_backend("chunked_attention", backend, q.is_cuda, refusals)
    if chosen == "reference":
        out, lse = chunked_attention_reference(
            q,
            k,
            v,
            q_chunk=q_chunk,
            k_chunk=k_chunk,
            window=window,
            sinks=sinks,
            causal=causal,
            scale=scale,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
    else:
        q_length, q_edges = _length_or_edges(q_chunk)
        k_length, k_edges = _length_or_edges(k_chunk)
        cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        edges = (q_edges, k_edges, cu_seqlens_q, cu_k)
        out, lse = ChunkedAttention.apply(q, k, v, q_length, k_length, *edges, window, sinks, causal, scale, chosen)
    return (out, lse) if return_lse else out


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the results over each of them. Differentiable.

    Args:
        out_a, out_b: [..., D], floating point.
        lse_a, lse_b: [...], -inf where nothing was visible.
    Returns:
        out [..., D] in the dtype of `out_a`, lse [...].
    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit.
    """
    rows = " ".join(f"N{i}" for i in range(out_a.ndim - 1)) if isinstance(out_a, torch.Tensor) else "N"
    expect_tensor("out_a", out_a, f"{rows} D")
    expect_tensor("out_b", out_b, f"{rows} D", like=out_a)
    expect_shape("out_b", out_b, out_a.shape, "the shape of out_a")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        expect_tensor(name, lse, rows)
        expect_shape(name, lse, out_a.shape[:-1], "the shape of out_a without D")
    return merge_partials(out_a, lse_a, out_b, lse_b)


def _triton_refusals(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> list[str]:
    reasons = triton_refusals(q, k, v)
    if q.shape[3] > MOST_WIDTH:
        reasons.append(f"Its kernels serve heads of up to {MOST_WIDTH} columns, these have {q.shape[3]}.")
    if not scale > 0:
        reasons.append(f"Its kernels need a scale above 0, this is {scale}.")
    return reasons


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    expect_tensor("q", q, "B H Nq D")
    expect_tensor("k", k, "B Hkv Nk D", like=q)
    expect_tensor("v", v, "B Hkv Nk D", like=q)
    expect(k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3], "k", "have B and D of q", k)
    expect_shape("v", v, k.shape, "the shape of k")
    expect(q.shape[3] > 0, "q", "have at least one column", q)
    expect(k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0, "k", f"have a number of heads that divides {q.shape[1]}", k)


def _check_chunk(name: str, chunk: int | torch.Tensor) -> None:
    if isinstance(chunk, torch.Tensor):
        _check_edges(name, chunk)
    else:
        expect_int(name, chunk)


def _check_edges(name: str, edges: torch.Tensor) -> None:
    expect_tensor(name, edges, "edges", dtypes=(torch.int32,))
    expect(edges.shape[0] >= 2, name, "hold at least two edges", edges)


def _check_packing(cu_q: torch.Tensor | None, cu_k: torch.Tensor | None, n_q: int, n_k: int) -> None:
    if cu_q is None:
        expect(cu_k is None, "cu_seqlens_k", "come with cu_seqlens_q", cu_k)
        return
    _check_edges("cu_seqlens_q", cu_q)
    if cu_k is None:
        expect(n_q == n_k, "cu_seqlens_k", f"be given where Nq = {n_q} and Nk = {n_k} differ", cu_k)
    else:
        _check_edges("cu_seqlens_k", cu_k)
        expect(cu_k.shape == cu_q.shape, "cu_seqlens_k", f"hold {cu_q.shape[0]} edges like cu_seqlens_q", cu_k)


def _length_or_edges(chunk: int | torch.Tensor) -> tuple[int, torch.Tensor | None]:
    return (0, chunk) if isinstance(chunk, torch.Tensor) else (chunk, None)
