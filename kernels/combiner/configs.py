"""Tiles of the Combiner's kernels: pure functions of shape, dtype and architecture.

Each row says where it comes from: "compiled" means that it compiles for that architecture without spilling and within
its shared memory (`tests/aot/test_combiner.py` holds the registers), not that it was timed.
"""

from __future__ import annotations

import dataclasses

from mirasol.kernels.core.device import Target


@dataclasses.dataclass(frozen=True)
class ForwardTile:
    """Rows, output columns and width of one step of the product, and how many warps and stages run it."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int
    source: str = "compiled"


@dataclasses.dataclass(frozen=True)
class BackwardRows:
    """How the rows of dx are dealt out to programs."""

    width: int  # the row, padded to a power of two
    rows: int  # kept rows in flight in one program
    kept_programs: int  # programs that share the kept rows; each leaves one partial sum of the norm parameters
    zero_programs: int  # programs for the rest of a chunk
    warps: int
    source: str = "compiled"


# Largest first: the first that gives every multiprocessor a tile is taken, else the last.
FORWARD_TILES: dict[tuple[int, int], tuple[ForwardTile, ...]] = {
    # (architecture, bytes of an element)
    (80, 2): (ForwardTile(128, 128, 32, 8, 3), ForwardTile(64, 64, 64, 4, 3)),
    # a step of 64 spills at 128 x 256
    (90, 2): (ForwardTile(128, 256, 32, 8, 4), ForwardTile(128, 128, 64, 8, 3), ForwardTile(64, 64, 64, 4, 4)),
    (100, 2): (ForwardTile(128, 256, 64, 8, 3), ForwardTile(128, 128, 64, 8, 3), ForwardTile(64, 64, 64, 4, 4)),
    (80, 4): (ForwardTile(64, 64, 32, 8, 2),),
    (90, 4): (ForwardTile(64, 64, 32, 8, 2),),
    (100, 4): (ForwardTile(64, 64, 32, 8, 2),),
}
UNALIGNED_TILE = ForwardTile(
    64, 64, 32, 8, 2
)  # rows that do not start at 16-byte borders are loaded element by element
INTERPRETED_TILE = ForwardTile(32, 32, 32, 4, 1, "interpreter")


def forward_tile(rows: int, d_out: int, element_size: int, aligned: bool, target: Target) -> tuple[ForwardTile, int]:
    """The tile of the product of `rows` kept rows with [d_out, d], and how many programs share the columns of a tile's
    rows: as few as give every multiprocessor one, since each reads those rows once more for their statistics.

    Args:
        aligned: every row of x and of the weight starts at a multiple of 16 elements.
    """
    if target.kind == "interpreter":
        return INTERPRETED_TILE, 2
    tiles = FORWARD_TILES[_family(target), element_size] if aligned else (UNALIGNED_TILE,)
    for tile in tiles:
        row_blocks, column_tiles = _ceil_div(rows, tile.rows), _ceil_div(d_out, tile.columns)
        if row_blocks * column_tiles >= target.multiprocessors:
            break
    return tile, min(column_tiles, _ceil_div(target.multiprocessors, row_blocks))


def backward_rows(kept: int, chunks: int, dropped: int, d: int, target: Target) -> BackwardRows:
    """How `kept` rows of width d and the `dropped` tokens of all `chunks` chunks are dealt out.

    Four programs for each multiprocessor share the kept rows; a program that zeroes takes about 16 tokens.
    """
    width = max(16, _next_power_of_two(d))
    if target.kind == "interpreter":
        return BackwardRows(width, 2, 2, 2, 4, "interpreter")
    rows = max(1, 4096 // width)
    kept_programs = max(1, min(4 * target.multiprocessors, _ceil_div(kept, rows)))
    zero_programs = max(1, _ceil_div(dropped, 16 * max(chunks, 1)))
    return BackwardRows(width, rows, kept_programs, zero_programs, 8)


def _family(target: Target) -> int:
    """The newest architecture of the table that is not newer than this one; the oldest for other makers."""
    known = {architecture for architecture, _ in FORWARD_TILES}
    return max((one for one in known if one <= target.arch), default=min(known))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
