"""The opaque operators behind `extract_tubes`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mirasol.kernels.core.registration import apply, define, differentiable_once
from mirasol.kernels.tubes import eager, native
from mirasol.kernels.tubes.geometry import Tube, tube_grid


def _unpack(numbers: Sequence[int]) -> list[Tube]:
    """Tubes from 9 ints each: kernel, stride, offset."""
    rows = [tuple(numbers[i : i + 9]) for i in range(0, len(numbers), 9)]
    return [Tube(row[:3], row[3:6], row[6:]) for row in rows]  # type: ignore[arg-type]


def _choose_native(backend: str, tensor: torch.Tensor, dtype: torch.dtype, numbers: Sequence[int]) -> bool:
    """Whether native code serves the call. Asked when the operator runs: a compiled graph holds no such choice."""
    if backend == "torch":
        return False
    refusals = native.refusals(tensor, dtype, numbers)
    if backend == "native" and refusals:
        raise ValueError('extract_tubes cannot run with backend="native": ' + " ".join(refusals))
    if refusals:
        native.tell_missing(tensor.device.type)
    return not refusals


def _extract(
    video: torch.Tensor,
    tubes: Sequence[int],
    scale: Sequence[float],
    shift: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> list[torch.Tensor]:
    if not _choose_native(backend, video, dtype, tubes):
        return eager.extract(video, _unpack(tubes), scale, shift, dtype)
    tokens = _extract_fake(video, tubes, scale, shift, dtype, backend)
    native.run("extract", video, tubes, scale, shift, tokens)
    return tokens


def _extract_fake(
    video: torch.Tensor,
    tubes: Sequence[int],
    scale: Sequence[float],
    shift: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> list[torch.Tensor]:
    batch, frames, height, width, _ = video.shape
    outputs = []
    for tube in _unpack(tubes):
        nt, nh, nw = tube_grid(tube, frames, height, width)
        outputs.append(video.new_empty((batch, nt * nh * nw, tube.size), dtype=dtype))
    return outputs


def _scatter(
    grads: Sequence[torch.Tensor],
    tubes: Sequence[int],
    scale: Sequence[float],
    shape: Sequence[int],
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    dense = [grad.contiguous() for grad in grads]
    if not _choose_native(backend, dense[0], dtype, tubes):
        return eager.scatter(dense, _unpack(tubes), scale, shape, dtype)
    video = _scatter_fake(dense, tubes, scale, shape, dtype, backend)
    native.run("scatter", video, tubes, scale, [0.0] * len(scale), dense)
    return video


def _scatter_fake(
    grads: Sequence[torch.Tensor],
    tubes: Sequence[int],
    scale: Sequence[float],
    shape: Sequence[int],
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    return grads[0].new_empty(shape, dtype=dtype)


extract_op = define(
    "tubes_extract(Tensor video, int[] tubes, float[] scale, float[] shift, ScalarType dtype, str backend) -> Tensor[]",
    impl=_extract,
    fake=_extract_fake,
    flops=None,
)
scatter_op = define(
    "tubes_scatter(Tensor[] grads, int[] tubes, float[] scale, SymInt[] shape, ScalarType dtype, str backend) "
    "-> Tensor",
    impl=_scatter,
    fake=_scatter_fake,
    flops=None,
)


def extract(
    video: torch.Tensor,
    tubes: list[int],
    scale: list[float],
    shift: list[float],
    dtype: torch.dtype,
    backend: str,
) -> list[torch.Tensor]:
    """`extract_op` with a gradient for a floating clip."""
    batched = not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(video)
    if not video.is_floating_point() and not batched:
        return extract_op(video, tubes, scale, shift, dtype, backend)
    return list(apply("extract_tubes", _Extract, video, tubes, scale, shift, dtype, backend))


class _Extract(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, video: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
        tubes, scale, _, _, backend = args
        ctx.args = tubes, scale, video.shape, video.dtype, backend
        return tuple(extract_op(video, *args))

    @staticmethod
    @differentiable_once("extract_tubes")
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return scatter_op(list(grads), *ctx.args), None, None, None, None, None
