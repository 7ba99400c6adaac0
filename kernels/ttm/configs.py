"""Tiles of the summary's Triton kernels, as a pure function of shape, dtype and target.

Every row was compiled for sm_80, sm_90 and sm_100 without spills (tests/aot/test_ttm.py); none was measured on a GPU
yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mirasol.kernels.attention.api import MOST_WIDTH as MOST_HEAD_WIDTH
from mirasol.kernels.core.device import Target
from mirasol.kernels.ttm.params import LatentQueryParams, TokenLearnerParams

MOST_K = 1024  # summary tokens of all summaries side by side
MOST_HIDDEN = 128
MOST_HIDDEN_FLOAT32 = 64  # more spills registers
MOST_WIDTH = 2048
WAVES = 2  # programs a multiprocessor that splits of the tokens aim at


@dataclass(frozen=True)
class Tile:
    """tokens: BP; columns: of the width, a step (BK) or a program's (BD), or of the scores a step; warps; stages."""

    tokens: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """One tile a kernel; `rows` are summary tokens a block, `hidden` is J padded to a power of two or a block of it."""

    rows: int
    hidden: int
    hidden_layer: Tile
    pool: Tile
    scores: Tile
    grad_hidden: Tile
    tokens: Tile
    weights: Tile


def padded(size: int, least: int = 16) -> int:
    """The next power of two, at least what a matrix product takes."""
    return max(least, 1 << (size - 1).bit_length())


def tiles(k: int, hidden: int, d: int, itemsize: int, target: Target, *, linear: bool = False) -> Tiles:
    """Tiles for K = `k` summary tokens, J = `hidden`, width `d` and an element size in bytes.

    Where rows of a product are summary tokens they are at least 64, the least that a warp group multiplies, and at
    most 128; in float32 32, which keeps registers free. With `linear` scores J = K, and J too is taken in blocks.
    """
    if target.kind == "interpreter":
        small, rows = Tile(16, 32, 4, 1), min(64, padded(k))
        return Tiles(rows, rows if linear else padded(hidden), small, small, small, small, small, small)
    older = target.arch < 90
    width = min(128, padded(k, 64)) if linear else padded(hidden, 64)
    rows = min(64 if older else 128, padded(k, 64))
    if itemsize == 4:  # products of float32 by FMA: small tiles
        layer, small = Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)
        return Tiles(32, 64 if linear else width, layer, Tile(16, 64, 8, 1), layer, small, layer, small)
    wide = min(128, padded(d, 64))
    large = max(rows, width) > 64
    return Tiles(
        rows,
        width,
        hidden_layer=Tile(64, 64, 8 if width > 64 else 4, 3),
        pool=Tile(64, wide if older or rows > 64 else min(256, padded(d, 64)), 8, 2),
        scores=Tile(64, 64, 8 if large or older else 4, 2),
        grad_hidden=Tile(64, 64, 8 if width > 64 else 4, 2),
        tokens=Tile(64, wide, 8, 1),
        weights=Tile(64, wide, 8 if large or older else 4, 3),
    )


def size_refusals(side_by_side: Sequence[TokenLearnerParams]) -> list[str]:
    """One sentence for each reason why the kernels cannot run these summaries of the same tokens at a time."""
    k = sum(params.w2.shape[0] for params in side_by_side)
    hidden = sum(params.w1.shape[0] for params in side_by_side)
    w1 = side_by_side[0].w1
    most_hidden = MOST_HIDDEN_FLOAT32 if w1.dtype == torch.float32 else MOST_HIDDEN
    limits = (
        ("summary tokens", k, MOST_K),
        (f"hidden units in {str(w1.dtype).removeprefix('torch.')}", hidden, most_hidden),
        ("channels", w1.shape[1], MOST_WIDTH),
    )
    return [f"Its kernels serve at most {most} {what}, there are {size}." for what, size, most in limits if size > most]


def pools_latent_queries(params: LatentQueryParams) -> bool:
    """Whether tokens are pooled before values are projected: less work where H k < d, if the kernels hold it."""
    rows, d = params.heads * params.queries.shape[0], params.queries.shape[1]
    return rows < d and rows <= MOST_K and d <= MOST_WIDTH


def latent_query_refusals(params: LatentQueryParams) -> list[str]:
    """One sentence where neither pooling nor attention over projected keys and values serves a latent-query summary."""
    width = params.queries.shape[1] // params.heads
    if pools_latent_queries(params) or width <= MOST_HEAD_WIDTH:
        return []
    return [
        f"Its kernels serve latent queries with heads of at most {MOST_HEAD_WIDTH} channels, these have {width}, "
        f"or with fewer than d rows of heads times queries, at most {MOST_K}, and d at most {MOST_WIDTH}."
    ]


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
