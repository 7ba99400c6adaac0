"""What the Combiner's kernels share: where the kept rows lie, and their statistics."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from mirasol.kernels.combiner.chunks import take_last_m
from mirasol.kernels.core.precision import accumulate_dtype


@triton.jit
def kept_rows(rows, R, boundaries, T, m, n, stride_b, stride_t, stride_n):
    """Offsets (int64) of kept rows in a tensor of these strides, and which of them exist.

    `n` is the tokens of a chunk, or with boundaries those of the whole sequence.
    """
    inside = rows < R
    chunk, i = rows // m, rows % m
    b, t = chunk // T, chunk % T
    if boundaries is None:
        token = n - m + i
    else:
        token = tl.load(boundaries + t + 1, mask=inside, other=0) - m + i
        inside &= (token >= 0) & (token < n)
    offsets = b.to(tl.int64) * stride_b + token.to(tl.int64) * stride_n
    if boundaries is None:
        offsets += t.to(tl.int64) * stride_t
    return offsets, inside


@triton.jit
def row_statistics(
    x_rows, inside, eps, D: tl.constexpr, NORM: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr
):
    """Mean and inverse deviation of rows [BM] in one pass; tiles are merged, which no large mean can harm."""
    mu = tl.zeros((BM,), dtype=ACC)
    if NORM == "none":
        return mu, mu + 1
    squares = tl.zeros((BM,), dtype=ACC)
    seen = tl.zeros((BM,), dtype=ACC)
    for start in tl.range(0, D, BK, num_stages=6):  # loads are pipelined without a product only where asked
        k = start + tl.arange(0, BK)
        v = tl.load(x_rows + k[None, :], mask=inside[:, None] & (k < D)[None, :], other=0).to(ACC)  # [BM, BK]
        if NORM == "rms":
            squares += tl.sum(v * v, 1)
        else:
            count = tl.sum((k < D).to(ACC), 0)
            tile_mean = tl.sum(v, 1) / count
            centred = tl.where((k < D)[None, :], v - tile_mean[:, None], 0)
            delta = tile_mean - mu
            squares += tl.sum(centred * centred, 1) + delta * delta * seen * (count / (seen + count))
            mu += delta * (count / (seen + count))
            seen += count
    return mu, tl.math.rsqrt(tl.where(inside, squares / D + eps, 1))


@dataclasses.dataclass(frozen=True)
class Rows:
    """The kept rows of a call as the kernels take them."""

    x: torch.Tensor
    boundaries: torch.Tensor | None
    shape: tuple[int, int, int]  # B, T, m
    n: int
    strides: tuple[int, int, int]  # batch, chunk (0 with boundaries), token

    @staticmethod
    def of(x: torch.Tensor, m: int, boundaries: torch.Tensor | None) -> Rows:
        """Strides as they are; a last dimension that is not contiguous costs a copy of the kept rows."""
        if x.stride(-1) != 1:
            x, boundaries = take_last_m(x, m, boundaries).contiguous(), None
        if boundaries is None:
            per_batch, per_chunk, per_token, _ = x.stride()
            return Rows(x, None, (x.shape[0], x.shape[1], m), x.shape[2], (per_batch, per_chunk, per_token))
        T = boundaries.shape[0] - 1
        return Rows(x, boundaries, (x.shape[0], T, m), x.shape[1], (x.stride(0), 0, x.stride(1)))

    @property
    def count(self) -> int:
        B, T, m = self.shape
        return B * T * m

    @property
    def aligned(self) -> bool:
        """Whether every row starts at a multiple of 16 elements: Triton then loads 16 bytes at a time."""
        return self.x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in self.strides)

    @property
    def acc(self) -> torch.dtype:
        return accumulate_dtype(self.x.dtype)

    @property
    def ACC(self) -> tl.dtype:
        return tl.float64 if self.x.dtype == torch.float64 else tl.float32

    @property
    def layout(self) -> tuple[int, ...]:
        """T, m, n and the strides: what `kept_rows` asks for after the rows."""
        return (*self.shape[1:], self.n, *self.strides)
