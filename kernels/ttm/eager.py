"""The `torch` backend of the TokenLearner summary: no concatenation of tokens, one block of the batch at a time.

Notation: v [B, p, d] tokens of all sources; x their LayerNorm without weight and bias; h = x w1^T + b1 [B, p, J] the
hidden layer of all summaries side by side (norm weight and bias are folded into w1 and b1 by the caller, rows of w1
have mean zero); S [B, p, K] scores; A = exp(S - lse) the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from ..core.numerics import accumulate_dtype

NORM_EPS = 1e-6
_BLOCK_BYTES = 2 << 20  # tokens worked on at a time, so that they stay in the last-level cache of a core


def summary_forward(
    sources: Sequence[torch.Tensor],
    positions: Sequence[torch.Tensor],
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: Sequence[torch.Tensor],
    b2: Sequence[torch.Tensor],
    carry_out: torch.Tensor | None,
    carry_lse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes and meaning as in `ops.ttm_summary`."""
    first = sources[0]
    dtype, acc = first.dtype, accumulate_dtype(first.dtype)
    batch, d = first.shape[0], first.shape[2]
    spans = _spans(sources)
    tokens, k = spans[-1].stop, sum(w.shape[0] for w in w2)
    out = first.new_empty(batch, k, d)
    lse = first.new_empty(batch, k, dtype=acc)
    hidden = first.new_empty(batch, tokens, w1.shape[0])
    kept = first.new_empty(batch, tokens, k)
    weights_t, bias = w1.to(dtype).t(), b1.to(dtype)
    for b in _blocks(first, tokens):
        values = [_tokens(v, positions, i, b) for i, v in enumerate(sources)]
        for v, span in zip(values, spans, strict=True):
            hidden[b, span] = torch.addmm(bias, _normalise(v)[0], weights_t).unflatten(0, v.shape[:2])
        scores = _scores(torch.nn.functional.gelu(hidden[b], approximate="tanh"), w2, b2).to(acc)
        top = scores.amax(dim=1)
        if carry_lse is not None:
            top = torch.maximum(top, carry_lse[b])
        weights = scores.sub_(top[:, None]).exp_()
        total = weights.sum(dim=1)
        carried = None
        if carry_lse is not None:
            carried = (carry_lse[b] - top).exp_()
            total += carried
        lse[b] = total.log().add_(top)
        weights = kept[b].copy_(weights.div_(total[:, None]))
        block = out[b]
        for i, (v, span) in enumerate(zip(values, spans, strict=True)):
            block.baddbmm_(weights[:, span].transpose(1, 2), v, beta=1 if i else 0)
        if carried is not None and carry_out is not None:
            block.addcmul_(carry_out[b], (carried / total)[..., None].to(dtype))
    return out, lse, hidden, kept


def summary_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    hidden: torch.Tensor,
    weights: torch.Tensor,
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
    """Gradients in the order of `ops.ttm_summary_backward`.

    dS = A (dout v^T - delta) with delta = dout . out - dlse; the carried partial has the weight exp(carry_lse - lse).
    The norm's backward needs no pass of its own: rows of w1 have mean zero, so that
    dv = rstd (dh w1 - x (dh . (h - b1)) / d) + A^T dout.
    """
    first = sources[0]
    dtype, acc, d = first.dtype, lse.dtype, first.shape[2]
    spans = _spans(sources)
    delta = (grad_out.to(acc) * out.to(acc)).sum(dim=-1) - grad_lse
    grad_sources = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in sources]
    grad_w1, grad_b1 = torch.zeros_like(w1), torch.zeros_like(b1)
    grad_w2, grad_b2 = [torch.zeros_like(w, dtype=acc) for w in w2], [torch.zeros_like(b, dtype=acc) for b in b2]
    weights1, bias1 = w1.to(dtype), b1.to(acc)
    for b in _blocks(first, hidden.shape[1]):
        values = [_tokens(v, positions, i, b) for i, v in enumerate(sources)]
        h = hidden[b]
        g = torch.nn.functional.gelu(h, approximate="tanh")
        reach = [torch.bmm(v, grad_out[b].transpose(1, 2)) for v in values]
        grad_scores = (reach[0] if len(reach) == 1 else torch.cat(reach, dim=1)).to(acc)
        grad_scores = grad_scores.sub_(delta[b][:, None]).mul_(weights[b])
        grad_h = torch.ops.aten.gelu_backward(
            _scores_backward(grad_scores, g, w2, grad_w2, grad_b2), h, approximate="tanh"
        )
        grad_b1 += grad_h.sum(dim=(0, 1), dtype=acc)
        drift = (h.to(acc) - bias1).mul_(grad_h).sum(dim=-1) / d  # [b, p]
        for i, (v, span) in enumerate(zip(values, spans, strict=True)):
            normed, rstd = _normalise(v)
            rows = grad_h[:, span].reshape(-1, grad_h.shape[2])
            _add_product(grad_w1, rows.t(), normed)
            if not (source_grads[i] or positions):
                continue
            scaled = (rows * rstd).to(dtype)
            tilt = (drift[:, span].reshape(-1, 1) * rstd).to(dtype)
            grad_v = grad_sources[i][b]
            torch.bmm(weights[b, span], grad_out[b], out=grad_v)
            grad_v.view(-1, d).addmm_(scaled, weights1).addcmul_(normed, tilt, value=-1)
    grads = [grad for grad, wanted in zip(grad_sources, source_grads, strict=True) if wanted]
    grads += [grad.sum(dim=0) for grad, _ in zip(grad_sources, positions, strict=False)]
    grads += [grad_w1, grad_b1]
    grads += [grad.to(w.dtype) for grad, w in zip(grad_w2, w2, strict=True)]
    grads += [grad.to(b.dtype) for grad, b in zip(grad_b2, b2, strict=True)]
    if carry_out is not None and carry_lse is not None:
        share = (carry_lse - lse).exp()
        grads.append((share[..., None] * grad_out).to(carry_out.dtype))
        grads.append(share * ((grad_out.to(acc) * carry_out.to(acc)).sum(dim=-1) - delta))
    return grads


