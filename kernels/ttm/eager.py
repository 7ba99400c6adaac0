"""The `torch` backend of the TokenLearner summary: PyTorch's operators, with a backward of fewer passes than theirs.

Notation: v [B, p, d] tokens of all sources, positions added; x their LayerNorm without weight and bias; h = x w1^T + b1
[B p, J] the hidden layer (norm weight and bias folded into w1 and b1, so that rows of w1 have mean zero);
S [B, p, k] scores; A = softmax of S over the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..core.precision import accumulate_dtype
from .fold import fold
from .params import TokenLearnerParams
from .partials import Partial
from .reference import NORM_EPS


class TokenLearner:
    """TokenLearner v1.1 of parts of the tokens, see `partials.Summary`.

    Where nobody asks for gradients, or a compiler finds them, the formula runs as it stands.
    """

    def __init__(self, params: TokenLearnerParams, sizes: Sequence[int]) -> None:
        self.positions, self.sizes = params.positions, list(sizes)
        self.by_hand = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        norm, first = (params.norm_weight, params.norm_bias), (params.w1, params.b1)
        if self.by_hand:  # without weight and bias PyTorch's norm takes twice as long on a CPU: these change nothing
            norm = torch.ones_like(params.norm_weight), torch.zeros_like(params.norm_bias)
            w1, b1 = fold(params)
            first = w1.to(params.w1.dtype), b1.to(params.b1.dtype)
        self.network = (*norm, *first, params.w2, params.b2)

    def partial(self, parts: Mapping[int, torch.Tensor]) -> Partial:
        return self._run(parts, want_lse=True)

    def finish(self, parts: Mapping[int, torch.Tensor], carry: Partial | None = None) -> torch.Tensor:
        own = self._run(parts, want_lse=carry is not None)
        if carry is None or carry.lse is None or own.lse is None:
            return own.out
        merged = torch.logaddexp(own.lse, carry.lse)
        first, second = ((lse - merged).exp()[..., None].to(own.out.dtype) for lse in (own.lse, carry.lse))
        return own.out * first + carry.out * second

    def _run(self, parts: Mapping[int, torch.Tensor], want_lse: bool) -> Partial:
        pool = _Summary.apply if self.by_hand else _pool
        return Partial(*pool(want_lse, *self.network, self._places(parts), *parts.values())[:2])

    def _places(self, parts: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
        """Positions of these parts, one behind the other."""
        if self.positions is None or len(parts) == len(self.sizes):
            return self.positions
        split = self.positions.split(self.sizes)
        return torch.cat([split[part] for part in parts])


def _pool(
    want_lse: bool, norm_weight: Any, norm_bias: Any, w1: Any, b1: Any, w2: Any, b2: Any, positions: Any, *sources: Any
) -> tuple[Any, ...]:
    """out [B, k, d], lse [B, k] or None, and what backward needs: v, mean, 1 / deviation, h, gelu(h), A."""
    v = sources[0].contiguous() if len(sources) == 1 else torch.cat(sources, dim=1)
    v = v if positions is None else v + positions
    batch, p, d = v.shape
    x, mean, rstd = torch.native_layer_norm(v, (d,), norm_weight, norm_bias, NORM_EPS)
    h = torch.addmm(b1, x.view(-1, d), w1.t())
    g = torch.nn.functional.gelu(h, approximate="tanh")
    scores = torch.addmm(b2, g, w2.t()).view(batch, p, -1).transpose(1, 2)
    weights = scores.softmax(dim=2)
    lse = scores.to(accumulate_dtype(v.dtype)).logsumexp(dim=2) if want_lse else None
    return torch.bmm(weights, v), lse, v, mean, rstd, h, g, weights


class _Summary(torch.autograd.Function):
    """`_pool` with folded weights."""

    @staticmethod
    def forward(
        ctx: Any, want_lse: bool, one: Any, zero: Any, w1: Any, b1: Any, w2: Any, b2: Any, positions: Any, *sources: Any
    ) -> Any:
        out, lse, *saved = _pool(want_lse, one, zero, w1, b1, w2, b2, positions, *sources)
        ctx.sizes = [source.shape[1] for source in sources]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved, w1, b1, w2)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Any, grad_lse: Any) -> Any:
        """dS = A (dout v^T - sum_p A dout v^T + dlse).

        Rows of w1 have mean zero, so that the norm needs no backward of its own:
        dv = A^T dout + r dh w1 - t (v - mean), r = 1 / deviation, t = r^2 (dh . (h - b1)) / d; and
        the mean's part of dw1 = (r dh)^T (v - mean) is the same for all columns, which centring its rows removes.
        """
        v, mean, rstd, h, g, weights, w1, b1, w2 = ctx.saved_tensors
        d, acc = v.shape[2], accumulate_dtype(v.dtype)
        grad_out = v.new_zeros(v.shape[0], weights.shape[1], d) if grad_out is None else grad_out
        reach = torch.bmm(v, grad_out.transpose(1, 2)).transpose(1, 2)
        grad_scores = torch.ops.aten._softmax_backward_data(reach, weights, 2, weights.dtype)
        if grad_lse is not None:
            grad_scores = grad_scores + weights * grad_lse[..., None].to(weights.dtype)
        grad_scores = grad_scores.transpose(1, 2).flatten(0, 1)  # [B p, k]
        grad_h = torch.ops.aten.gelu_backward(torch.mm(grad_scores, w2), h, approximate="tanh")
        r = rstd.view(-1, 1).to(acc)
        scaled = (grad_h * r).to(v.dtype)
        grads = [torch.mm(scaled.t(), v.flatten(0, 1)), _sum(grad_h), torch.mm(grad_scores.t(), g), _sum(grad_scores)]
        needed = ctx.needs_input_grad[7:]
        if not any(needed):
            return None, None, None, *grads, *([None] * len(needed))
        tilt = torch.linalg.vecdot(grad_h.to(acc), (h - b1).to(acc))[:, None].mul_(r).mul_(r).div_(d)
        grad_v = torch.bmm(weights.transpose(1, 2), grad_out)
        left = torch.cat([scaled, (tilt * mean.view(-1, 1)).to(v.dtype)], dim=1)
        flat = grad_v.view(-1, d)
        torch.addmm(flat, left, torch.cat([w1, w1.new_ones(1, d)]), out=flat)
        flat.addcmul_(v.view(-1, d), tilt.to(v.dtype), value=-1)
        grad_positions = None
        if needed[0]:
            grad_positions = grad_v[0] if len(grad_v) == 1 else grad_v.sum(dim=0)
        return None, None, None, *grads, grad_positions, *grad_v.split(ctx.sizes, dim=1)


def _sum(rows: torch.Tensor) -> torch.Tensor:
    return rows.sum(dim=0, dtype=accumulate_dtype(rows.dtype)).to(rows.dtype)
