"""Host code of the Triton backend: what each kernel is launched with. Imported at first use.

All that follows from shapes, strides, dtype, target and rule is decided once, in a frozen plan of launches; a call
makes its outputs and starts the plan's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from mirasol.kernels.attention.op import strides_like
from mirasol.kernels.attention.triton.backward import (
    attention_bwd_delta_kernel,
    attention_bwd_dkdv_kernel,
    attention_bwd_dq_kernel,
)
from mirasol.kernels.attention.triton.config import (
    BACKWARD_KV,
    BACKWARD_Q,
    FORWARD,
    Config,
    config,
    padded_width,
    settings,
    splits,
)
from mirasol.kernels.attention.triton.forward import attention_fwd_combine_kernel, attention_fwd_kernel
from mirasol.kernels.attention.triton.table import visibility_table
from mirasol.kernels.attention.visibility import Rule
from mirasol.kernels.core.blocks import LOG2E
from mirasol.kernels.core.device import Target, on_device, target
from mirasol.kernels.core.dispatch import rows_contiguous
from mirasol.kernels.core.launch import accumulator, prepare
from mirasol.kernels.core.precision import accumulate_dtype, product_precision

_LOG2E = LOG2E.value


class _Key(NamedTuple):
    """What a plan depends on. `tma`: whether descriptors can read all tensors of the call."""

    q_shape: torch.Size
    k_shape: torch.Size
    strides: tuple[tuple[int, ...], ...]  # of q, k, v, and in backward of the gradient, of out and of lse
    dtype: torch.dtype
    q_chunk: int
    k_chunk: int
    window: int | None
    sinks: int
    causal: bool
    in_table: bool
    tma: bool
    precision: str
    target: Target
    settings: tuple[object, ...]


def _key(rule: Rule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: torch.Tensor) -> _Key:
    strides = q.stride(), k.stride(), v.stride(), *[t.stride() for t in more]
    addresses = q.data_ptr() | k.data_ptr() | v.data_ptr()
    for t in more:
        addresses |= t.data_ptr()
    q_chunk, k_chunk, q_edges, k_edges, cu_q, _, window, sinks, causal = rule
    in_table = q_edges is not None or k_edges is not None or cu_q is not None
    chunks = q_chunk, k_chunk, window, sinks, causal
    where = product_precision(q.dtype), target(q.device), settings()
    return _Key(q.shape, k.shape, strides, q.dtype, *chunks, in_table, addresses % 16 == 0, *where)


class _Problem:
    """Sizes of one call and its rule in the numbers that kernels take."""

    def __init__(self, key: _Key) -> None:
        self.key, self.target = key, key.target
        self.batch, heads, self.n_q, self.width = key.q_shape
        self.heads_k, self.n_k = key.k_shape[1:3]
        self.group = heads // self.heads_k
        self.itemsize = key.dtype.itemsize
        self.padded = padded_width(self.width, key.target)
        self.q_chunk = min(max(key.q_chunk, 1), max(self.n_q, 1))
        self.k_chunk = min(max(key.k_chunk, 1), max(self.n_k, 1))
        self.chunks_q, self.chunks_k = triton.cdiv(self.n_q, self.q_chunk), triton.cdiv(self.n_k, self.k_chunk)
        # Descriptors need 16-byte aligned strides; an expanded dimension has none.
        even = [
            stride > 0 and stride * self.itemsize % 16 == 0 for strides in key.strides[:5] for stride in strides[:3]
        ]
        self.tma = key.tma and all(even) and self.group in (1, 2, 4, 8, 16)
        # Halves are loaded by descriptors of one head's rows, and of its lse, which begins at 16 bytes as well.
        self.halves = self.group == 1 and self.n_q % 4 == 0

    @property
    def pairs(self) -> int:
        """Batch elements times key heads."""
        return self.batch * self.heads_k

    def lengths(self) -> tuple[int, ...]:
        """n_q, n_k, q_chunk, k_chunk, shift, window, sinks, batch, heads_k."""
        most = max(self.chunks_q, self.chunks_k, 1)
        window = most if self.key.window is None else min(self.key.window, most)
        shift = self.chunks_k - self.chunks_q
        chunks = self.q_chunk, self.k_chunk, shift, window, min(self.key.sinks, most)
        return self.n_q, self.n_k, *chunks, self.batch, self.heads_k

    def config(self, kernel: str) -> Config:
        """The configuration without masks where its blocks fit the chunks, else the one with masks."""
        for masked in (False, True):
            found = config(
                kernel, self.width, self.itemsize, self.target, masked=masked, tma=self.tma, halves=self.halves
            )
            if masked or self.aligned(kernel, found.block_m, found.block_n):
                break
        return found

    def aligned(self, kernel: str, block_m: int, block_n: int) -> bool:
        """Whether no block of a kernel needs a mask: what it owns lies in one chunk, chunks are of whole blocks."""
        if self.key.in_table or self.key.causal or self.chunks_q > self.chunks_k:
            return False
        rows, chunk = self.n_q * self.group, self.q_chunk * self.group
        if kernel == BACKWARD_KV:
            one_chunk = self.chunks_k <= 1 or self.k_chunk % block_n == 0
            return one_chunk and rows % block_m == 0 and (self.chunks_q <= 1 or chunk % block_m == 0)
        one_chunk = self.chunks_q <= 1 or chunk % block_m == 0
        return one_chunk and self.n_k % block_n == 0 and (self.chunks_k <= 1 or self.k_chunk % block_n == 0)

    def most_keys(self) -> int:
        """Keys that a block of queries can see, at most (but for the chunks that its rows straddle)."""
        if self.key.window is None or self.key.in_table:
            return self.n_k
        return min(self.n_k, (self.key.window + self.key.sinks) * self.k_chunk)

    def prepare(self, kernel: Any, programs: int | tuple[int, int], found: Config) -> Callable[..., None]:
        """A launch with the compile-time arguments that the attention kernels share."""
        return prepare(
            kernel,
            programs,
            warps=found.warps,
            stages=found.stages,
            registers=found.registers if self.target.kind == "cuda" else 0,
            memory=found.specialize,
            WIDTH=self.width,
            PADDED=self.padded,
            BM=found.block_m,
            BN=found.block_n,
            GROUP=self.group,
            CAUSAL=self.key.causal,
            TABLE=self.key.in_table,
            MASKS=found.masks,
            ACC=accumulator(self.key.dtype),
            PRECISION=self.key.precision,
            TMA=found.tma,
            STAGES=found.stages,
            SPECIALIZE=found.specialize,
        )

    def keys(self, kernel: str, found: Config) -> tuple[_Source, _Source]:
        """Of k and v [B, Hkv, N, D]."""
        described = found.tma and not (kernel == BACKWARD_KV and found.specialize)  # then by descriptors of its own
        block = [1, 1, found.block_n, self.padded] if described else None
        return _Source(block), _Source(block)

    def rows(self, found: Config) -> tuple[_Source, _Source]:
        """Of queries and gradients: [B, N, H, D] where descriptors pack grouped heads, else [B, H, N, D]."""
        block = (
            [1, found.block_m // self.group, self.group, self.padded]
            if self.group > 1
            else [1, 1, found.block_m, self.padded]
        )
        return (_Source(block), _Source(block)) if found.tma else (_Source(None), _Source(None))


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor [B, H, N, D]."""
    _, heads, n, width = shape
    return heads * n * width, n * width, width, 1


