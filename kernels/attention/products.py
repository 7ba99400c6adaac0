"""One attention of some rows to some keys, with the log-sum-exp that merging and the backward pass need.

On a CPU this is ATen's flash attention, which works in cache-sized tiles; elsewhere plain matrix products. Shapes: q
[B, H, m, D]; k, v [B, Hkv, l, D]; mask [m, l] additive, in the dtype of q, hiding no row completely; `causal` takes
square shapes only.
"""

from __future__ import annotations

import torch

from mirasol.kernels.core.precision import accumulate_dtype

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, m, D] in the dtype of q and lse [B, H, m], in any order in memory."""
    if q.device.type == "cpu":
        return _FLASH(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return _plain(q, k, v, causal, mask, scale)


def attend_backward(
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
    """dq [B, H, m, D], dk and dv [B, Hkv, l, D] of these keys' part, given the merged `out` and `lse` of the rows."""
    if q.device.type == "cpu":
        return _FLASH_BACKWARD(grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return _plain_backward(grad, q, k, v, out, lse, causal, mask, scale)


def _scores(q: torch.Tensor, k: torch.Tensor, causal: bool, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """[B, Hkv, H / Hkv * m, l]: the rows of all heads that share a key head are rows of it."""
    scores = (_by_key_head(q, k) @ k.mT).to(accumulate_dtype(q.dtype)) * scale
    if causal:
        mask = torch.full((q.shape[2], k.shape[2]), -torch.inf, dtype=scores.dtype, device=q.device).triu_(1)
    if mask is not None:
        scores.unflatten(2, (-1, q.shape[2])).add_(mask)
    return scores


def _by_key_head(t: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return t.reshape(*k.shape[:2], -1, *t.shape[3:])


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _scores(q, k, causal, mask, scale)
    lse = scores.logsumexp(-1)
    out = scores.sub_(lse.unsqueeze(-1)).exp_().to(q.dtype) @ v
    return out.view(q.shape), lse.view(q.shape[:3])


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
    shape, scores = q.shape, _scores(q, k, causal, mask, scale)
    grad, q, out, lse = (_by_key_head(t, k) for t in (grad, q, out, lse))
    weights = scores.sub_(lse.unsqueeze(-1)).exp_()
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
    dscores = (grad @ v.mT).to(lse.dtype).sub_(delta).mul_(weights).mul_(scale).to(q.dtype)
    return (dscores @ k).view(shape), dscores.mT @ q, weights.to(q.dtype).mT @ grad
