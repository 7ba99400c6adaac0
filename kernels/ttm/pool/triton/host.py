"""Launches of the pooling kernels, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from mirasol.kernels.core.device import target
from mirasol.kernels.core.dispatch import rows_contiguous
from mirasol.kernels.core.launch import accumulator, launch
from mirasol.kernels.core.precision import accumulate_dtype, product_precision
from mirasol.kernels.ttm.pool.triton.backward import (
    pool_bwd_hidden_kernel,
    pool_bwd_rows_kernel,
    pool_bwd_scores_kernel,
    pool_bwd_sums_kernel,
    pool_bwd_tokens_kernel,
    pool_bwd_w1_kernel,
    pool_bwd_w2_kernel,
)
from mirasol.kernels.ttm.pool.triton.config import Block, Config, config, group, splits
from mirasol.kernels.ttm.pool.triton.forward import pool_fwd_kernel
from mirasol.kernels.ttm.reference import NORM_EPS

Found = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Call:
    """One call's tensors as the kernels take them: rows contiguous, parameters whole."""

    sources: list[torch.Tensor]
    positions: torch.Tensor | None
    w1: torch.Tensor  # [J, d] in the dtype of the tokens
    b1: torch.Tensor  # [J] in the precision of sums
    w2: torch.Tensor | None  # [K, J]; None where scores are linear in the tokens, then K = J
    b2: torch.Tensor | None  # [K]
    carry_out: torch.Tensor | None
    carry_lse: torch.Tensor | None
    batch: int
    tokens: int  # of all sources
    d: int
    j: int
    k: int
    config: Config

    @staticmethod
    def of(
        sources: Sequence[torch.Tensor],
        positions: torch.Tensor | None,
        w1: torch.Tensor,
        b1: torch.Tensor,
        w2: torch.Tensor | None,
        b2: torch.Tensor | None,
        carry_out: torch.Tensor | None,
        carry_lse: torch.Tensor | None,
    ) -> Call:
        first = sources[0]
        batch, _, d = first.shape
        j = w1.shape[0]
        k = j if w2 is None else w2.shape[0]
        return Call(
            sources=[rows_contiguous(v) for v in sources],
            positions=None if positions is None else positions.contiguous(),
            w1=w1.contiguous(),
            b1=b1.contiguous(),
            w2=None if w2 is None else w2.contiguous(),
            b2=None if b2 is None else b2.contiguous(),
            carry_out=None if carry_out is None else rows_contiguous(carry_out),
            carry_lse=carry_lse,
            batch=batch,
            tokens=sum(v.shape[1] for v in sources),
            d=d,
            j=j,
            k=k,
            config=config(k, j, d, first.element_size(), target(first.device), linear=w2 is None),
        )

    @property
    def first(self) -> torch.Tensor:
        return self.sources[0]

    @property
    def linear(self) -> bool:
        return self.w2 is None

    @property
    def acc(self) -> torch.dtype:
        return accumulate_dtype(self.first.dtype)

    def tiles(self, block: Block) -> int:
        """How many tiles the tokens of one batch item make; none straddles sources."""
        return sum(triton.cdiv(v.shape[1], block.tokens) for v in self.sources)

    def carry_strides(self) -> tuple[int, ...]:
        """Of out between batch items and rows, then of lse."""
        if self.carry_out is None or self.carry_lse is None:
            return 0, 0, 0, 0
        return *self.carry_out.stride()[:2], *self.carry_lse.stride()

    def run(
        self, kernel: Any, programs: Any, tensors: Sequence[Any], numbers: Sequence[int], block: Block, **constants: Any
    ) -> None:
        """Launch a kernel with products: tensors, numbers and the constants of its own beside those of all."""
        constants |= dict(J=self.j, BP=block.tokens, BJ=self.config.hidden, ACC=accumulator(self.first.dtype))
        precision = product_precision(self.first.dtype)
        launch(
            kernel, programs, tensors, numbers, on=self.first, warps=block.warps, stages=block.stages,
            registers=block.registers, PRECISION=precision, **constants,
        )  # fmt: skip

    def walk(
        self,
        kernel: Any,
        programs: Any,
        tensors: Sequence[Any],
        counts: Sequence[int],
        numbers: Sequence[Any],
        block: Block,
        **constants: Any,
    ) -> None:
        """Launch a kernel that walks over the sources: counts after their lengths, then strides, then numbers."""
        given = _three(self.sources)
        lengths = [0 if v is None else v.shape[1] for v in given]
        strides = [0 if v is None else v.stride(dim) for dim in (0, 1) for v in given]
        constants |= dict(D=self.d, SOURCES=len(self.sources))
        pointers, values = [*given, self.positions, *tensors], [*lengths, self.tokens, *counts, *strides, *numbers]
        self.run(kernel, programs, pointers, values, block, **constants)


