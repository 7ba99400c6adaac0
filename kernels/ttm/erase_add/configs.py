"""Tiles of the erase-add write's Triton kernels, as a pure function of shape, dtype and target.

Every row was compiled for sm_80, sm_90 and sm_100 without spills (tests/aot/test_erase_add.py); none was measured on a
GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mirasol.kernels.core.device import Target
from mirasol.kernels.ttm.configs import Tile, padded
from mirasol.kernels.ttm.params import EraseAddParams

MOST_SLOTS = 32
MOST_READ = 128
MOST_HIDDEN = 64
MOST_WIDTH = 2048
ROWS = Tile(1, MOST_WIDTH, 4, 1)
SUMS = Tile(32, 128, 4, 1)  # parts at a time, numbers a program


@dataclass(frozen=True)
class Widths:
    """d: width; read: r; slots: S; hidden units of select, and of the wider network over tokens and over channels."""

    d: int
    read: int
    slots: int
    select: int
    tokens: int
    channels: int


@dataclass(frozen=True)
class Sides:
    """Widths padded to powers of two, as tiles hold them, and how many slots a program of the backward takes."""

    slots: int
    read: int
    select: int
    tokens: int
    channels: int
    group: int


@dataclass(frozen=True)
class Tiles:
    """One tile a kernel, in the order of their launches."""

    select: Tile
    tokens: Tile
    channels: Tile
    update: Tile
    update_back: Tile
    channels_back: Tile
    tokens_back: Tile
    rows: Tile
    scores_back: Tile
    select_back: Tile
    sums: Tile


def sides(widths: Widths, itemsize: int, target: Target) -> Sides:
    """Every side of a product is at least 64 on matrix units that want it, for elements of `itemsize` bytes."""
    least = 64 if itemsize == 2 and target.arch >= 90 else 16
    sizes = (widths.slots, widths.read, widths.select, widths.tokens, widths.channels)
    slots, read, select, tokens, channels = (padded(size, least) for size in sizes)
    return Sides(slots, read, select, tokens, channels, group=min(4, padded(widths.slots, 1)))


def tiles(side: Sides, itemsize: int, target: Target) -> Tiles:
    """Tiles for padded widths and elements of `itemsize` bytes."""
    if target.kind == "interpreter":
        return Tiles(*[Tile(16, 32, 4, 1)] * 11)
    tall = side.read > 64
    if itemsize == 4:
        small = Tile(16, 32, 8, 1)
        return Tiles(
            select=small,
            tokens=small,
            channels=small,
            update=Tile(16, 64, 4, 1),
            update_back=Tile(8, 32, 4, 1),
            channels_back=small,
            tokens_back=Tile(16, 16, 8, 1) if tall else small,
            rows=ROWS,
            scores_back=Tile(16, 32, 4, 1),
            select_back=small,
            sums=SUMS,
        )
    if target.arch < 90:  # larger tiles spill
        walk, back = Tile(32, 64, 4, 1), Tile(32, 64, 8, 1)
        channels_back, tokens_back, scores_back = Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), walk
    else:
        walk, back = Tile(64, 64, 4, 1), Tile(64, 64, 8, 1)
        channels_back, tokens_back, scores_back = back, back if tall else walk, back
    return Tiles(
        select=replace(walk, stages=2),
        tokens=walk,
        channels=walk,
        update=Tile(16, 64, 4, 1),
        update_back=Tile(8, 64, 8 if target.arch >= 100 else 4, 1),
        channels_back=channels_back,
        tokens_back=tokens_back,
        rows=ROWS,
        scores_back=scores_back,
        select_back=back,
        sums=SUMS,
    )


def widths_of(params: EraseAddParams) -> Widths:
    """The widths that tiles depend on."""
    return Widths(
        d=params.select_norm_weight.shape[0],
        read=params.erase_tokens.w1.shape[1],
        slots=params.select.w2.shape[0],
        select=params.select.w1.shape[0],
        tokens=max(params.erase_tokens.w1.shape[0], params.add_tokens.w1.shape[0]),
        channels=max(params.erase_channels.w1.shape[0], params.add_channels.w1.shape[0]),
    )


def size_refusals(params: EraseAddParams) -> list[str]:
    """One sentence for each reason why the kernels cannot run this write."""
    widths = widths_of(params)
    limits = (
        ("slots", widths.slots, MOST_SLOTS),
        ("output tokens", widths.read, MOST_READ),
        ("hidden units", max(widths.select, widths.tokens, widths.channels), MOST_HIDDEN),
        ("channels", widths.d, MOST_WIDTH),
    )
    return [f"Its kernels serve at most {most} {what}, there are {size}." for what, size, most in limits if size > most]
