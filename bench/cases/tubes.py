"""`extract_tubes` against plain PyTorch: cutting the tubes alone, and tokens with their projection.

The floor is the traffic that cannot be avoided: every covered pixel read once, every token written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.harness import Comparison, Unavailable, Variant, against, compare, compiled
from core.rows import Case, Row, Settings
from mirasol.config import SHORT_TUBES
from mirasol.kernels import TUBEVIT_TUBES, Tube, build_info, extract_tubes, tube_grid
from report.console import Table
from report.tables import comparison_table

SUITE = "tubes"
GATHER, CONV, FOLDED = "strided gather", "normalise + Conv3d", "Conv3d, normalisation folded in"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Shape:
    """A batch of clips [B, 3, frames, size, size], uint8; projected to `dim` channels."""

    batch: int
    frames: int
    size: int
    dim: int = 768

    @property
    def tubes(self) -> tuple[Tube, ...]:
        """TubeViT's; without the 16-frame tube where it does not fit."""
        return TUBEVIT_TUBES if self.frames >= 20 else SHORT_TUBES

    @property
    def name(self) -> str:
        return f"{self.frames} x {self.size} x {self.size} batch {self.batch}"


QUICK = [Shape(1, 8, 64, dim=32)]
CPU = [Shape(1, 32, 224), Shape(4, 8, 224), Shape(8, 32, 224), Shape(1, 32, 448)]
CPU_FULL = [*CPU, Shape(1, 64, 448), Shape(1, 512, 224), Shape(32, 32, 224)]
GPU = [Shape(b, f, s) for f, s in ((8, 224), (32, 224), (64, 448), (512, 224)) for b in (1, 16)]
GPU_FULL = [*GPU, Shape(32, 32, 224), Shape(32, 32, 448), Shape(16, 8, 448), Shape(4, 512, 448)]


def cases(settings: Settings) -> list[Case]:
    gpu = settings.device.type == "cuda"
    shapes = {"quick": QUICK, "default": GPU if gpu else CPU, "full": GPU_FULL if gpu else CPU_FULL}[settings.effort]
    return [
        Case(f"{what} {shape.name}", partial(run, shape))
        for shape in shapes
        for what, run in (("cut", _cut), ("tokens", _tokens))
    ]


def tables(rows: list[Row]) -> list[Table]:
    notes = [
        "cut: the tubes of a uint8 clip as normalised floats; tokens: cut and projected, against the same convolutions",
        "GB/s: covered pixels read once and tokens written once, over time; % of roof: of the copy bandwidth",
    ]
    return [comparison_table("Sparse video tubes", rows, notes)]


