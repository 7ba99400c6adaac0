"""Block sizes of the pooling kernels, as a pure function of shape, dtype and target. Imports no Triton.

One forward kernel serves all sizes up to the limits here, with and without a second layer; they change its blocks only.
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
WAVES = 2  # programs a multiprocessor that splits of the tokens, and groups of items, aim at
COUNTERS = 64  # of the forward kernel's programs: tickets drawn, and programs done of each of the groups


@dataclass(frozen=True)
class Block:
    """tokens: BP; columns: of the width, a step (BK) or a program's (BD), or of the scores a step; warps; stages.

    registers: the most that a thread may take; 0 leaves it to the compiler.
    """

    tokens: int
    columns: int
    warps: int
    stages: int
    registers: int = 0


@dataclass(frozen=True)
class Config:
    """One block a kernel; `rows`: summary tokens a block; `hidden`: J padded to a power of two, or a block of it.

    `step`: BK of the forward kernel, whose second pass takes the columns of `pool`.
    """

    rows: int
    hidden: int
    step: int
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
        return Config(rows, rows if linear else _padded(hidden, 16), 32, small, small, small, small, small)
    older = target.arch < 90
    width = min(128, _padded(k)) if linear else _padded(hidden)
    rows = min(64 if older else 128, _padded(k))
    if itemsize == 4:  # products of float32 by FMA: small blocks
        layer, small = Block(32, 32, 8, 1), Block(16, 32, 8, 1)
        return Config(32, 64 if linear else width, 32, layer, layer, small, layer, small)
    wide = min(128, _padded(d))
    large, little = max(rows, width) > 64, target.shared_memory < 160_000
    # Triton 3.9 leaves 128 registers to these on Blackwell, and spills.
    registers = 168 if target.arch >= 100 and width > 64 >= rows else 0
    return Config(
        rows,
        width,
        step=64 if little else 128 if older or large else 256,
        # 64 columns where they do: more programs in small batches.
        pool=Block(64, 128 if large or d >= 1024 else 64, 8, 2 if little else 4, registers),
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


def group(batch: int, tiles: int, target: Target) -> int:
    """How many of `batch` items of `tiles` programs make a group: as many as run at a time, at most 63 groups in all,
    and groups as even as can be, as the last one has programs for items that are not there.

    What a group's first pass brings into the L2 cache is used before that of the group after the next comes in.
    """
    most = max(-(-WAVES * target.multiprocessors // tiles), -(-batch // (COUNTERS - 1)))
    groups = -(-batch // most)
    return -(-batch // groups)
