"""Block sizes of the pooling kernels, as a pure function of shape, dtype and target. Imports no Triton.

Every row was compiled for sm_80, sm_90 and sm_100 without spills (tests/aot/test_ttm_aot.py); none was measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mirasol.kernels.core.device import Target

MOST_ROWS = 1024  # summary tokens, or heads times queries
MOST_HIDDEN = 128
MOST_HIDDEN_FLOAT32 = 64  # more spills registers
MOST_WIDTH = 2048
WAVES = 2  # programs a multiprocessor that splits of the tokens aim at


@dataclass(frozen=True)
class Block:
    """tokens: BP; columns: of the width, a step (BK) or a program's (BD), or of the scores a step; warps; stages."""

    tokens: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """One block a kernel; `rows`: summary tokens a block; `hidden`: J padded to a power of two, or a block of it."""

    rows: int
    hidden: int
    hidden_layer: Block
    pool: Block
    scores: Block
    grad_hidden: Block
    tokens: Block
    weights: Block


def config(k: int, hidden: int, d: int, itemsize: int, target: Target, *, linear: bool = False) -> Config:
    """For K = `k` summary tokens, J = `hidden`, width `d` and an element size in bytes.

    Where rows of a product are summary tokens they are at least 64, the least that a warp group multiplies, and at
    most 128; in float32 32, which keeps registers free. With `linear` scores J = K, and J too is taken in blocks.
    """
    if target.kind == "interpreter":
        small, rows = Block(16, 32, 4, 1), min(64, _padded(k, 16))
        return Config(rows, rows if linear else _padded(hidden, 16), small, small, small, small, small, small)
    older = target.arch < 90
    width = min(128, _padded(k)) if linear else _padded(hidden)
    rows = min(64 if older else 128, _padded(k))
    if itemsize == 4:  # products of float32 by FMA: small blocks
        layer, small = Block(32, 32, 8, 1), Block(16, 32, 8, 1)
        return Config(32, 64 if linear else width, layer, Block(16, 64, 8, 1), layer, small, layer, small)
    wide = min(128, _padded(d))
    large = max(rows, width) > 64
    return Config(
        rows,
        width,
        hidden_layer=Block(64, 64, 8 if width > 64 else 4, 3),
        pool=Block(64, wide if older or rows > 64 else min(256, _padded(d)), 8, 2),
        scores=Block(64, 64, 8 if large or older else 4, 2),
        grad_hidden=Block(64, 64, 8 if width > 64 else 4, 2),
        tokens=Block(64, wide, 8, 1),
        weights=Block(64, wide, 8 if large or older else 4, 3),
    )


def _padded(size: int, least: int = 64) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (size - 1).bit_length())


def size_refusals(k: int, hidden: int, d: int, dtype: torch.dtype) -> list[str]:
    """One sentence for each reason why the kernels cannot run a TokenLearner of these sizes."""
    most_hidden = MOST_HIDDEN_FLOAT32 if dtype == torch.float32 else MOST_HIDDEN
    limits = (
        ("summary tokens", k, MOST_ROWS),
        (f"hidden units in {str(dtype).removeprefix('torch.')}", hidden, most_hidden),
        ("channels", d, MOST_WIDTH),
    )
    return [f"Its kernels serve at most {most} {what}, there are {size}." for what, size, most in limits if size > most]


def splits(programs: int, work: int, target: Target) -> int:
    """In how many parts to cut `work` steps so that `programs` a part fill the device; a power of two."""
    wanted = -(-WAVES * target.multiprocessors // max(programs, 1))
    count = 1
    while count < wanted and 2 * count <= work:
        count *= 2
    return min(count, 64)


def pool_splits(programs: int, work: int, target: Target) -> int:
    """As `splits` for the pooling kernel, whose programs fill a multiprocessor: no more parts than run at a time.

    Every part is written in float32 and read again, so that parts which wait for others only cost.
    """
    count = 1
    while 2 * count * programs <= target.multiprocessors and 2 * count <= work:
        count *= 2
    return count
