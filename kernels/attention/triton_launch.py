"""Host code of the Triton backend: what each kernel is launched with. Imported at first use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from mirasol.kernels.attention import configs
from mirasol.kernels.attention.tables import visibility_tables
from mirasol.kernels.attention.triton_backward import (
    attention_bwd_delta_kernel,
    attention_bwd_dkdv_kernel,
    attention_bwd_dq_kernel,
)
from mirasol.kernels.attention.triton_forward import attention_combine_kernel, attention_fwd_kernel
from mirasol.kernels.core.device import Target, on_device, target
from mirasol.kernels.core.precision import accumulate_dtype

_LOG2E = 1.4426950408889634
_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@dataclass(frozen=True)
class Where:
    """The layout arguments of the operators, as they come: lengths or edges, packing, and the rule."""

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
    def in_table(self) -> bool:
        """Whether visibility has to be read from a table: chunks are uneven or sequences packed."""
        return self.q_edges is not None or self.k_edges is not None or self.cu_q is not None


@dataclass(frozen=True)
class _Problem:
    """Sizes of one call and its visibility in the form that kernels take."""

    batch: int
    heads_k: int
    group: int
    n_q: int
    n_k: int
    width: int
    q_chunk: int
    k_chunk: int
    chunks_q: int
    chunks_k: int
    where: Where
    rows: torch.Tensor
    columns: torch.Tensor

    def lengths(self) -> tuple[int, ...]:
        window = max(self.chunks_k, 1) if self.where.window is None else self.where.window
        most = max(self.chunks_q, self.chunks_k, 1)
        shift = self.chunks_k - self.chunks_q
        chunks = (self.q_chunk, self.k_chunk)
        return (self.n_q, self.n_k, *chunks, shift, min(window, most), min(self.where.sinks, most))

    def aligned(self, kernel: str, tile: configs.Tile) -> bool:
        """Whether no tile of a kernel needs a mask."""
        over_rows = kernel == configs.BACKWARD_KV
        return (self._rows_aligned if over_rows else self._keys_aligned)(tile.block_m, tile.block_n)

    def _keys_aligned(self, block_m: int, block_n: int) -> bool:
        """No key tile of any query tile needs a mask: rows of one chunk, chunks of whole key tiles."""
        one_chunk = self.chunks_q <= 1 or (self.q_chunk * self.group) % block_m == 0
        whole = self.n_k % block_n == 0 and (self.chunks_k <= 1 or self.k_chunk % block_n == 0)
        return self._plain and one_chunk and whole

    def _rows_aligned(self, block_m: int, block_n: int) -> bool:
        """No query tile of any key tile needs a mask: keys of one chunk, chunks of whole query tiles."""
        one_chunk = self.chunks_k <= 1 or self.k_chunk % block_n == 0
        rows, chunk = self.n_q * self.group, self.q_chunk * self.group
        return self._plain and one_chunk and rows % block_m == 0 and (self.chunks_q <= 1 or chunk % block_m == 0)

    @property
    def _plain(self) -> bool:
        return not self.where.in_table and not self.where.causal and self.chunks_q <= self.chunks_k

    @property
    def most_keys(self) -> int:
        """Keys that a query tile can see, at most (but for the chunks that its rows straddle)."""
        if self.where.window is None or self.where.in_table:
            return self.n_k
        return min(self.n_k, (self.where.window + self.where.sinks) * self.k_chunk)


def _problem(q: torch.Tensor, k: torch.Tensor, where: Where) -> _Problem:
    batch, heads, n_q, width = q.shape
    heads_k, n_k = k.shape[1], k.shape[2]
    q_chunk, k_chunk = where.q_chunk, where.k_chunk
    if q_chunk == 1 and k_chunk == 1 and where.window is None and not where.in_table and n_q > 1:
        where = Where(n_q, n_k, None, None, None, None, None, 0, True)  # one chunk, causal inside: fewer masked tiles
        q_chunk, k_chunk = n_q, n_k
    q_chunk, k_chunk = min(max(q_chunk, 1), max(n_q, 1)), min(max(k_chunk, 1), max(n_k, 1))
    rows = columns = q
    if where.in_table:
        rows, columns = visibility_tables(
            n_q,
            n_k,
            where.q_chunk,
            where.k_chunk,
            where.q_edges,
            where.k_edges,
            where.cu_q,
            where.cu_k,
            where.window,
            where.sinks,
            where.causal,
            q.device,
        )
    return _Problem(
        batch=batch,
        heads_k=heads_k,
        group=heads // heads_k,
        n_q=n_q,
        n_k=n_k,
        width=width,
        q_chunk=q_chunk,
        k_chunk=k_chunk,
        chunks_q=triton.cdiv(n_q, q_chunk),
        chunks_k=triton.cdiv(n_k, k_chunk),
        where=where,
        rows=rows,
        columns=columns,
    )


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, where: Where, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, Nq, D], k and v [B, Hkv, Nk, D] -> out [B, H, Nq, D], lse [B, H, Nq]."""
    q, k, v = (_last_contiguous(t) for t in (q, k, v))
    acc = accumulate_dtype(q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=acc, device=q.device)
    if q.numel() == 0:
        return out, lse
    if k.shape[2] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    with on_device(q):
        problem, aim = _problem(q, k, where), target(q.device)
        tile = _tile(configs.FORWARD, problem, aim, q, k, v)
        programs = triton.cdiv(problem.n_q * problem.group, tile.block_m) * problem.batch * problem.heads_k
        splits = configs.splits(programs, triton.cdiv(problem.most_keys, tile.block_n), aim)
        if splits == 1:
            _launch_forward(q, k, v, out, lse, problem, tile, scale, 1, programs, aim)
        else:
            parts = torch.empty((splits, *q.shape), dtype=acc, device=q.device)
            part_lse = torch.empty((splits, *q.shape[:3]), dtype=acc, device=q.device)
            _launch_forward(q, k, v, parts, part_lse, problem, tile, scale, splits, programs, aim)
            _launch_combine(parts, part_lse, out, lse, aim)
    return out, lse


