"""Launches of the summary kernels: the same two functions as eager.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from mirasol.kernels.core.checks import expect
from mirasol.kernels.core.device import interpreted, on_device, target
from mirasol.kernels.core.precision import accumulate_dtype
from mirasol.kernels.ttm.configs import Tile, Tiles, pool_splits, splits, tiles
from mirasol.kernels.ttm.reference import NORM_EPS
from mirasol.kernels.ttm.triton_backward import (
    summary_bwd_hidden_kernel,
    summary_bwd_rows_kernel,
    summary_bwd_scores_kernel,
    summary_bwd_sums_kernel,
    summary_bwd_tokens_kernel,
    summary_bwd_w1_kernel,
    summary_bwd_w2_kernel,
)
from mirasol.kernels.ttm.triton_forward import (
    summary_hidden_fwd_kernel,
    summary_merge_fwd_kernel,
    summary_pool_fwd_kernel,
)


@dataclass(frozen=True)
class Call:
    """One call's tensors as the kernels take them; missing sources are None and have no tokens."""

    sources: list[torch.Tensor]
    places: list[torch.Tensor]
    w1: torch.Tensor  # [J, d] in the dtype of the tokens
    b1: torch.Tensor  # [J] in the precision of sums
    w2: list[torch.Tensor]  # one or two of [k_i, J_i]; none where scores are linear in the tokens, then K = J
    b2: list[torch.Tensor]  # [k_i]
    carry_out: torch.Tensor | None
    carry_lse: torch.Tensor | None
    tiles: Tiles

    @staticmethod
    def of(
        sources: Sequence[torch.Tensor],
        positions: Sequence[torch.Tensor],
        w1: torch.Tensor,
        b1: torch.Tensor,
        w2: Sequence[torch.Tensor],
        b2: Sequence[torch.Tensor],
        carry_out: torch.Tensor | None,
        carry_lse: torch.Tensor | None,
    ) -> Call:
        """Strides are taken as they are; a last dimension that is not contiguous costs a copy of that tensor."""
        first = sources[0]
        expect(len(w2) <= 2, "w2", "hold one or two summaries side by side", len(w2))
        j = w1.shape[0]
        k = sum(w.shape[0] for w in w2) if w2 else j
        return Call(
            [v if v.stride(-1) == 1 else v.contiguous() for v in sources],
            [place.contiguous() for place in positions],
            w1.to(first.dtype).contiguous(),
            b1.contiguous(),
            [weight.contiguous() for weight in w2],
            [bias.contiguous() for bias in b2],
            carry_out if carry_out is None or carry_out.stride(-1) == 1 else carry_out.contiguous(),
            carry_lse,
            tiles(k, j, first.shape[2], first.element_size(), target(first.device), linear=not w2),
        )

    @property
    def first(self) -> torch.Tensor:
        return self.sources[0]

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, tokens of all sources, d, J, K."""
        batch, _, d = self.first.shape
        j = self.w1.shape[0]
        return batch, sum(v.shape[1] for v in self.sources), d, j, sum(w.shape[0] for w in self.w2) or j

    @property
    def linear(self) -> bool:
        return not self.w2

    @property
    def acc(self) -> torch.dtype:
        return accumulate_dtype(self.first.dtype)

    def count(self, tile: Tile) -> int:
        """How many tiles the tokens of one batch item make; none straddles sources."""
        return sum(triton.cdiv(v.shape[1], tile.tokens) for v in self.sources)

    def pointers(self) -> tuple[Any, ...]:
        """a, b, c, places_a, places_b, places_c."""
        return (*_three(self.sources), *_three(self.places))

    def lengths(self) -> tuple[int, ...]:
        """n_a, n_b, n_c."""
        return tuple(0 if v is None else v.shape[1] for v in _three(self.sources))

    def strides(self) -> tuple[int, ...]:
        """Between batch items, then between tokens, of the three sources."""
        given = _three(self.sources)
        return tuple(0 if v is None else v.stride(dim) for dim in (0, 1) for v in given)

    def carry_strides(self) -> tuple[int, ...]:
        if self.carry_out is None or self.carry_lse is None:
            return 0, 0, 0, 0
        return self.carry_out.stride(0), self.carry_out.stride(1), *self.carry_lse.stride()

    def second_layer(self) -> tuple[Any, ...]:
        """w2_a, w2_b, b2_a, b2_b."""
        return *_three(self.w2)[:2], *_three(self.b2)[:2]

    def first_summary(self) -> dict[str, int]:
        """How much of J and K belongs to the first of two summaries side by side."""
        return dict(JA=self.w2[0].shape[1], KA=self.w2[0].shape[0]) if self.w2 else dict(JA=0, KA=0)

    def constants(self) -> dict[str, Any]:
        """What all kernels that walk over tokens are compiled for."""
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 and not interpreted() else "ieee"
        return dict(
            D=self.first.shape[2],
            J=self.w1.shape[0],
            SOURCES=len(self.sources),
            POSITIONS=bool(self.places),
            BJ=self.tiles.hidden,
            ACC=tl.float64 if self.acc == torch.float64 else tl.float32,
            PRECISION=precision,
        )


def summary_forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes and meaning as in `ops.ttm_summary`."""
    call = Call.of(*args)
    with on_device(call.first):
        hidden, stats = _hidden(call)
        out, lse = _pool(call, hidden)
    return out, lse, hidden, stats