class _Source:
    """Where a kernel loads a tensor from: the tensor itself, or, with a block, a descriptor that loads such blocks.

    A descriptor is checked when it is first made; another tensor of the plan differs in its address only.
    """

    def __init__(self, block: list[int] | None) -> None:
        self.block = block
        self.fields: dict[str, Any] = {}

    def __call__(self, t: torch.Tensor) -> Any:
        if self.block is None:
            return t
        if not self.fields:
            self.fields = vars(TensorDescriptor(t, list(t.shape), list(t.stride()), self.block))
            del self.fields["base"]  # a plan outlives the tensors of its calls
        made = object.__new__(TensorDescriptor)
        made.__dict__.update(self.fields)
        made.base = t
        return made


@dataclass(frozen=True)
class _Forward:
    """Launches of a forward call. `parts`: over how many programs keys are split, whose results `combine` merges."""

    start: Callable[..., None]
    combine: Callable[..., None]
    parts: int
    numbers: tuple[int, ...]  # strides of q, k and v
    lengths: tuple[int, ...]
    part_strides: tuple[int, ...]
    k: _Source
    v: _Source
    rows: tuple[int, int, int]  # B H Nq, H, Nq


@lru_cache(maxsize=1024)
def _plan_forward(key: _Key) -> _Forward:
    problem = _Problem(key)
    found = problem.config(FORWARD)
    programs = triton.cdiv(problem.n_q * problem.group, found.block_m) * problem.pairs
    parts = splits(programs, triton.cdiv(problem.most_keys(), found.block_n), key.target)
    heads, rows = key.q_shape[1], problem.batch * key.q_shape[1] * problem.n_q
    merged = 4  # rows a program
    return _Forward(
        problem.prepare(attention_fwd_kernel, (programs, parts), found),
        prepare(
            attention_fwd_combine_kernel,
            triton.cdiv(rows, merged),
            warps=4,
            WIDTH=problem.width,
            PADDED=problem.padded,
            BM=merged,
        ),
        parts,
        tuple(stride for strides in key.strides for stride in strides[:3]),
        problem.lengths(),
        _dense(key.q_shape)[:3],
        *problem.keys(FORWARD, found),
        (rows, heads, problem.n_q),
    )


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, Nq, D], k and v [B, Hkv, Nk, D] -> out [B, H, Nq, D], lse [B, H, Nq]."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    acc = accumulate_dtype(q.dtype)
    out = q.new_empty_strided(q.shape, strides_like(q))
    lse = q.new_empty(q.shape[:3], dtype=acc)
    _check_edges(rule, q.shape[2], k.shape[2])
    if q.numel() == 0:
        return out, lse
    if k.shape[2] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    with on_device(q):
        key = _key(rule, q, k, v)
        plan = _plan_forward(key)
        table = visibility_table("rows", q.shape[2], k.shape[2], rule, q.device) if key.in_table else q
        sources, scale_log2 = (q, plan.k(k), plan.v(v)), scale * _LOG2E
        if plan.parts == 1:
            plan.start(*sources, out, lse, table, *plan.numbers, *out.stride()[:3], *plan.lengths, scale_log2)
        else:
            parts = q.new_empty((plan.parts, *q.shape), dtype=acc)
            part_lse = q.new_empty((plan.parts, *q.shape[:3]), dtype=acc)
            plan.start(*sources, parts, part_lse, table, *plan.numbers, *plan.part_strides, *plan.lengths, scale_log2)
            total, heads, n_q = plan.rows
            plan.combine(parts, part_lse, out, lse, *out.stride()[:3], total, plan.parts, heads, n_q)
    return out, lse