def _launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    problem: _Problem,
    tile: configs.Tile,
    scale: float,
    splits: int,
    programs: int,
    aim: Target,
) -> None:
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    constants = _constants(problem, tile, q.dtype, aim)
    if tile.warp_specialize:
        q = _describe(q.reshape(-1, problem.width), [tile.block_m, _padded(problem.width, aim)])
    k, v = _key_sources((k, v), problem, tile, aim)
    attention_fwd_kernel[(programs, splits)](
        *(q, k, v, out, lse, problem.rows, *strides, *problem.lengths(), problem.batch, problem.heads_k),
        scale * _LOG2E,
        **constants,
        WARP_SPECIALIZE=tile.warp_specialize,
    )


def _launch_combine(
    parts: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, aim: Target
) -> None:
    rows, width, block = lse.numel(), out.shape[-1], 4
    attention_combine_kernel[(triton.cdiv(rows, block),)](
        parts,
        part_lse,
        out,
        lse,
        rows,
        parts.shape[0],
        WIDTH=width,
        PADDED=_padded(width, aim),
        BM=block,
        num_warps=4,
    )


def backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    where: Where,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward`: dq [B, H, Nq, D], dk and dv [B, Hkv, Nk, D]. Bitwise deterministic."""
    grad, q, k, v = (_last_contiguous(t) for t in (grad, q, k, v))
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    with on_device(q):
        problem, aim = _problem(q, k, where), target(q.device)
        delta = _launch_delta(grad, grad_lse, out, lse, aim)
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
        sizes = (*problem.lengths(), problem.batch, problem.heads_k, scale, scale * _LOG2E)
        pairs = problem.batch * problem.heads_k
        tile = _tile(configs.BACKWARD_KV, problem, aim, q, k, v, grad)
        rows, grads = _packed_sources((q, grad), problem, tile, aim)
        keys, values = _key_sources((k, v), problem, tile, aim)
        attention_bwd_dkdv_kernel[(triton.cdiv(problem.n_k, tile.block_n) * pairs,)](
            *(rows, keys, values, grads, lse, delta, dk, dv, problem.columns, *strides, *sizes),
            **_constants(problem, tile, q.dtype, aim),
        )
        tile = _tile(configs.BACKWARD_Q, problem, aim, q, k, v, grad)
        keys, values = _key_sources((k, v), problem, tile, aim)
        attention_bwd_dq_kernel[(triton.cdiv(problem.n_q * problem.group, tile.block_m) * pairs,)](
            *(q, keys, values, grad, lse, delta, dq, problem.rows, *strides, *sizes),
            **_constants(problem, tile, q.dtype, aim),
        )
    return dq, dk, dv


def _launch_delta(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, aim: Target
) -> torch.Tensor:
    batch, heads, n_q, width = grad.shape
    delta = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
    block = 16 if aim.kind == "interpreter" else 32
    attention_bwd_delta_kernel[(triton.cdiv(n_q, block), batch * heads)](
        grad,
        out.contiguous(),
        lse if grad_lse is None else grad_lse.contiguous(),
        lse,
        delta,
        *grad.stride()[:3],
        heads,
        n_q,
        WIDTH=width,
        PADDED=_padded(width, aim),
        BM=block,
        HAS_LSE=grad_lse is not None,
        ACC=_DTYPES[lse.dtype],
        num_warps=4,
    )
    return delta


def _tile(kernel: str, problem: _Problem, aim: Target, *tensors: torch.Tensor) -> configs.Tile:
    """The tile without masks where it fits the chunks, else the one with masks."""
    size = tensors[0].element_size()
    tma = _tma_can_read(*tensors) and problem.group in (1, 2, 4, 8, 16)
    flat = problem.group == 1 and tensors[0].is_contiguous()
    for masked in (False, True):
        tile = configs.tile(kernel, problem.width, size, aim, masked=masked, tma=tma, flat=flat)
        if masked or problem.aligned(kernel, tile):
            break
    return tile


def _constants(problem: _Problem, tile: configs.Tile, dtype: torch.dtype, aim: Target) -> dict[str, object]:
    """Compile-time arguments that the attention kernels share."""
    return {
        "WIDTH": problem.width,
        "PADDED": _padded(problem.width, aim),
        "BM": tile.block_m,
        "BN": tile.block_n,
        "GROUP": problem.group,
        "CAUSAL": problem.where.causal,
        "TABLE": problem.where.in_table,
        "MASKS": tile.masks,
        "ACC": _DTYPES[accumulate_dtype(dtype)],
        "PRECISION": "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "TMA": tile.tma,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **({"maxnreg": tile.registers} if tile.registers and aim.kind == "cuda" else {}),
    }


def _packed_sources(tensors: Sequence[torch.Tensor], problem: _Problem, tile: configs.Tile, aim: Target) -> list[Any]:
    """Where kernels load packed rows from: the tensors, or descriptors of [B, N, H, D]."""
    block = [1, tile.block_m // problem.group, problem.group, _padded(problem.width, aim)]
    return [_describe(t.transpose(1, 2), block) if tile.tma else t for t in tensors]


def _key_sources(tensors: Sequence[torch.Tensor], problem: _Problem, tile: configs.Tile, aim: Target) -> list[Any]:
    """Where kernels load keys and values from: the tensors, or descriptors of [B, Hkv, N, D]."""
    block = [1, 1, tile.block_n, _padded(problem.width, aim)]
    return [_describe(t, block) if tile.tma else t for t in tensors]


def _describe(t: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """A descriptor that loads blocks of a tensor, zeros beyond its edges."""
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block)


def _tma_can_read(*tensors: torch.Tensor) -> bool:
    """Whether bases and strides are multiples of 16 bytes, as descriptors require."""
    return all(
        t.data_ptr() % 16 == 0 and all(stride * t.element_size() % 16 == 0 for stride in t.stride()[:3])
        for t in tensors
    )


def _padded(width: int, aim: Target) -> int:
    return max(16, triton.next_power_of_2(width)) if aim.kind == "interpreter" else configs.padded_width(width)


def _last_contiguous(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
