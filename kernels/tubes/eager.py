"""The `torch` backend: strided views gathered in plain PyTorch; pixels that no tube covers are never read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mirasol.kernels.core.precision import accumulate_dtype
from mirasol.kernels.tubes.geometry import CHANNELS, Tube, tube_grid


def extract(
    video: torch.Tensor, tubes: Sequence[Tube], scale: Sequence[float], shift: Sequence[float], dtype: torch.dtype
) -> list[torch.Tensor]:
    """`pixel * scale + shift` of every covered pixel: [B, frames, H, W, 3] -> [B, N_i, kt*kh*kw*3] per tube."""
    compute = accumulate_dtype(torch.promote_types(dtype, video.dtype))
    scales = torch.tensor(scale, dtype=compute, device=video.device)
    shifts = torch.tensor(shift, dtype=compute, device=video.device)
    tokens = []
    for tube in tubes:
        boxes = _boxes(video, tube).to(compute, memory_format=torch.contiguous_format, copy=True)
        boxes.mul_(scales).add_(shifts)
        tokens.append(boxes.to(dtype).view(video.shape[0], math.prod(boxes.shape[1:4]), tube.size))
    return tokens


def scatter(
    grads: Sequence[torch.Tensor],
    tubes: Sequence[Tube],
    scale: Sequence[float],
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gradient of `extract` for the clip: every token's gradient times `scale`, added where its pixels came from.

    Strided additions in a fixed order, no atomics: a kernel is cut into parts no longer than its stride, so that no
    pixel is met twice within one addition.
    """
    compute = accumulate_dtype(torch.promote_types(dtype, grads[0].dtype))
    video = torch.zeros(list(shape), dtype=compute, device=grads[0].device)
    scales = torch.tensor(scale, dtype=compute, device=video.device)
    for grad, tube in zip(grads, tubes, strict=True):
        nt, nh, nw = tube_grid(tube, *shape[1:4])
        kt, kh, kw = tube.kernel
        # [B, nt, nh, nw, kt, kh, kw, 3], the layout of `_boxes`
        boxes = grad.view(shape[0], nt, nh, nw, kt, kh, kw, CHANNELS).to(compute) * scales
        target = _boxes(video, tube)
        for dt in range(0, -(-kt // tube.stride[0])):
            for dh in range(0, -(-kh // tube.stride[1])):
                for dw in range(0, -(-kw // tube.stride[2])):
                    part = tuple(
                        slice(d * s, min((d + 1) * s, k))
                        for d, s, k in zip((dt, dh, dw), tube.stride, tube.kernel, strict=True)
                    )
                    target[..., part[0], part[1], part[2], :].add_(boxes[..., part[0], part[1], part[2], :])
    return video.to(dtype)


def _boxes(video: torch.Tensor, tube: Tube) -> torch.Tensor:
    """The pixels of every token, [B, nt, nh, nw, kt, kh, kw, 3], as a view: overlapping tokens share memory."""
    for axis, (k, s, o) in enumerate(zip(*tube, strict=True), start=1):
        video = video.narrow(axis, o, video.shape[axis] - o).unfold(axis, k, s)
    # unfold appends each window at the end: [B, nt, nh, nw, 3, kt, kh, kw]
    return video.movedim(4, -1)
