"""Where the tubes of a clip lie: grids, centres and the check that every tube fits. Plain integers, no kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from mirasol.kernels.core.checks import expect, expect_int, refuse

CHANNELS = 3
_AXES = ("t", "h", "w")


class Tube(NamedTuple):
    """A box of pixels that slides over a clip as a convolution kernel without padding does.

    Token (i, j, k) covers `kernel[0]` frames from `offset[0] + i * stride[0]` on; rows and columns likewise.

    Attributes:
        kernel: extent (t, h, w) in frames and pixels.
        stride: step (t, h, w) between neighbouring tokens.
        offset: first covered frame, row and column.
    """

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    offset: tuple[int, int, int] = (0, 0, 0)

    @property
    def size(self) -> int:
        """Elements of one token: kt * kh * kw * 3."""
        return self.kernel[0] * self.kernel[1] * self.kernel[2] * CHANNELS


TUBEVIT_TUBES: tuple[Tube, ...] = (
    Tube((8, 8, 8), (16, 32, 32), (0, 0, 0)),
    Tube((16, 4, 4), (6, 32, 32), (4, 8, 8)),
    Tube((4, 12, 12), (16, 32, 32), (0, 16, 16)),
    Tube((1, 16, 16), (32, 16, 16), (0, 0, 0)),
)
"""The tubes of TubeViT (arXiv 2212.03229, table 12): 539 tokens of a 32 x 224 x 224 clip."""


def as_tubes(tubes: Sequence[Tube]) -> tuple[Tube, ...]:
    """Check the tubes themselves, whatever the clip; plain (kernel, stride, offset) triples become `Tube`s.

    Raises:
        TypeError: an entry that is not three triples of ints.
        ValueError: no tube at all, a kernel or stride below 1, an offset below 0.
    """
    expect(len(tubes) > 0, "tubes", "hold at least one Tube", tubes)
    return tuple([_as_tube(f"tubes[{i}]", tube) for i, tube in enumerate(tubes)])


def tube_grid(tube: Tube, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Tokens (nt, nh, nw) that a tube yields along time, height and width; 0 along an axis that is too short for it.

    Along each axis: `(size - offset - kernel) // stride + 1`, the size of a convolution's output without padding, for a
    clip of `frames` frames of `height` x `width` pixels.
    """
    (kt, kh, kw), (st, sh, sw), (ot, oh, ow) = tube
    return _fitting(frames - ot, kt, st), _fitting(height - oh, kh, sh), _fitting(width - ow, kw, sw)


def _fitting(size: int, kernel: int, stride: int) -> int:
    return (size - kernel) // stride + 1 if size >= kernel else 0


def check_tubes(tubes: Sequence[Tube], frames: int, height: int, width: int) -> tuple[Tube, ...]:
    """Check that every tube yields at least one token of a clip of this size. Call it when a model is configured.

    Args:
        tubes: shapes to check, see `Tube`.
        frames, height, width: size of the clip, in frames and pixels.
    Returns:
        The tubes, as `Tube`s.
    Raises:
        TypeError: a tube that is not (kernel, stride, offset), each three ints, or a size that is not an int.
        ValueError: a tube that yields no token, naming the axis along which it does not fit.
    """
    checked = as_tubes(tubes)
    sizes = [expect_int(name, n) for name, n in (("frames", frames), ("height", height), ("width", width))]
    for i, (kernel, stride, offset) in enumerate(checked):
        for axis in range(3):
            k, o, size = kernel[axis], offset[axis], sizes[axis]
            if size < o + k:
                raise ValueError(
                    f"tubes[{i}] must fit the clip, but yields no token: along {_AXES[axis]} it needs offset {o} "
                    f"+ kernel {k} = {o + k}, and the clip of frames x height x width = {frames} x {height} x {width} "
                    f"has {size}; was {(kernel, stride, offset)}"
                )
    return checked


def tube_centres(
    tubes: Sequence[Tube], frames: int, height: int, width: int, device: torch.device | None = None
) -> torch.Tensor:
    """Centres of all tokens, for positions that do not depend on which tube a token came from.

    The centre is the mean of the indices that a token covers, `offset + i * stride + (kernel - 1) / 2`: fixed sin-cos
    positions of it are TubeViT's (arXiv 2212.03229, section 3.3; 84.5 against 79.2 with learned positions on K600).

    Args:
        tubes: shapes, see `Tube`.
        frames, height, width: size of the clip, in frames and pixels.
        device: where to compute them, without a copy or a wait; None: the CPU.
    Returns:
        [N, 3] float32: (t, h, w) in frames and pixels of the input; tubes in their order, the tokens of one
        tube in the order (t, h, w), the order in which `extract_tubes` returns them.
    Raises:
        ValueError: a tube that yields no token.
    """
    per_tube = []
    for tube in check_tubes(tubes, frames, height, width):
        axes = [
            o + s * torch.arange(n, dtype=torch.float32, device=device) + (k - 1) / 2
            for n, k, s, o in zip(tube_grid(tube, frames, height, width), *tube, strict=True)
        ]
        per_tube.append(torch.cartesian_prod(*axes))
    return torch.cat(per_tube)


def _as_tube(name: str, value: Any) -> Tube:
    if not isinstance(value, tuple | list) or len(value) not in (2, 3):
        refuse(name, "be a Tube(kernel, stride, offset)", value, TypeError)
    fields = zip(Tube._fields, value, (1, 1, 0), strict=False)
    return Tube(*[_triple(f"{name}.{field}", triple, least) for field, triple, least in fields])


def _triple(name: str, value: Any, least: int) -> tuple[int, int, int]:
    if not isinstance(value, tuple | list) or len(value) != 3:
        refuse(name, "be three ints (t, h, w)", value, TypeError)
    if type(value[0]) is type(value[1]) is type(value[2]) is int and min(value) >= least:
        return tuple(value)  # every call asks: without the names of 36 numbers
    t, h, w = [expect_int(f"{name} along {axis}", n, minimum=least) for axis, n in zip(_AXES, value, strict=True)]
    return t, h, w