def _blocks(first: torch.Tensor, tokens: int) -> Iterator[slice]:
    """Slices of the batch that hold about `_BLOCK_BYTES` of tokens each; off the CPU all of it at once."""
    batch, _, d = first.shape
    size = max(1, _BLOCK_BYTES // (tokens * d * first.element_size())) if first.device.type == "cpu" else batch
    for start in range(0, batch, size):
        yield slice(start, min(batch, start + size))


def _spans(sources: Sequence[torch.Tensor]) -> list[slice]:
    """Where each source's tokens stand among all tokens."""
    ends = [0]
    for v in sources:
        ends.append(ends[-1] + v.shape[1])
    return [slice(start, end) for start, end in pairwise(ends)]


def _tokens(v: torch.Tensor, positions: Sequence[torch.Tensor], source: int, block: slice) -> torch.Tensor:
    return v[block] + positions[source] if positions else v[block]


def _normalise(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """v [b, p, d] -> x [b p, d] and 1 / standard deviation [b p, 1] in the precision of sums."""
    normed, _, rstd = torch.native_layer_norm(v, v.shape[-1:], None, None, NORM_EPS)
    return normed.flatten(0, 1), rstd.reshape(-1, 1).to(accumulate_dtype(v.dtype))


def _scores(g: torch.Tensor, w2: Sequence[torch.Tensor], b2: Sequence[torch.Tensor]) -> torch.Tensor:
    """g [b, p, J] -> S [b, p, K]; summary i sees its own part of J only."""
    rows, column, start = g.flatten(0, 1), 0, 0
    scores = g.new_empty(rows.shape[0], sum(w.shape[0] for w in w2))
    for weight, bias in zip(w2, b2, strict=True):
        own, end = rows[:, start : start + weight.shape[1]], column + weight.shape[0]
        torch.addmm(bias.to(g.dtype), own, weight.to(g.dtype).t(), out=scores[:, column:end])
        column, start = end, start + weight.shape[1]
    return scores.unflatten(0, g.shape[:2])


def _scores_backward(
    grad_scores: torch.Tensor,
    g: torch.Tensor,
    w2: Sequence[torch.Tensor],
    grad_w2: Sequence[torch.Tensor],
    grad_b2: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Add to the gradients of w2 and b2 and return that of g [b, p, J]."""
    column, start = 0, 0
    rows, hidden = grad_scores.flatten(0, 1), g.flatten(0, 1)
    lowered = rows.to(g.dtype)
    grad_g = torch.empty_like(g)
    for i, weight in enumerate(w2):
        end, stop = column + weight.shape[0], start + weight.shape[1]
        own = lowered[:, column:end]
        _add_product(grad_w2[i], own.t(), hidden[:, start:stop])
        grad_b2[i].add_(rows[:, column:end].sum(dim=0))
        torch.mm(own, weight.to(g.dtype), out=grad_g.view(-1, g.shape[2])[:, start:stop])
        column, start = end, stop
    return grad_g


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, where the sum may be kept in a wider type than the factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