@dataclass(frozen=True)
class _Backward:
    """Launches of a backward call."""

    delta: Callable[..., None]
    dkdv: Callable[..., None]
    dq: Callable[..., None]
    numbers: tuple[int, ...]  # strides of q, k, v and the gradient
    lengths: tuple[int, ...]
    rows: tuple[int, int, int]  # B H Nq, H, Nq
    dkdv_sources: tuple[_Source, ...]  # of q, the gradient, k and v
    dq_sources: tuple[_Source, _Source]  # of k and v
    packed: bool  # whether the first two are of [B, N, H, D]


@lru_cache(maxsize=1024)
def _plan_backward(key: _Key) -> _Backward:
    problem = _Problem(key)
    of_keys, of_rows = problem.config(BACKWARD_KV), problem.config(BACKWARD_Q)
    heads, rows = key.q_shape[1], problem.batch * key.q_shape[1] * problem.n_q
    block = 16 if key.target.kind == "interpreter" else 32
    return _Backward(
        prepare(
            attention_bwd_delta_kernel,
            triton.cdiv(rows, block),
            warps=4,
            WIDTH=problem.width,
            PADDED=problem.padded,
            BM=block,
            ACC=accumulator(key.dtype),
        ),
        problem.prepare(attention_bwd_dkdv_kernel, triton.cdiv(problem.n_k, of_keys.block_n) * problem.pairs, of_keys),
        problem.prepare(
            attention_bwd_dq_kernel,
            triton.cdiv(problem.n_q * problem.group, of_rows.block_m) * problem.pairs,
            of_rows,
        ),
        tuple(stride for strides in key.strides[:4] for stride in strides[:3]),
        problem.lengths(),
        (rows, heads, problem.n_q),
        (*problem.rows(of_keys), *problem.keys(BACKWARD_KV, of_keys)),
        problem.keys(BACKWARD_Q, of_rows),
        of_keys.tma and problem.group > 1,
    )


def backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rule: Rule,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward`: dq [B, H, Nq, D], dk and dv [B, Hkv, Nk, D]. Bitwise deterministic."""
    grad, q, k, v, out = (rows_contiguous(t) for t in (grad, q, k, v, out))
    dq, dk, dv = (t.new_empty_strided(t.shape, strides_like(t)) for t in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    with on_device(q):
        lse = lse.contiguous()
        key = _key(rule, q, k, v, grad, out, lse)
        plan = _plan_backward(key)
        rows = columns = q
        if key.in_table:
            rows, columns = (
                visibility_table(side, q.shape[2], k.shape[2], rule, q.device) for side in ("rows", "columns")
            )
        delta = torch.empty_like(lse)
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        plan.delta(grad, out, grad_lse, lse, delta, *grad.stride()[:3], *out.stride()[:3], *plan.rows)
        sizes = (*plan.lengths, scale, scale * _LOG2E)
        of_q, of_grad, of_k, of_v = plan.dkdv_sources
        q_rows, grad_rows = (q.transpose(1, 2), grad.transpose(1, 2)) if plan.packed else (q, grad)
        plan.dkdv(
            *(of_q(q_rows), of_k(k), of_v(v), of_grad(grad_rows), lse, delta, dk, dv, columns),
            *(*plan.numbers, *dk.stride()[:3], *dv.stride()[:3], *sizes),
        )
        of_k, of_v = plan.dq_sources
        plan.dq(q, of_k(k), of_v(v), grad, lse, delta, dq, rows, *plan.numbers, *dq.stride()[:3], *sizes)
    return dq, dk, dv


def _check_edges(rule: Rule, n_q: int, n_k: int) -> None:
    """Edges on the CPU are checked as the other backends check them; those on a device are not waited for."""
    for edges in rule.edges:
        if edges is not None and edges.device.type == "cpu":
            rule.read(n_q, n_k)
            return
