"""`extract_tubes`: from a clip to the tokens of sparse video tubes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from mirasol.kernels.core.checks import FLOATS, expect, expect_number, expect_tensor, refuse
from mirasol.kernels.tubes import op, reference
from mirasol.kernels.tubes.geometry import CHANNELS, Tube, check_tubes

TubeBackend = Literal["auto", "native", "torch", "reference"]


def extract_tubes(
    video: torch.Tensor,
    tubes: Sequence[Tube],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    backend: TubeBackend = "auto",
) -> list[torch.Tensor]:
    """Cut sparse tubes out of a clip and normalise them; pixels that no tube covers are never read.

    `linear(tokens, weight.permute(0, 2, 3, 4, 1).flatten(1))` is the convolution of the normalised clip with
    `weight` [d, 3, kt, kh, kw] at the tube's stride and offset, to rounding.

    Args:
        video: [B, frames, H, W, 3] or [B, 3, frames, H, W], of any strides. The dimension of size 3 is the channels;
            where both the second and the last have size 3, the clip is refused: `video.movedim(-1, 1)` of a clip of
            three frames says (without a copy) that the last one was meant.
            uint8, taken as 0..255 and scaled to 0..1; or float32, bfloat16, float16, float64, taken as it is.
        tubes: shapes to cut, see `Tube`; `TUBEVIT_TUBES` are the published ones.
        mean, std: per channel, in the scale of the (uint8: scaled) pixels; the token holds `(x - mean) / std`.
        dtype: of the tokens: float32, bfloat16, float16 or float64. Autocast does not change it.
        backend: "native" is compiled code (CUDA for a clip on a GPU, C++ for one on the CPU) and refuses with the
            reason where it was not built; "torch" is plain PyTorch; "auto" takes native code where it can serve the
            call, else PyTorch. There is no Triton kernel: "triton" is refused.
    Returns:
        One [B, N_i, kt*kh*kw*3] tensor per tube, contiguous. Tokens in the order (t, h, w) of their place, `N_i` the
        product of `tube_grid`; inside a token (t, h, w, channel). A floating clip receives a gradient.
    Raises:
        TypeError: `video` or `dtype` of a kind that is not served.
        ValueError: layout unknown or ambiguous, a tube that yields no token, `std` not positive, unknown backend.
    Source:
        TubeViT, arXiv 2212.03229, section 3.1 and table 12.
    """
    clip = channels_last(video)
    checked = check_tubes(tubes, *clip.shape[1:4])
    means, stds = _triple("mean", mean), _triple("std", std)
    expect(min(stds) > 0, "std", "be positive in every channel", std)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, was {dtype}")
    _check_backend(backend)
    if backend == "reference":
        return reference.extract_tubes(clip, checked, means, stds, dtype)
    unit = 255.0 if clip.dtype == torch.uint8 else 1.0
    scale = [1 / (unit * s) for s in stds]
    shift = [-m / s for m, s in zip(means, stds, strict=True)]
    numbers = [n for tube in checked for triple in tube for n in triple]
    return op.extract(clip, numbers, scale, shift, dtype, backend)


def channels_last(video: torch.Tensor) -> torch.Tensor:
    """View a clip of either layout as [B, frames, H, W, 3]; see `extract_tubes` for how they are told apart."""
    layouts = ("B frames H W 3", "B 3 frames H W")
    expect_tensor("video", video, layouts, dtypes=(torch.uint8, *FLOATS))
    first, last = video.shape[1] == CHANNELS, video.shape[-1] == CHANNELS
    if first and last:
        raise ValueError(
            "video must have one dimension of size 3 to be the channels, the second or the last, was "
            f"{list(video.shape)}: of a three-frame clip with channels last pass video.movedim(-1, 1)"
        )
    expect(first or last, "video", "be [B, frames, H, W, 3] or [B, 3, frames, H, W]", video)
    return video if last else video.movedim(1, -1)


def _check_backend(backend: str) -> None:
    if backend == "triton":
        raise ValueError(
            'extract_tubes cannot run with backend="triton": its kernels are native code. Use "native", or "auto" '
            "to fall back to PyTorch where that is not built."
        )
    expect(backend in get_args(TubeBackend), "backend", f"be one of {', '.join(get_args(TubeBackend))}", backend)


def _triple(name: str, values: Sequence[float]) -> list[float]:
    if isinstance(values, torch.Tensor) or not hasattr(values, "__len__"):
        refuse(name, "hold three numbers, one per channel (of a tensor, pass its tolist())", values, TypeError)
    expect(len(values) == CHANNELS, name, "hold three numbers, one per channel", values)
    return [expect_number(f"{name}[{c}]", value) for c, value in enumerate(values)]
