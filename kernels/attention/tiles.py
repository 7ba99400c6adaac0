"""One attention of some rows to some keys, with the log-sum-exp that merging and the backward pass need.

On a CPU this is ATen's flash attention, which works in cache-sized tiles; elsewhere plain matrix products. Shapes: q
[B, H, m, D]; k, v [B, Hkv, l, D]; mask [m, l] additive, in the dtype of q.
"""

from __future__ import annotations

import torch

from mirasol.kernels.core.precision import accumulate_dtype

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, m, D] in the dtype of q and lse [B, H, m]; `causal` takes square shapes only.

    Rows that a mask hides completely have an undefined lse.
    """
    one = _flash if q.device.type == "cpu" else _plain
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return one(q, k, v, causal, mask, scale)
    per_group = [one(q[:, g::groups], k, v, causal, mask, scale) for g in range(groups)]
    outs, lses = zip(*per_group, strict=True)
    return torch.stack(outs, 2).flatten(1, 2), torch.stack(lses, 2).flatten(1, 2)


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq [B, H, m, D], dk and dv [B, Hkv, l, D] of these keys' part, given the merged `out` and `lse` of the rows."""
    one = _flash_backward if q.device.type == "cpu" else _plain_backward
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return one(grad, q, k, v, out, lse, causal, mask, scale)
    dq, dk, dv = torch.empty(q.shape, dtype=q.dtype, device=q.device), None, None
    for g in range(groups):
        rows = slice(g, None, groups)
        dq_g, dk_g, dv_g = one(grad[:, rows], q[:, rows], k, v, out[:, rows], lse[:, rows], causal, mask, scale)
        dq[:, rows] = dq_g
        dk = dk_g.to(lse.dtype) if dk is None else dk.add_(dk_g)
        dv = dv_g.to(lse.dtype) if dv is None else dv.add_(dv_g)
    assert dk is not None
    assert dv is not None
    return dq, dk, dv


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _FLASH(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return out, lse


def _flash_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = _FLASH_BACKWARD(grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return dq, dk, dv


def _scores(q: torch.Tensor, k: torch.Tensor, causal: bool, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2)).to(accumulate_dtype(q.dtype)) * scale
    if mask is not None:
        scores += mask
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(hidden, float("-inf"))
    return scores


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _scores(q, k, causal, mask, scale)
    lse = scores.logsumexp(-1)
    finite = lse.masked_fill(lse.isinf(), 0.0)
    return scores.sub_(finite.unsqueeze(-1)).exp_().to(q.dtype) @ v, lse


def _plain_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weights = _scores(q, k, causal, mask, scale).sub_(lse.unsqueeze(-1)).exp_()
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
    dscores = (grad @ v.transpose(-1, -2)).to(lse.dtype).sub_(delta).mul_(weights).mul_(scale).to(q.dtype)
    return dscores @ k, dscores.transpose(-1, -2) @ q, weights.to(q.dtype).transpose(-1, -2) @ grad
