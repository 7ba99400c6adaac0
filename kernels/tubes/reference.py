"""The specification of `extract_tubes`: one slice of the clip per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mirasol.kernels.core.precision import accumulate_dtype
from mirasol.kernels.tubes.geometry import Tube, tube_grid


def extract_tubes(
    video: torch.Tensor, tubes: Sequence[Tube], mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Normalise a clip and cut out its tubes: [B, frames, H, W, 3] -> [B, N_i, kt*kh*kw*3] per tube.

    uint8 is divided by 255; then `(x - mean) / std` per channel. The sum is in float32, or float64 where the clip or
    `dtype` is float64.
    """
    pixels = video.to(accumulate_dtype(torch.promote_types(dtype, video.dtype)))
    if video.dtype == torch.uint8:
        pixels = pixels / 255
    pixels = (pixels - pixels.new_tensor(mean)) / pixels.new_tensor(std)
    tokens = []
    for tube in tubes:
        nt, nh, nw = tube_grid(tube, *video.shape[1:4])
        boxes = []
        for t in range(nt):
            for h in range(nh):
                for w in range(nw):
                    first = [o + i * s for i, s, o in zip((t, h, w), tube.stride, tube.offset, strict=True)]
                    span = [slice(f, f + k) for f, k in zip(first, tube.kernel, strict=True)]
                    boxes.append(pixels[:, span[0], span[1], span[2]].flatten(1))
        tokens.append(torch.stack(boxes, 1).to(dtype))
    return tokens
