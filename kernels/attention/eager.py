"""Chunked attention in eager PyTorch: no dense mask, no work on hidden blocks, memory linear in the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mirasol.kernels.attention.layout import Layout
from mirasol.kernels.attention.plan import Block, Call, additive_mask, blind_rows, plan
from mirasol.kernels.attention.tiles import attend, attend_backward
from mirasol.kernels.core.precision import accumulate_dtype


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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, Nq, D], k and v [B, Hkv, Nk, D] -> out [B, H, Nq, D], lse [B, H, Nq]."""
    q, k, v = (_last_contiguous(t) for t in (q, k, v))
    blocks = plan(layout, _most_rows(q.device))
    done = [_block_forward(q[:, :, block.q0 : block.q1], k, v, block, scale) for block in blocks]
    if not blocks or sum(block.q1 - block.q0 for block in blocks) < q.shape[2]:
        return _place(q, blocks, done)
    outs, lses = zip(*done, strict=True)
    return _joined(outs), _joined(lses)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Neighbouring rows as one contiguous tensor."""
    return torch.cat(list(parts), 2) if len(parts) > 1 else parts[0].contiguous()


def _place(
    q: torch.Tensor, blocks: Sequence[Block], done: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of some rows among rows that see nothing: out 0, lse -inf."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=accumulate_dtype(q.dtype), device=q.device)
    for block, (part, part_lse) in zip(blocks, done, strict=True):
        out[:, :, block.q0 : block.q1], lse[:, :, block.q0 : block.q1] = part, part_lse
    return out, lse


def backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: Layout,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward`: dq [B, H, Nq, D], dk and dv [B, Hkv, Nk, D]."""
    width = q.shape[-1]
    grad, q, k, v = (_last_contiguous(t) for t in (grad, q, k, v))
    if grad_lse is not None:
        grad, q, k, v, out = _fold_lse_gradient(grad, grad_lse, q, k, v, out)
    blocks = plan(layout, _most_rows(q.device), _short_rows_backward(q.dtype))
    if _is_one_call(blocks, q, k):
        call = blocks[0].calls[0]
        grads = attend_backward(grad, q, k, v, out, lse, causal=call.causal, mask=_mask(call, q), scale=scale)
    else:
        grads = _sum_of_calls(grad, q, k, v, out, lse, blocks, scale)
    dq, dk, dv = (t[..., :width].to(q.dtype).contiguous() for t in grads)
    return dq, dk, dv


def _is_one_call(blocks: tuple[Block, ...], q: torch.Tensor, k: torch.Tensor) -> bool:
    if len(blocks) != 1 or len(blocks[0].calls) != 1:
        return False
    block, call = blocks[0], blocks[0].calls[0]
    return block.q1 - block.q0 == q.shape[2] and call.k1 - call.k0 == k.shape[2]


def _sum_of_calls(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    blocks: tuple[Block, ...],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq in the dtype of q; dk and dv, to which many calls add, in that of lse."""
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(k.shape, dtype=lse.dtype, device=k.device) for _ in range(2))
    for block in blocks:
        rows = slice(block.q0, block.q1)
        grad_b, q_b, out_b, lse_b = (t[:, :, rows] for t in (grad, q, out, lse))
        for call in block.calls:
            keys = slice(call.k0, call.k1)
            mask = _mask(call, q)
            parts = attend_backward(
                grad_b, q_b, k[:, :, keys], v[:, :, keys], out_b, lse_b, causal=call.causal, mask=mask, scale=scale
            )
            dq[:, :, rows] += parts[0]
            dk[:, :, keys] += parts[1]
            dv[:, :, keys] += parts[2]
    return dq, dk, dv


def _block_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    merged: tuple[torch.Tensor, torch.Tensor] | None = None
    for call in block.calls:
        keys = slice(call.k0, call.k1)
        mask = _mask(call, q)
        out, lse = attend(q, k[:, :, keys], v[:, :, keys], causal=call.causal, mask=mask, scale=scale)
        if call.rows:
            blind = blind_rows(call.rows, call.k1 - call.k0, q.device)
            lse = lse if blind is None else lse.masked_fill(blind, float("-inf"))
        merged = (out, lse) if merged is None else merge_partials(*merged, out, lse)
    assert merged is not None
    return merged


def _fold_lse_gradient(
    grad: torch.Tensor, grad_lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Widen the heads by two columns whose part of grad . v is the gradient of lse, and of grad . out nothing.

    ds = p (grad . v - grad . out + grad_lse), so v gets columns of ones, out of zeros, and grad the gradient itself
    as a sum of two numbers of its dtype (one would lose the low bits in half precision).
    """
    high = grad_lse.to(grad.dtype)
    low = (grad_lse - high).to(grad.dtype)

    def widen(t: torch.Tensor, value: float) -> torch.Tensor:
        return torch.nn.functional.pad(t, (0, 2), value=value)

    wide_grad = torch.cat([grad, high.unsqueeze(-1), low.unsqueeze(-1)], -1)
    return wide_grad, widen(q, 0.0), widen(k, 0.0), widen(v, 1.0), widen(out, 0.0)


def _most_rows(device: torch.device) -> int | None:
    """Rows of scores that may exist at a time: any number where they stay in cache-sized tiles."""
    return None if device.type == "cpu" else 512


def _short_rows_backward(dtype: torch.dtype) -> int | None:
    """In half precision ATen's backward is three times as fast for hundreds of rows as for tens."""
    return 256 if dtype.itemsize == 2 else None


def _mask(call: Call, q: torch.Tensor) -> torch.Tensor | None:
    return additive_mask(call.rows, call.k1 - call.k0, q.dtype, q.device) if call.rows else None


def _last_contiguous(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
