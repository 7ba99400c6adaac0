"""Public functions of chunked attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NoReturn, TypeAlias, overload

import torch

from mirasol.kernels.attention.eager import merge_partials
from mirasol.kernels.attention.op import attend
from mirasol.kernels.attention.reference import chunked_attention_reference
from mirasol.kernels.attention.visibility import Rule, count_pairs
from mirasol.kernels.core.checks import (
    FLOATS,
    expect,
    expect_bool,
    expect_int,
    expect_number,
    expect_shape,
    expect_tensor,
    refuse,
)
from mirasol.kernels.core.device import triton_refusals
from mirasol.kernels.core.dispatch import Backend, autocast, choose_backend

MOST_WIDTH = 256  # columns of a head that the Triton kernels serve
EdgesGiven: TypeAlias = torch.Tensor | Sequence[int]


@overload
def chunked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_chunk: int | EdgesGiven,
    k_chunk: int | EdgesGiven | None = ...,
    window: int | None = ...,
    sinks: int = ...,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    cu_seqlens_q: EdgesGiven | None = ...,
    cu_seqlens_k: EdgesGiven | None = ...,
    backend: Backend = ...,
) -> torch.Tensor: ...


@overload
def chunked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_chunk: int | EdgesGiven,
    k_chunk: int | EdgesGiven | None = ...,
    window: int | None = ...,
    sinks: int = ...,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    cu_seqlens_q: EdgesGiven | None = ...,
    cu_seqlens_k: EdgesGiven | None = ...,
    backend: Backend = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def chunked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_chunk: int | EdgesGiven,
    k_chunk: int | EdgesGiven | None = None,
    window: int | None = None,
    sinks: int = 0,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    cu_seqlens_q: EdgesGiven | None = None,
    cu_seqlens_k: EdgesGiven | None = None,
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
        q_chunk: tokens a chunk, counted from the first query; a last chunk may be shorter. Or edges from 0 to Nq, for
            chunks of any lengths: an int32 tensor [Tq + 1], or a list of ints.
        k_chunk: likewise for keys; None means `q_chunk`. A stream whose queries begin inside a chunk passes edges.
        window: chunks visible, own chunk included; None means all earlier ones.
        sinks: first chunks (of each sequence) that stay visible beyond the window; 0 without a window.
        causal: also order the tokens inside a chunk, aligned at the chunk's end: key number a of l sees no query
            before number a + m - l of m. With `q_chunk == k_chunk`: no token sees a later one.
        scale: factor of the scores, any finite number, 1 / sqrt(D) if None.
        return_lse: also return the logarithm of the sum of exponentials of each row's scores, which is differentiable.
        cu_seqlens_q, cu_seqlens_k: int32 [S + 1], edges of S sequences packed along Nq and Nk, the same for every b.
            Chunks are counted in each sequence, and nothing is seen across sequences. Keys default to the queries'.
        backend: "auto", "triton", "torch" or "reference". Edges may lie on the CPU or beside q. "torch" and "reference"
            read the values of edges on a device, which waits for it; "triton" does not, and takes them as unchanged
            while PyTorch's version counter of that tensor stands still.
    Returns:
        out [B, H, Nq, D], dtype of q; with `return_lse` also lse [B, H, Nq], float32 (float64 for float64), contiguous.
        In memory out is [B, Nq, H, D] where q's heads lie closer together than its tokens, so that
        `out.transpose(1, 2).flatten(2)` is a view, else contiguous; gradients follow their tensors likewise.
    Raises:
        TypeError, ValueError: shapes, dtypes or edges that do not fit; a backend that cannot serve the call.
        NotImplementedError: a second derivative or a `torch.func` transform of a backend other than "reference".

    Formula: design 2.1 of this project; softmax attention as in Vaswani et al. 2017, merged over key ranges as in Dao
    et al. 2022 (arXiv 2205.14135).
    """
    q, k, v = autocast(q, k, v)
    if not _fit(q, k, v):
        _refuse_tensors(q, k, v)
    rule = _rule(q.device, q.shape[2], k.shape[2], q_chunk, k_chunk, window, sinks, causal, cu_seqlens_q, cu_seqlens_k)
    scale = q.shape[-1] ** -0.5 if scale is None else expect_number("scale", scale)
    refusals = _triton_refusals(q, k, v) if q.is_cuda or backend == "triton" else []
    chosen = choose_backend("chunked_attention", backend, q.is_cuda, refusals)
    if chosen == "reference":
        out, lse = chunked_attention_reference(q, k, v, rule, scale)
    else:
        if scale < 0:
            q, scale = -q, -scale
        elif scale == 0:
            q, scale = q * 0, 1.0
        out, lse = attend(q, k, v, rule, scale, chosen)
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