def forward(
    given: Sequence[Any], w1_sums: torch.Tensor | None, counters: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes and meaning as in `op.ttm_pool`."""
    call = Call.of(*given)
    batch, tokens, d, j, k = call.batch, call.tokens, call.d, call.j, call.k
    block, tiles = call.config.pool, call.tiles(call.config.pool)
    layers = triton.cdiv(j, call.config.hidden) if call.linear else 1
    blocks = triton.cdiv(d, block.columns) * triton.cdiv(k, call.config.rows)
    members = group(batch, tiles * layers, target(call.first.device))
    groups = triton.cdiv(batch, members)
    out = call.first.new_empty(batch, k, d)
    lse = call.first.new_empty(batch, k, dtype=call.acc)
    hidden = call.first.new_empty(batch * keep, tokens, j)
    stats = lse.new_empty(2 * keep * (not call.linear), batch, tokens)
    weights = call.first.new_empty(batch, tokens, k)
    tops, sums = (lse.new_empty(batch, tiles, k) for _ in range(2))
    call.walk(
        pool_fwd_kernel, groups * members * (tiles * layers + blocks),
        [call.w1, call.b1, w1_sums, call.w2, call.b2, *((hidden, stats) if keep else (None, None)), weights, tops,
         sums, out, lse, call.carry_out, call.carry_lse, counters],
        [tiles, batch, groups, members], [*call.carry_strides(), NORM_EPS], block,
        K=k, LINEAR=call.linear, BK=call.config.step, BD=block.columns, BR=call.config.rows,
    )  # fmt: skip
    return out, lse, hidden, stats


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, hidden: torch.Tensor,
    stats: torch.Tensor, sources: Found, positions: torch.Tensor | None, w1: torch.Tensor, b1: torch.Tensor,
    w2: torch.Tensor | None, b2: torch.Tensor | None, carry_out: torch.Tensor | None, carry_lse: torch.Tensor | None,
    source_grads: Sequence[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients in the order of `op.ttm_pool_backward`; scores and weights are computed again."""
    call = Call.of(sources, positions, w1, b1, w2, b2, carry_out, carry_lse)
    grad_out, grad_lse = grad_out.contiguous(), grad_lse.contiguous()
    delta, carried = _rows_backward(call, grad_out, grad_lse, out, lse)
    weights, grad_scores, sums_b2 = _scores_backward(call, grad_out, lse, delta, hidden)
    grad_hidden, tilts, sums_b1 = grad_scores, None, sums_b2  # what linear scores are: a layer with a bias
    if not call.linear:
        grad_hidden, tilts, sums_b1 = _hidden_backward(call, grad_scores, hidden, stats)
    wanted = [grad or positions is not None for grad in source_grads]
    grads = _tokens_backward(call, wanted, grad_out, weights, grad_hidden, stats, tilts)
    parts_w1 = _w1_backward(call, grad_hidden)
    parts_w2 = None if call.linear else _w2_backward(call, hidden, grad_scores)
    found = [grad for grad, asked in zip(grads, source_grads, strict=True) if asked]
    if positions is not None:
        found.append(torch.cat([grad.sum(dim=0) for grad in grads]))
    return found + _sum_parts(call, parts_w1, parts_w2, sums_b1, sums_b2) + carried


def _rows_backward(
    call: Call, grad_out: torch.Tensor, grad_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    delta, carried = torch.empty_like(lse), []
    if call.carry_out is not None and call.carry_lse is not None:
        carried = [call.carry_out.new_empty(out.shape), call.carry_lse.new_empty(lse.shape)]
    tensors = [grad_out, grad_lse, out, lse, call.carry_out, call.carry_lse, delta, *(carried or (None, None))]
    launch(
        pool_bwd_rows_kernel, call.batch * call.k, tensors, call.carry_strides(),
        on=out, warps=4, D=call.d, K=call.k, BD=triton.next_power_of_2(call.d), ACC=accumulator(out.dtype),
    )  # fmt: skip
    return delta, carried


def _scores_backward(
    call: Call, grad_out: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax weights and gradients of the scores [B, p, K], and the sums of these over tiles [parts, K]."""
    block, tiles = call.config.scores, call.tiles(call.config.scores)
    weights, grad_scores = (hidden.new_empty(call.batch, call.tokens, call.k) for _ in range(2))
    sums = lse.new_empty(call.batch * tiles, call.k)
    call.walk(
        pool_bwd_scores_kernel, tiles * triton.cdiv(call.k, call.config.rows) * call.batch,
        [hidden, call.w2, call.b2, grad_out, lse, delta, weights, grad_scores, sums], [tiles], [], block,
        K=call.k, LINEAR=call.linear, BK=block.columns, BR=call.config.rows,
        WAIT=call.positions is not None and target(call.first.device).forgets_registers,
    )  # fmt: skip
    return weights, grad_scores, sums


def _hidden_backward(
    call: Call, grad_scores: torch.Tensor, hidden: torch.Tensor, stats: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of the hidden layer over the deviation [B, p, J], the norm's pull [B, p], sums over tiles [parts, J]."""
    block, items = call.config.grad_hidden, call.batch * call.tokens
    tiles = triton.cdiv(items, block.tokens)
    grad_hidden, tilts = torch.empty_like(hidden), stats.new_empty(stats.shape[1:])
    sums = stats.new_empty(4 * tiles, call.j)
    tensors = [hidden, stats, call.b1, call.w2, grad_scores, grad_hidden, tilts, sums]
    call.run(pool_bwd_hidden_kernel, tiles, tensors, [items], block, D=call.d, K=call.k, BR=block.columns)
    return grad_hidden, tilts, sums


def _tokens_backward(
    call: Call,
    wanted: Sequence[bool],
    grad_out: torch.Tensor,
    weights: torch.Tensor,
    grad_hidden: torch.Tensor,
    stats: torch.Tensor,
    tilts: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Gradients of the sources; those not wanted are not computed and hold nothing of use."""
    grads = [v.new_empty(v.shape) if want else v for v, want in zip(call.sources, wanted, strict=True)]
    if not any(wanted):
        return grads
    block, tiles = call.config.tokens, call.tiles(call.config.tokens)
    flags = dict(zip(("WANT_A", "WANT_B", "WANT_C"), [*wanted, False, False], strict=False))
    call.walk(
        pool_bwd_tokens_kernel, tiles * triton.cdiv(call.d, block.columns) * call.batch,
        [call.w1, grad_out, weights, grad_hidden, stats, tilts, *_three(grads)], [tiles], [], block,
        K=call.k, LINEAR=call.linear, BD=block.columns, BR=call.config.rows, **flags,
    )  # fmt: skip
    return grads


def _w1_backward(call: Call, grad_hidden: torch.Tensor) -> torch.Tensor:
    """[parts, J, d]."""
    block, tiles = call.config.weights, call.tiles(call.config.weights)
    blocks = triton.cdiv(call.d, block.columns) * triton.cdiv(call.j, call.config.hidden)
    parts = splits(blocks, tiles * call.batch, target(call.first.device))
    found = grad_hidden.new_empty(parts, call.j, call.d, dtype=call.acc)
    tensors, counts = [grad_hidden, found], [tiles, tiles * call.batch]
    call.walk(pool_bwd_w1_kernel, (blocks, parts), tensors, counts, [], block, BD=block.columns)
    return found


def _w2_backward(call: Call, hidden: torch.Tensor, grad_scores: torch.Tensor) -> torch.Tensor:
    """[parts, K, J]."""
    block, items, blocks = call.config.weights, call.batch * call.tokens, triton.cdiv(call.k, call.config.rows)
    parts = splits(blocks, triton.cdiv(items, block.tokens), target(call.first.device))
    found = hidden.new_empty(parts, call.k, call.j, dtype=call.acc)
    tensors = [hidden, grad_scores, found]
    call.run(pool_bwd_w2_kernel, (blocks, parts), tensors, [items], block, K=call.k, BR=call.config.rows)
    return found


def _sum_parts(
    call: Call, parts_w1: torch.Tensor, parts_w2: torch.Tensor | None, sums_b1: torch.Tensor, sums_b2: torch.Tensor
) -> list[torch.Tensor]:
    """Gradients of w1 and b1 in the precision of sums, of w2 and b2, from the parts that the other kernels left."""
    d, j, k = call.d, call.j, call.k
    grads = [parts_w1.new_empty(j, d), parts_w1.new_empty(j)]
    if call.w2 is not None and call.b2 is not None:
        grads += [call.w2.new_empty(k, j), call.b2.new_empty(k)]
    programs = j + triton.cdiv(j, 32) + (0 if call.linear else k + triton.cdiv(k, 32))
    numbers = [parts_w1.shape[0], 0 if parts_w2 is None else parts_w2.shape[0], sums_b1.shape[0], sums_b2.shape[0]]
    launch(
        pool_bwd_sums_kernel, programs, [parts_w1, parts_w2, sums_b1, sums_b2, *grads, *(None,) * (4 - len(grads))],
        numbers, on=call.first, warps=8, D=d, J=j, K=k, LINEAR=call.linear, BD=triton.next_power_of_2(d),
        BJ=triton.next_power_of_2(j), BB=32, ACC=accumulator(call.first.dtype),
    )  # fmt: skip
    return grads


def _three(given: Sequence[Any]) -> tuple[Any, Any, Any]:
    a, b, c = [*given, None, None, None][:3]
    return a, b, c
