"""Pooling in PyTorch's own operators: the `torch` backend, with a backward of fewer passes than theirs.

Notation: v [B, p, d] tokens of all sources, positions added; x their LayerNorm without weight and bias; h = x w1^T + b1
[B, p, J] the hidden layer (norm weight and bias folded into w1 and b1, so that rows of w1 have mean zero);
S [B, p, k] scores; A = softmax of S over the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from mirasol.kernels.core.precision import accumulate_dtype
from mirasol.kernels.core.registration import apply, differentiable_once, transformed
from mirasol.kernels.ttm.params import TokenLearnerParams
from mirasol.kernels.ttm.reference import NORM_EPS
from mirasol.kernels.ttm.summary import PUBLIC, Partial


class Network(NamedTuple):
    """A TokenLearner's norm and two layers; by_hand: with weights folded, and a backward that relies on it."""

    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor
    by_hand: bool


def by_hand() -> bool:
    """Whether backward is ours; the formula runs as it stands where nobody asks for gradients or others find them."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not transformed()


def fold(params: TokenLearnerParams) -> tuple[torch.Tensor, torch.Tensor]:
    """W1 (x g + c) + b1 = (W1 g) x + (W1 c + b1); rows of W1 g are centred, which is free as x has mean zero."""
    acc = accumulate_dtype(params.w1.dtype)
    w1 = params.w1.to(acc)
    weighted = w1 * params.norm_weight.to(acc)
    bias = params.b1.to(acc) + (w1 * params.norm_bias.to(acc)).sum(dim=-1)
    return weighted - weighted.mean(dim=-1, keepdim=True), bias


def network(params: TokenLearnerParams) -> Network:
    """The form in which `pool` takes a TokenLearner: once for all chunks."""
    if not by_hand():
        return Network(*params[:6], False)
    w1, b1 = fold(params)
    # Without weight and bias PyTorch's norm takes twice as long on a CPU; these change nothing.
    one, zero = torch.ones_like(params.norm_weight), torch.zeros_like(params.norm_bias)
    return Network(one, zero, w1.to(params.w1.dtype), b1.to(params.b1.dtype), params.w2, params.b2, True)


def pool(
    sources: Sequence[torch.Tensor],
    positions: torch.Tensor | None,
    network: Network,
    carry: Partial | None,
    want_lse: bool,
) -> Partial:
    """Tokens of all sources, each [B, p_i, d], with positions [p, d], pooled under its scores, merged with `carry`."""
    args: Any = want_lse or carry is not None, *network[:6], positions, *sources
    own = apply(PUBLIC, _Pool, *args) if network.by_hand else _pool(*args)[:2]
    return _merged(Partial(*own), carry)


def join(sources: Sequence[torch.Tensor], positions: torch.Tensor | None) -> torch.Tensor:
    """[B, p, d], contiguous."""
    if len(sources) == 1:
        return sources[0].contiguous() if positions is None else sources[0] + positions
    v = torch.cat(list(sources), dim=1)
    if positions is None:
        return v
    return v + positions if transformed() else v.add_(positions)  # vmap cannot add what it maps over in place


def products(rows: torch.Tensor, tokens: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """rows [k, c] times tokens [B, p, c], plus shift [k]: [B, k, p]."""
    return torch.baddbmm(shift[:, None], rows.expand(tokens.shape[0], -1, -1), tokens.mT)


def attend(scores: torch.Tensor, values: torch.Tensor, carry: Partial | None, want_lse: bool) -> Partial:
    """Softmax of scores [..., k, p] over the tokens, and the weighted mean of values [..., p, c], and `carry`."""
    if carry is None and not want_lse:
        return Partial(torch.matmul(scores.softmax(dim=-1), values), None)
    lse = scores.to(accumulate_dtype(scores.dtype)).logsumexp(dim=-1)
    weights = (scores - lse[..., None]).exp().to(values.dtype)
    return _merged(Partial(torch.matmul(weights, values), lse), carry)


def _merged(own: Partial, carry: Partial | None) -> Partial:
    """Both together, weighted by their softmax denominators."""
    if carry is None or carry.lse is None or own.lse is None:
        return own
    total = torch.logaddexp(own.lse, carry.lse)
    first, second = ((lse - total).exp()[..., None].to(own.out.dtype) for lse in (own.lse, carry.lse))
    return Partial(own.out * first + carry.out * second, total)


def recorded() -> bool:
    """Whether PyTorch, a compiler or a transform follows what is computed, so that nothing may be written in place."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed()