def visible_pairs(
    n_q: int,
    n_k: int,
    *,
    q_chunk: int | EdgesGiven,
    k_chunk: int | EdgesGiven | None = None,
    window: int | None = None,
    sinks: int = 0,
    causal: bool = False,
    cu_seqlens_q: EdgesGiven | None = None,
    cu_seqlens_k: EdgesGiven | None = None,
) -> int:
    """The exact number of (query, key) pairs that `chunked_attention` with these arguments computes, per head.

    Args:
        n_q, n_k: queries and keys, Nq and Nk.
        q_chunk, k_chunk, window, sinks, causal, cu_seqlens_q, cu_seqlens_k: as in `chunked_attention`.
    Returns:
        A plain int. Forward costs `4 * pairs * D` floating-point operations a head, backward 2.5 times that.
    Raises:
        TypeError, ValueError: what `chunked_attention` refuses.
    """
    n_q, n_k = expect_int("n_q", n_q, minimum=0), expect_int("n_k", n_k, minimum=0)
    rule = _rule(torch.device("cpu"), n_q, n_k, q_chunk, k_chunk, window, sinks, causal, cu_seqlens_q, cu_seqlens_k)
    return count_pairs(rule.read(n_q, n_k))


def _triton_refusals(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    reasons = triton_refusals(q, k, v)
    if q.shape[3] > MOST_WIDTH:
        reasons.append(f"Its kernels serve heads of up to {MOST_WIDTH} columns, these have {q.shape[3]}.")
    return reasons


def _fit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `_refuse_tensors` has nothing to say; apart from it because every call asks."""
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        return False
    shape, shape_k = q.shape, k.shape
    if len(shape) != 4 or len(shape_k) != 4 or v.shape != shape_k or shape[0] != shape_k[0] or shape[3] != shape_k[3]:
        return False
    if shape[3] == 0 or shape_k[1] == 0 or shape[1] % shape_k[1] != 0:
        return False
    return q.dtype in FLOATS and k.dtype == v.dtype == q.dtype and k.device == v.device == q.device


def _refuse_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> NoReturn:
    expect_tensor("q", q, "B H Nq D")
    expect_tensor("k", k, "B Hkv Nk D", like=q)
    expect_tensor("v", v, "B Hkv Nk D", like=q)
    expect(k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3], "k", "have B and D of q", k)
    expect_shape("v", v, k.shape, "the shape of k")
    expect(q.shape[3] > 0, "q", "have at least one column", q)
    refuse("k", f"have a number of heads that divides {q.shape[1]}", k)


def _rule(
    device: torch.device,
    n_q: int,
    n_k: int,
    q_chunk: int | EdgesGiven,
    k_chunk: int | EdgesGiven | None,
    window: int | None,
    sinks: int,
    causal: bool,
    cu_q: EdgesGiven | None,
    cu_k: EdgesGiven | None,
) -> Rule:
    """The arguments that decide who sees whom, checked, in the one form that operators take."""
    q_length, q_edges = _length_or_edges("q_chunk", q_chunk, device)
    k_length, k_edges = (q_length, q_edges) if k_chunk is None else _length_or_edges("k_chunk", k_chunk, device)
    sinks = expect_int("sinks", sinks, minimum=0)
    if window is not None:
        window = expect_int("window", window)
    elif sinks:
        refuse("sinks", "be 0 without a window", sinks)
    expect_bool("causal", causal)
    if cu_q is not None or cu_k is not None:
        cu_q, cu_k = _packing(cu_q, cu_k, n_q, n_k, device)
    elif q_length == 1 and k_length == 1 and window is None:
        # Token-causal attention is one chunk that is causal inside: the same pairs in fewer, larger ranges.
        q_length, k_length, causal = max(n_q, 1), max(n_k, 1), True
    return Rule(q_length, k_length, q_edges, k_edges, cu_q, cu_k, window, sinks, causal)


def _length_or_edges(name: str, chunk: int | EdgesGiven, device: torch.device) -> tuple[int, torch.Tensor | None]:
    if isinstance(chunk, torch.Tensor | list | tuple):
        return 0, _edges(name, chunk, device)
    return expect_int(name, chunk), None


def _edges(name: str, edges: EdgesGiven, device: torch.device) -> torch.Tensor:
    if not isinstance(edges, torch.Tensor):
        edges = torch.tensor([expect_int(f"{name}[{i}]", e, minimum=0) for i, e in enumerate(edges)], dtype=torch.int32)
    expect_tensor(name, edges, "edges", dtypes=(torch.int32,))
    if edges.shape[0] < 2:
        refuse(name, "hold at least two edges", edges)
    if edges.device != device and edges.device.type != "cpu":
        refuse(name, f"be on the CPU or on {device}", edges)
    return edges


def _packing(
    cu_q: EdgesGiven | None, cu_k: EdgesGiven | None, n_q: int, n_k: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    if cu_q is None:
        refuse("cu_seqlens_k", "come with cu_seqlens_q", cu_k)
    of_q = _edges("cu_seqlens_q", cu_q, device)
    if cu_k is None:
        expect(n_q == n_k, "cu_seqlens_k", f"be given where Nq = {n_q} and Nk = {n_k} differ", cu_k)
        return of_q, of_q
    of_k = _edges("cu_seqlens_k", cu_k, device)
    expect(of_k.shape == of_q.shape, "cu_seqlens_k", f"hold {of_q.shape[0]} edges like cu_seqlens_q", of_k)
    return of_q, of_k