def _cut(shape: Shape, settings: Settings) -> list[Row]:
    dtype = _dtype(settings)
    video = _video(shape, settings)
    moved = _moved(shape, dtype)

    def floor() -> Callable[[], Tensor]:
        source = torch.empty(moved // 2, dtype=torch.uint8, device=settings.device)
        source.random_(generator=settings.generator())
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    gather = partial(_gather, shape.tubes, dtype)
    variants = [
        *(
            Variant(f"mirasol, {name}", partial(_ours, shape, name, dtype, video), role="ours")
            for name in ("native", "torch")
        ),
        Variant(GATHER, lambda: partial(gather, video)),
        *compiled(f"{GATHER}, compiled", gather, (video,), settings),
        Variant("copy of as many bytes", floor, role="limit", judged=False),
    ]
    exact = extract_tubes(video, shape.tubes, mean=MEAN, std=STD, dtype=torch.float64, backend="reference")
    return compare(
        Comparison(
            SUITE,
            f"cut {shape.name}",
            variants,
            judge=against(exact, gather(video)),
            baseline=GATHER,
            shape=f"{len(shape.tubes)} tube shapes, {sum(t.shape[1] for t in exact)} tokens",
            dtype=dtype,
            bytes=moved,
            roof="copy",
        ),
        settings,
    )


def _tokens(shape: Shape, settings: Settings) -> list[Row]:
    dtype = _dtype(settings)
    video = _video(shape, settings)
    weights = [
        settings.randn(shape.dim, tube.size, dtype=dtype, seed=i).mul_(tube.size**-0.5)
        for i, tube in enumerate(shape.tubes)
    ]
    kernels = [
        w.view(shape.dim, *tube.kernel, 3).permute(0, 4, 1, 2, 3).contiguous()
        for w, tube in zip(weights, shape.tubes, strict=True)
    ]
    cut = {name: partial(_ours, shape, name, dtype, video) for name in ("native", "torch")}
    pieces = _gather(shape.tubes, dtype, video)
    conv = partial(_conv, shape.tubes, dtype)
    last = [k.contiguous(memory_format=torch.channels_last_3d) for k in kernels]
    variants = [
        *(
            Variant(f"mirasol, {name} + GEMM", partial(_ours_then, make, weights), role="ours")
            for name, make in cut.items()
        ),
        Variant(CONV, lambda: partial(conv, kernels, video)),
        Variant(f"{CONV}, channels last", lambda: partial(conv, last, video)),
        *compiled(f"{CONV}, compiled", partial(conv, kernels), (video,), settings),
        Variant(FOLDED, lambda: partial(_folded_conv, shape.tubes, _folded(kernels), video)),
        *compiled(f"{FOLDED}, compiled", partial(_folded_conv, shape.tubes, _folded(kernels)), (video,), settings),
        Variant(f"{GATHER} + GEMM", lambda: _then(partial(_gather, shape.tubes, dtype, video), weights)),
        Variant("GEMMs alone", lambda: _then(lambda: pieces, weights), role="limit", judged=False),
    ]
    reference = extract_tubes(video, shape.tubes, mean=MEAN, std=STD, dtype=torch.float64, backend="reference")
    exact = [p @ w.double().mT for p, w in zip(reference, weights, strict=True)]
    plain = [p @ w.mT for p, w in zip(pieces, weights, strict=True)]
    return compare(
        Comparison(
            SUITE,
            f"tokens {shape.name}",
            variants,
            judge=against(exact, plain),
            baseline=CONV,
            shape=f"{len(shape.tubes)} tube shapes, {sum(t.shape[1] for t in exact)} tokens, d {shape.dim}",
            dtype=dtype,
            flops=sum(2 * p.numel() * shape.dim for p in pieces),
            roof="gemm",
        ),
        settings,
    )


def _dtype(settings: Settings) -> torch.dtype:
    return settings.dtype or (torch.bfloat16 if settings.device.type == "cuda" else torch.float32)


def _video(shape: Shape, settings: Settings) -> Tensor:
    size = (shape.batch, 3, shape.frames, shape.size, shape.size)
    return torch.randint(0, 256, size, dtype=torch.uint8, device=settings.device, generator=settings.generator())


def _moved(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of the pixels that some tube covers, and of all tokens."""
    covered = torch.zeros(shape.frames, shape.size, shape.size, dtype=torch.bool)
    written = 0
    for tube in shape.tubes:
        grid = tube_grid(tube, shape.frames, shape.size, shape.size)
        written += grid[0] * grid[1] * grid[2] * tube.size
        views = covered
        for axis, (k, s, o) in enumerate(zip(*tube, strict=True)):
            views = views.narrow(axis, o, views.shape[axis] - o).unfold(axis, k, s)
        views.fill_(True)
    return shape.batch * (3 * int(covered.sum()) + written * dtype.itemsize)


def _ours(shape: Shape, backend: Any, dtype: torch.dtype, video: Tensor) -> Callable[[], list[Tensor]]:
    info = build_info()[video.device.type]
    if backend == "native" and not info["available"]:
        raise Unavailable(str(info["why"]))
    return lambda: extract_tubes(video, shape.tubes, mean=MEAN, std=STD, dtype=dtype, backend=backend)


def _ours_then(make: Callable[[], Callable[[], list[Tensor]]], weights: list[Tensor]) -> Callable[[], list[Tensor]]:
    return _then(make(), weights)


def _then(cut: Callable[[], Sequence[Tensor]], weights: list[Tensor]) -> Callable[[], list[Tensor]]:
    return lambda: [F.linear(piece, w) for piece, w in zip(cut(), weights, strict=True)]


def _gather(tubes: Sequence[Tube], dtype: torch.dtype, video: Tensor) -> list[Tensor]:
    """What one writes in PyTorch: strided windows, gathered, converted and normalised. Touches covered pixels only."""
    mean, std = (torch.tensor(v, device=video.device) for v in (MEAN, STD))
    tokens = []
    for tube in tubes:
        windows = video
        for axis, (k, s, o) in enumerate(zip(*tube, strict=True), start=2):
            windows = windows.narrow(axis, o, windows.shape[axis] - o).unfold(axis, k, s)
        pixels = windows.permute(0, 2, 3, 4, 5, 6, 7, 1).float()  # [B, nt, nh, nw, kt, kh, kw, 3]
        tokens.append(((pixels / 255 - mean) / std).to(dtype).flatten(4).flatten(1, 3))
    return tokens


def _conv(tubes: Sequence[Tube], dtype: torch.dtype, kernels: Sequence[Tensor], video: Tensor) -> list[Tensor]:
    """What every PyTorch TubeViT does: the whole clip to floats, then one strided convolution for each tube shape."""
    mean, std = (torch.tensor(v, device=video.device).view(3, 1, 1, 1) for v in (MEAN, STD))
    clip = ((video.float() / 255 - mean) / std).to(dtype)
    if kernels[0].is_contiguous(memory_format=torch.channels_last_3d) and not kernels[0].is_contiguous():
        clip = clip.contiguous(memory_format=torch.channels_last_3d)
    tokens = []
    for tube, kernel in zip(tubes, kernels, strict=True):
        t, h, w = tube.offset
        tokens.append(F.conv3d(clip[:, :, t:, h:, w:], kernel, stride=tube.stride).flatten(2).mT)
    return tokens


def _folded(kernels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Kernels and biases that take pixels of 0..255 as they are."""
    mean, std = (torch.tensor(v, device=kernels[0].device, dtype=torch.float64).view(3, 1, 1, 1) for v in (MEAN, STD))
    scaled = [kernel.double() / std for kernel in kernels]
    biases = [-(kernel * mean).sum((1, 2, 3, 4)) for kernel in scaled]
    return [((w / 255).to(k.dtype), b.to(k.dtype)) for w, b, k in zip(scaled, biases, kernels, strict=True)]


def _folded_conv(tubes: Sequence[Tube], folded: Sequence[tuple[Tensor, Tensor]], video: Tensor) -> list[Tensor]:
    """The same without a pass that normalises: the clip is converted, the weights do the rest."""
    clip, tokens = video.to(folded[0][0].dtype), []
    for tube, (kernel, bias) in zip(tubes, folded, strict=True):
        t, h, w = tube.offset
        tokens.append(F.conv3d(clip[:, :, t:, h:, w:], kernel, bias, stride=tube.stride).flatten(2).mT)
    return tokens