def _hidden(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, _, j, _ = call.sizes
    tile = call.tiles.hidden_layer
    hidden = call.first.new_empty(batch, tokens, j)
    stats = call.first.new_empty(0 if call.linear else 2, batch, tokens, dtype=call.acc)
    summary_hidden_fwd_kernel[(call.count(tile), triton.cdiv(j, call.tiles.hidden), batch)](
        *call.pointers(), call.w1, call.b1, hidden, stats, *call.lengths(), tokens, *call.strides(), NORM_EPS,
        LINEAR=call.linear, BP=tile.tokens, BK=tile.columns, **call.constants(),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return hidden, stats


def _pool(call: Call, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, d, _, k = call.sizes
    tile, steps = call.tiles.pool, call.count(call.tiles.pool)
    blocks = triton.cdiv(d, tile.columns) * triton.cdiv(k, call.tiles.rows)
    parts = pool_splits(blocks * batch, steps, target(call.first.device))
    out = call.first.new_empty(batch, k, d)
    lse = call.first.new_empty(batch, k, dtype=call.acc)
    tops = sums = rows = None
    if parts > 1:
        tops, sums = (lse.new_empty(batch, parts, k) for _ in range(2))
        rows = lse.new_empty(batch, parts, k, d)
    carry = dict(CARRY=call.carry_out is not None, K=k)
    summary_pool_fwd_kernel[(blocks, parts, batch)](
        *call.pointers(), hidden, *call.second_layer(), out, lse, call.carry_out, call.carry_lse, tops, sums, rows,
        *call.lengths(), tokens, steps, *call.strides(), *call.carry_strides(), LINEAR=call.linear, SPLIT=parts > 1,
        BP=tile.tokens, BD=tile.columns, BR=call.tiles.rows, **carry, **call.first_summary(), **call.constants(),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts > 1:
        summary_merge_fwd_kernel[(k, batch)](
            tops, sums, rows, call.carry_out, call.carry_lse, out, lse, *call.carry_strides(),
            D=d, SPLITS=parts, BD=triton.next_power_of_2(d), ACC=call.constants()["ACC"], **carry, num_warps=4,
        )  # fmt: skip
    return out, lse


def summary_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    hidden: torch.Tensor,
    stats: torch.Tensor,
    sources: Sequence[torch.Tensor],
    positions: Sequence[torch.Tensor],
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: Sequence[torch.Tensor],
    b2: Sequence[torch.Tensor],
    carry_out: torch.Tensor | None,
    carry_lse: torch.Tensor | None,
    source_grads: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients in the order of `ops.ttm_summary_backward`; scores and weights are computed again."""
    call = Call.of(sources, positions, w1, b1, w2, b2, carry_out, carry_lse)
    wanted = [grad or bool(positions) for grad in source_grads]
    grad_out, grad_lse = grad_out.contiguous(), grad_lse.contiguous()
    with on_device(call.first):
        delta, carried = _rows_backward(call, grad_out, grad_lse, out, lse)
        weights, grad_scores, sums_b2 = _scores_backward(call, grad_out, lse, delta, hidden)
        grad_hidden, tilts, sums_b1 = grad_scores, None, sums_b2  # what linear scores are: a layer with a bias
        if not call.linear:
            grad_hidden, tilts, sums_b1 = _hidden_backward(call, grad_scores, hidden, stats)
        grads = _tokens_backward(call, wanted, grad_out, weights, grad_hidden, stats, tilts)
        parts_w1 = _w1_backward(call, grad_hidden)
        parts_w2 = None if call.linear else _w2_backward(call, hidden, grad_scores)
        of_layers = _sum_parts(call, (w1, b1, *w2, *b2), parts_w1, parts_w2, sums_b1, sums_b2)
    result = [grad for grad, asked in zip(grads, source_grads, strict=True) if asked]
    result += [grads[i].sum(dim=0) for i in range(len(positions))]
    return result + of_layers + carried


def _rows_backward(
    call: Call, grad_out: torch.Tensor, grad_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    batch, _, d, _, k = call.sizes
    delta = torch.empty_like(lse)
    carried = []
    if call.carry_out is not None and call.carry_lse is not None:
        carried = [call.carry_out.new_empty(batch, k, d), call.carry_lse.new_empty(batch, k)]
    summary_bwd_rows_kernel[(k, batch)](
        grad_out, grad_lse, out, lse, call.carry_out, call.carry_lse, delta, *(carried or (None, None)),
        *call.carry_strides(), D=d, K=k, CARRY=bool(carried), BD=triton.next_power_of_2(d),
        ACC=call.constants()["ACC"], num_warps=4,
    )  # fmt: skip
    return delta, carried


def _scores_backward(
    call: Call, grad_out: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax weights and gradients of the scores [B, p, K], and the sums of these over tiles [parts, K]."""
    batch, tokens, _, _, k = call.sizes
    tile, steps = call.tiles.scores, call.count(call.tiles.scores)
    weights, grad_scores = (hidden.new_empty(batch, tokens, k) for _ in range(2))
    sums = lse.new_empty(batch, steps, k)
    summary_bwd_scores_kernel[(steps, triton.cdiv(k, call.tiles.rows), batch)](
        *call.pointers(), hidden, *call.second_layer(), grad_out, lse, delta, weights, grad_scores, sums,
        *call.lengths(), tokens, steps, *call.strides(), K=k, LINEAR=call.linear,
        BP=tile.tokens, BK=tile.columns, BR=call.tiles.rows, **call.first_summary(), **call.constants(),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return weights, grad_scores, sums.flatten(0, 1)


def _hidden_backward(
    call: Call, grad_scores: torch.Tensor, hidden: torch.Tensor, stats: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of the hidden layer over the deviation [B, p, J], the norm's pull [B, p], sums over tiles [parts, J]."""
    batch, tokens, d, j, k = call.sizes
    tile = call.tiles.grad_hidden
    steps = triton.cdiv(batch * tokens, tile.tokens)
    grad_hidden, tilts, sums = torch.empty_like(hidden), stats.new_empty(batch, tokens), stats.new_empty(steps, j)
    constants = call.constants()
    summary_bwd_hidden_kernel[(steps,)](
        hidden, stats, call.b1, *call.second_layer()[:2], grad_scores, grad_hidden, tilts, sums, batch * tokens,
        D=d, J=j, K=k, **call.first_summary(), BP=tile.tokens, BJ=call.tiles.hidden, BR=tile.columns,
        ACC=constants["ACC"], PRECISION=constants["PRECISION"], num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
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
    batch, tokens, d, _, k = call.sizes
    grads = [v.new_empty(v.shape) if want else v for v, want in zip(call.sources, wanted, strict=True)]
    if not any(wanted):
        return grads
    tile = call.tiles.tokens
    flags = [*wanted, False, False]
    summary_bwd_tokens_kernel[(call.count(tile), triton.cdiv(d, tile.columns), batch)](
        *call.pointers(), call.w1, grad_out, weights, grad_hidden, stats, tilts,
        *_three(grads), *call.lengths(), tokens, *call.strides(), K=k, LINEAR=call.linear,
        WANT_A=flags[0], WANT_B=flags[1], WANT_C=flags[2],
        BP=tile.tokens, BD=tile.columns, BR=call.tiles.rows, **call.constants(),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return grads


def _w1_backward(call: Call, grad_hidden: torch.Tensor) -> torch.Tensor:
    """[parts, J, d]."""
    batch, tokens, d, j, _ = call.sizes
    tile = call.tiles.weights
    steps, blocks = call.count(tile), triton.cdiv(d, tile.columns) * triton.cdiv(j, call.tiles.hidden)
    parts = splits(blocks, steps * batch, target(call.first.device))
    partial = grad_hidden.new_empty(parts, j, d, dtype=call.acc)
    summary_bwd_w1_kernel[(blocks, parts)](
        *call.pointers(), grad_hidden, partial, *call.lengths(), tokens, steps, steps * batch, *call.strides(),
        BP=tile.tokens, BD=tile.columns, **call.constants(),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partial


def _w2_backward(call: Call, hidden: torch.Tensor, grad_scores: torch.Tensor) -> torch.Tensor:
    """[parts, K, J]."""
    batch, tokens, _, j, k = call.sizes
    tile, blocks = call.tiles.weights, triton.cdiv(k, call.tiles.rows)
    parts = splits(blocks, triton.cdiv(batch * tokens, tile.tokens), target(call.first.device))
    partial = hidden.new_empty(parts, k, j, dtype=call.acc)
    constants = call.constants()
    summary_bwd_w2_kernel[(blocks, parts)](
        hidden, grad_scores, partial, batch * tokens,
        J=j, K=k, BP=tile.tokens, BJ=call.tiles.hidden, BR=call.tiles.rows,
        ACC=constants["ACC"], PRECISION=constants["PRECISION"], num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partial


def _sum_parts(
    call: Call,
    layers: Sequence[torch.Tensor],
    parts_w1: torch.Tensor,
    parts_w2: torch.Tensor | None,
    sums_b1: torch.Tensor,
    sums_b2: torch.Tensor,
) -> list[torch.Tensor]:
    """Gradients of w1, b1 and of every w2, then every b2, from the parts that the other kernels left."""
    _, _, d, j, k = call.sizes
    grads = [layer.new_empty(layer.shape) for layer in layers]
    of_second = grads[2:]
    count = len(of_second) // 2
    blocks = triton.cdiv(j, 32) + (0 if call.linear else k + triton.cdiv(k, 32))
    summary_bwd_sums_kernel[(j + blocks,)](
        parts_w1, parts_w2, sums_b1, sums_b2,
        *grads[:2], *_three(of_second[:count])[:2], *_three(of_second[count:])[:2],
        parts_w1.shape[0], 0 if parts_w2 is None else parts_w2.shape[0], sums_b1.shape[0], sums_b2.shape[0],
        D=d, J=j, K=k, LINEAR=call.linear, **call.first_summary(), BD=triton.next_power_of_2(d),
        BJ=triton.next_power_of_2(j), BB=32, ACC=call.constants()["ACC"], num_warps=8,
    )  # fmt: skip
    return grads


def _three(given: Sequence[Any]) -> tuple[Any, Any, Any]:
    a, b, c = [*given, None, None, None][:3]
    return a, b, c
