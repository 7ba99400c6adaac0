"""Tiles of the Combiner's kernels: pure functions of shape, dtype and architecture.

Each row says where it comes from: "compiled" means that it compiles for that architecture without spilling and within
its shared memory (`tests/aot/test_combiner.py` holds the registers), not that it was timed.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

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


FORWARD_TILES: dict[tuple[int, int], tuple[ForwardTile, ...]] = {
    # (architecture, bytes of an element)
    (80, 2): (ForwardTile(128, 128, 32, 8, 3), ForwardTile(64, 64, 64, 4, 3)),
    # a step of 64 spills at 128 x 256
    (90, 2): (ForwardTile(128, 256, 32, 8, 4), ForwardTile(128, 128, 64, 8, 3), ForwardTile(64, 64, 64, 4, 4)),
    (100, 2): (ForwardTile(128, 256, 64, 8, 3), ForwardTile(128, 128, 64, 8, 3), ForwardTile(64, 64, 64, 4, 4)),
    (80, 4): (ForwardTile(64, 64, 16, 8, 3),),
    (90, 4): (ForwardTile(64, 64, 16, 8, 3),),
    (100, 4): (ForwardTile(64, 64, 16, 8, 3),),
}
FOLDED_TILES: dict[int, tuple[ForwardTile, ...]] = {  # by architecture; 16 bits
    80: (ForwardTile(128, 128, 32, 8, 3), ForwardTile(64, 64, 64, 4, 3)),
    90: (ForwardTile(128, 256, 64, 8, 4), ForwardTile(128, 128, 64, 8, 4), ForwardTile(64, 64, 64, 4, 4)),
    100: (ForwardTile(128, 128, 64, 8, 4), ForwardTile(64, 64, 64, 4, 4)),
}
FOLD_ROWS, FOLD_STEP = 4, 512  # rows of the projection a program folds, and columns a step
UNALIGNED_TILE = ForwardTile(
    64, 64, 32, 8, 2
)  # rows that do not start at 16-byte borders are loaded element by element
MAX_WIDTH = 8192  # backward holds whole rows in registers
MULTIPLY_ADDS = 1330  # of 16 bits, a cycle and multiprocessor: 65 % of what an H100's tensor cores do (assumed)
L2_BYTES = 24  # a cycle and multiprocessor when all read: 5.5 TB/s over 132 at 1.7 GHz (assumed)
INTERPRETED_TILE = ForwardTile(32, 32, 32, 4, 1, "interpreter")


@functools.lru_cache(maxsize=1024)
def forward_tile(rows: int, d_out: int, element_size: int, aligned: bool, target: Target) -> tuple[ForwardTile, int]:
    """The tile of the product of `rows` kept rows with [d_out, d], and how many programs share the columns of a tile's
    rows: the pair that the estimate below finds fastest.

    Args:
        aligned: every row of x and of the weight starts at a multiple of 16 elements.
    """
    if target.kind == "interpreter":
        return INTERPRETED_TILE, 2
    tiles = FORWARD_TILES[_family(target), element_size] if aligned else (UNALIGNED_TILE,)
    pairs = [(tile, groups) for tile in tiles for groups in _column_groups(_ceil_div(d_out, tile.columns))]
    return min(pairs, key=lambda pair: _cycles(pair[0], pair[1], rows, d_out, element_size, target.multiprocessors))


def folds(dtype: torch.dtype, norm: str) -> bool:
    """Whether the forward pass folds the norm's parameters into the projection's, and so reads rows once.

    Only in bfloat16: the product of two parameters may leave float16's range, and float32 and float64 promise results
    as exact as with the norm first, however large the mean. Without a norm there is nothing to fold.
    """
    return dtype == torch.bfloat16 and norm != "none"


@functools.lru_cache(maxsize=1024)
def folded_tile(rows: int, d_out: int, element_size: int, aligned: bool, target: Target) -> ForwardTile:
    """The tile of the folded product of `rows` kept rows with [d_out, d]: one program for each tile of the output."""
    if target.kind == "interpreter":
        return INTERPRETED_TILE
    tiles = FOLDED_TILES[_family(target)] if aligned else (UNALIGNED_TILE,)

    def cycles(tile: ForwardTile) -> float:
        programs = _ceil_div(rows, tile.rows) * _ceil_div(d_out, tile.columns)
        return _ceil_div(programs, target.multiprocessors) * _tile_cycles(tile, element_size)

    return min(tiles, key=cycles)


def _column_groups(column_tiles: int) -> list[int]:
    """1, 2, 4, ... and all of the column tiles."""
    return [1 << i for i in range((column_tiles - 1).bit_length())] + [column_tiles]


def _cycles(tile: ForwardTile, groups: int, rows: int, d_out: int, element_size: int, multiprocessors: int) -> float:
    """Cycles for each element of d, on the fullest multiprocessor: every program reads its rows for their statistics,
    then runs its tiles, bound by the tensor cores or by reading rows and weights from the L2 cache."""
    row_blocks, column_tiles = _ceil_div(rows, tile.rows), _ceil_div(d_out, tile.columns)
    programs = _ceil_div(row_blocks * groups, multiprocessors)
    statistics = tile.rows * element_size / L2_BYTES
    return programs * (statistics + _ceil_div(column_tiles, groups) * _tile_cycles(tile, element_size))


def _tile_cycles(tile: ForwardTile, element_size: int) -> float:
    """Cycles for each element of d of one tile, bound by reading rows and weights or by the tensor cores."""
    read = (tile.rows + tile.columns) * element_size / L2_BYTES
    return max(read, tile.rows * tile.columns / (MULTIPLY_ADDS * 2 / element_size))


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
