"""Chunked attention in eager PyTorch: no dense mask, no work on hidden blocks, memory linear in the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn.functional import pad

from mirasol.kernels.attention.cover import Call, Cover, Price, additive_mask, cover
from mirasol.kernels.attention.op import empty_like, tokens_first
from mirasol.kernels.attention.products import attend, attend_backward
from mirasol.kernels.attention.visibility import Rule
from mirasol.kernels.core.dispatch import rows_contiguous
from mirasol.kernels.core.precision import accumulate_dtype

PLAIN_ROWS = 512  # of scores that exist at a time where products are plain
WAIT = 2**23  # pairs in the time that a call waits twice for a thread whose core is busy
# Measured for 64 columns on an AVX-512 machine; half precision packs its operands, backward for each attention.
FORWARD = {4: Price(12000, 120, 3), 2: Price(12000, 300, 12)}  # by bytes
BACKWARD = {4: Price(12000, 200, 16), 2: Price(30000, 5500, 8, 256)}


def merge_partials(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys from out [..., D] and lse [...] over each of them."""
    top = torch.maximum(lse_a, lse_b).detach()
    top = top.masked_fill(top == float("-inf"), 0.0)  # nothing visible in either: weights exp(-inf - 0) = 0
    w_a, w_b = (lse_a - top).exp(), (lse_b - top).exp()
    total = w_a + w_b
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    out = (w_a / total).unsqueeze(-1) * out_a + (w_b / total).unsqueeze(-1) * out_b
    return out.to(out_a.dtype), (top + total.log()).masked_fill(empty, float("-inf"))


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, Nq, D], k and v [B, Hkv, Nk, D] -> out [B, H, Nq, D] in the order of q, lse [B, H, Nq]."""
    calls, blind = _cover(rule, q, k, FORWARD)
    like = q
    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    if calls and not blind and all(call.first and call.times == 1 for call in calls):
        outs, lses = zip(*(_attend_rows(q, k, v, call, scale) for call in calls), strict=True)
        return _joined(outs, like), lses[0].contiguous() if len(lses) == 1 else torch.cat(lses, 2)
    out, lse = empty_like(like), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    if blind:
        out.zero_()
        lse.fill_(-torch.inf)
    for call in calls:
        mask = _mask(call, q)
        for take in _takes(call, (q, k, v, out, lse)):
            q_part, out_part, lse_part = (take(t, call.q0, call.rows, call.rows) for t in (q, out, lse))
            k_part, v_part = (take(t, call.k0, call.keys, call.step) for t in (k, v))
            found = attend(q_part, k_part, v_part, call.causal, mask, scale)
            if call.first:
                out_part.copy_(found[0])
                lse_part.copy_(found[1])
            else:
                _merge_into(out_part, lse_part, *found)
    return out, lse


def _attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if call.rows < q.shape[2]:
        q = q.narrow(2, call.q0, call.rows)
    if call.keys < k.shape[2]:
        k, v = k.narrow(2, call.k0, call.keys), v.narrow(2, call.k0, call.keys)
    return attend(q, k, v, call.causal, _mask(call, q), scale)


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
    """Gradients of `forward`, each in the order of its tensor: dq [B, H, Nq, D], dk and dv [B, Hkv, Nk, D]."""
    calls, blind = _cover(rule, q, k, BACKWARD)
    like, width = (q, k, v), q.shape[3]
    grad, q, k, v = (rows_contiguous(t) for t in (grad, q, k, v))
    if grad_lse is not None:
        grad, q, k, v, out = _fold_lse_gradient(grad, grad_lse, q, k, v, out)
    if len(calls) == 1 and calls[0].rows == q.shape[2] and calls[0].keys == k.shape[2]:
        parts = attend_backward(grad, q, k, v, out, lse, calls[0].causal, _mask(calls[0], q), scale)
        dq, dk, dv = (_ordered(t[..., :width], of) for t, of in zip(parts, like, strict=True))
        return dq, dk, dv
    dq = empty_like(like[0])
    dk, dv = (empty_like(t, lse.dtype).zero_() for t in like[1:])  # sums of many calls
    if blind:
        dq.zero_()
    for call in calls:
        mask = _mask(call, q)
        for take in _takes(call, (grad, q, k, v, out, lse, dq, dk, dv)):
            grad_part, q_part, out_part, lse_part, dq_part = (
                take(t, call.q0, call.rows, call.rows) for t in (grad, q, out, lse, dq)
            )
            k_part, v_part = (take(t, call.k0, call.keys, call.step) for t in (k, v))
            parts = attend_backward(grad_part, q_part, k_part, v_part, out_part, lse_part, call.causal, mask, scale)
            add = dq_part.copy_ if call.first else dq_part.add_
            add(parts[0][..., :width])
            for total, part in zip((dk, dv), parts[1:], strict=True):
                _add_keys(total, part[..., :width], call, take)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _cover(rule: Rule, q: torch.Tensor, k: torch.Tensor, prices: dict[int, Price]) -> Cover:
    chunks, price = rule.read(q.shape[2], k.shape[2]), prices[min(q.dtype.itemsize, 4)]
    if q.device.type != "cpu":
        return cover(chunks, price, PLAIN_ROWS)
    if torch.get_num_threads() > 1:
        price = price._replace(wait=WAIT // max(q.shape[0] * q.shape[1], 1))
    return cover(chunks, price)


_Take = Callable[[torch.Tensor, int, int, int], torch.Tensor]


def _takes(call: Call, tensors: tuple[torch.Tensor, ...]) -> Iterator[_Take]:
    """Functions (t, start, length, step) -> the tokens [start, start + length) of t, and those of the call's further
    attentions, each `step` later, as a batch: of all clips at once where strides allow, else of one clip or attention.
    """
    clips = tensors[0].shape[0]
    if call.times > 1 and all(1 in t.shape[:2] or t.stride(0) == t.shape[1] * t.stride(1) for t in tensors):
        yield partial(_stacked, times=call.times, clips=slice(None))
    elif 1 < call.times >= clips:
        for b in range(clips):
            yield partial(_stacked, times=call.times, clips=slice(b, b + 1))
    else:
        for i in range(call.times):
            yield partial(_narrowed, number=i)


def _narrowed(t: torch.Tensor, start: int, length: int, step: int, *, number: int) -> torch.Tensor:
    return t.narrow(2, start + number * step, length)


def _stacked(t: torch.Tensor, start: int, length: int, step: int, *, times: int, clips: slice) -> torch.Tensor:
    """[B, H, N, ...] -> [times, B * H, length, ...], number i from token start + i * step."""
    t = t[clips]
    heads, along = t.stride(1 if t.shape[1] > 1 else 0), t.stride(2)
    return t.as_strided(
        (times, t.shape[0] * t.shape[1], length, *t.shape[3:]),
        (step * along, heads, along, *t.stride()[3:]),
        t.storage_offset() + start * along,
    )


def _add_keys(total: torch.Tensor, part: torch.Tensor, call: Call, take: _Take) -> None:
    """Windows of a batch overlap, so their keys are added `step` at a time."""
    step = call.step or call.keys
    for a in range(0, call.keys, step):
        length = min(step, call.keys - a)
        take(total, call.k0 + a, length, call.step).add_(part.narrow(2, a, length))


def _merge_into(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    share = (part_lse - lse).sigmoid_().unsqueeze(-1)
    if out.dtype == lse.dtype:
        out.lerp_(part, share)
    else:
        out.copy_(out.to(lse.dtype).lerp_(part.to(lse.dtype), share))
    lse.copy_(torch.logaddexp(lse, part_lse))


def _fold_lse_gradient(
    grad: torch.Tensor, grad_lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Widen the heads by two columns whose part of grad . v is the gradient of lse, and of grad . out nothing.

    ds = p (grad . v - grad . out + grad_lse), so v gets columns of ones, out of zeros, and grad the gradient itself
    as a sum of two numbers of its dtype (one would lose the low bits in half precision).
    """
    high = grad_lse.to(grad.dtype)
    low = (grad_lse - high).to(grad.dtype)
    wide_grad = torch.cat([grad, high.unsqueeze(-1), low.unsqueeze(-1)], -1)
    return wide_grad, pad(q, (0, 2)), pad(k, (0, 2)), pad(v, (0, 2), value=1.0), pad(out, (0, 2))


def _mask(call: Call, q: torch.Tensor) -> torch.Tensor | None:
    return None if call.seen is None else additive_mask(call.seen, call.keys, q.dtype, q.device)


def _ordered(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """In memory as `empty_like(like)`, without a copy where it is."""
    return t.transpose(1, 2).contiguous().transpose(1, 2) if tokens_first(like) else t.contiguous()


def _joined(parts: tuple[torch.Tensor, ...], like: torch.Tensor) -> torch.Tensor:
    """Neighbouring rows as one tensor, in memory as `empty_like(like)`."""
    if len(parts) > 1 and tokens_first(like):
        return torch.cat([t.transpose(1, 2) for t in parts], 1).transpose(1, 2)
    return _ordered(torch.cat(parts, 2) if len(parts) > 1 else parts[0], like)