def gelu(h: torch.Tensor) -> torch.Tensor:
    """The tanh form, h sigmoid(2 sqrt(2 / pi) (h + 0.044715 h^3)); PyTorch's own takes twice as long on a CPU."""
    if recorded() or h.device.type != "cpu" or h.dtype not in (torch.float32, torch.float64):
        return F.gelu(h, approximate="tanh")
    u = h * h
    return torch.addcmul(h, u, h, value=0.044715, out=u).mul_(1.5957691216057308).sigmoid_().mul_(h)


def _pool(
    want_lse: bool, norm_weight: Any, norm_bias: Any, w1: Any, b1: Any, w2: Any, b2: Any, positions: Any, *sources: Any
) -> tuple[Any, ...]:
    """out [B, k, d], lse [B, k] or None, and what backward needs: v, mean, 1 / deviation, h, gelu(h), A."""
    v = join(sources, positions)
    x, mean, rstd = torch.native_layer_norm(v, v.shape[2:], norm_weight, norm_bias, NORM_EPS)
    h = F.linear(x, w1, b1)
    g = gelu(h)
    scores = F.linear(g, w2, b2)
    weights = scores.softmax(dim=1)
    lse = scores.to(accumulate_dtype(v.dtype)).logsumexp(dim=1) if want_lse else None
    return torch.bmm(weights.mT, v), lse, v, mean, rstd, h, g, weights


class _Pool(torch.autograd.Function):
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
    @differentiable_once(PUBLIC)
    def backward(ctx: Any, grad_out: Any, grad_lse: Any) -> Any:
        """dS = A (dout v^T - sum_p A dout v^T + dlse).

        Rows of w1 have mean zero, so that the norm needs no backward of its own:
        dv = A^T dout + r dh w1 - t (v - mean), r = 1 / deviation, t = r^2 (dh . (h - b1)) / d; and
        the mean's part of dw1 = (r dh)^T (v - mean) is the same for all columns, which centring its rows removes.
        """
        v, mean, rstd, h, g, weights, w1, b1, w2 = ctx.saved_tensors
        h, g = h.flatten(0, 1), g.flatten(0, 1)
        d, acc = v.shape[2], accumulate_dtype(v.dtype)
        grad_out = v.new_zeros(v.shape[0], weights.shape[2], d) if grad_out is None else grad_out
        reach = torch.bmm(v, grad_out.mT)  # [B, p, k]
        grad_scores = torch.ops.aten._softmax_backward_data(reach, weights, 1, weights.dtype)
        if grad_lse is not None:
            grad_scores.addcmul_(weights, grad_lse[:, None].to(weights.dtype))
        grad_scores = grad_scores.flatten(0, 1)
        grad_h = torch.ops.aten.gelu_backward(torch.mm(grad_scores, w2), h, approximate="tanh")
        r = rstd.view(-1, 1).to(acc)
        scaled = (grad_h * r).to(v.dtype)
        grads = [torch.mm(scaled.t(), v.flatten(0, 1)), _sum(grad_h), torch.mm(grad_scores.t(), g), _sum(grad_scores)]
        needed = ctx.needs_input_grad[7:]
        if not any(needed):
            return None, None, None, *grads, *([None] * len(needed))
        tilt = torch.linalg.vecdot(grad_h.to(acc), (h - b1).to(acc))[:, None].mul_(r).mul_(r).div_(d)
        grad_v = torch.bmm(weights, grad_out)
        flat = grad_v.view(-1, d)
        torch.addmm(flat, scaled, w1, out=flat)
        flat.addcmul_(v.view(-1, d), tilt.to(v.dtype), value=-1).add_((tilt * mean.view(-1, 1)).to(v.dtype))
        grad_positions = None
        if needed[0]:
            grad_positions = grad_v[0] if len(grad_v) == 1 else grad_v.sum(dim=0)
        return None, None, None, *grads, grad_positions, *grad_v.split(ctx.sizes, dim=1)


def _sum(rows: torch.Tensor) -> torch.Tensor:
    return rows.sum(dim=0, dtype=accumulate_dtype(rows.dtype)).to(rows.dtype)
