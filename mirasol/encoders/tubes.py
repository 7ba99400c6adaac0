"""Tubes as the video encoder uses them: which fit a clip, their grid and their centres, with or without space-to-depth.

Space-to-depth (TubeViT, arXiv 2212.03229, section 3.1): a tube moves S times finer along some axes, gives d / S
channels at each place, and S neighbours are joined into one token of d channels. The number and width of the tokens
stay, the pixels behind a token become S times as many, and the kernel has 1 / S of the parameters.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from mirasol.kernels import Tube, tube_centres, tube_grid

Triple = tuple[int, int, int]


class MergedTube(NamedTuple):
    """A tube whose places are joined in groups of `merge` (t, h, w); (1, 1, 1) joins nothing.

    Attributes:
        fine: the tube at its finer stride, what is cut out of the clip.
        merge: neighbours joined along each axis.
    """

    fine: Tube
    merge: Triple

    @classmethod
    def of(cls, tube: Tube, merge: Triple) -> MergedTube:
        """From the stride of the joined tokens, which must be a multiple of `merge` along each axis."""
        for axis, stride, parts in zip("thw", tube.stride, merge, strict=True):
            if parts < 1 or stride % parts:
                raise ValueError(f"tube_merge must divide the tube's stride {stride} along {axis}, was {parts}")
        finer = tuple(stride // parts for stride, parts in zip(tube.stride, merge, strict=True))
        return cls(Tube(tube.kernel, finer, tube.offset), merge)  # type: ignore[arg-type]

    @property
    def parts(self) -> int:
        """S: places joined into one token."""
        return prod(self.merge)

    def grid(self, frames: int, height: int, width: int) -> Triple:
        """Joined tokens along time, height and width; 0 where the clip is too short."""
        fine = tube_grid(self.fine, frames, height, width)
        return tuple(n // parts for n, parts in zip(fine, self.merge, strict=True))  # type: ignore[return-value]

    def join(self, tokens: Tensor, frames: int, height: int, width: int) -> Tensor:
        """[B, N_fine, c] of all places -> [B, N, S * c], neighbours side by side."""
        t, h, w = tube_grid(self.fine, frames, height, width)
        nt, nh, nw = self.grid(frames, height, width)
        st, sh, sw = self.merge
        places = tokens.unflatten(1, (t, h, w))[:, : nt * st, : nh * sh, : nw * sw]
        return rearrange(places, "b (t i) (h j) (w k) c -> b (t h w) (i j k c)", i=st, j=sh, k=sw)

    def centres(self, frames: int, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """[N, 3] float32 (t, h, w): the mean of the joined places' centres, in frames and pixels."""
        fine = tube_centres([self.fine], frames, height, width, device)[None]
        return rearrange(self.join(fine, frames, height, width), "1 n (s c) -> n s c", c=3).mean(1)


def fitting(tubes: tuple[MergedTube, ...], frames: int) -> list[int]:
    """Which tubes take part in a clip of so many frames: in an image (one frame) those of one frame, else all."""
    if frames > 1:
        return list(range(len(tubes)))
    return [i for i, tube in enumerate(tubes) if tube.fine.kernel[0] == 1 and tube.fine.offset[0] == 0]


def resize_kernel(kernel: Tensor, size: Triple) -> Tensor:
    """Trilinear resize of a kernel [d, c, t, h, w], scaled so that its answer to a constant clip stays the same."""
    volume = prod(kernel.shape[2:]) / prod(size)
    return torch.nn.functional.interpolate(kernel, size=size, mode="trilinear", align_corners=False) * volume
