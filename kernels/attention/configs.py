"""Tiles of the Triton kernels, as a pure function of head width, element size and target.

Rows of the table say where they come from: "compiled" rows are known to fit (no spills, shared memory within the limit,
the right matrix instructions), see tests/aot/test_attention_aot.py; "measured" rows were the fastest in a search on the
named GPU. `MIRASOL`-wide rule: nothing is tuned at run time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mirasol.kernels.core.device import Target


@dataclass(frozen=True)
class Tile:
    """One kernel's tile.

    block_m: query rows. block_n: keys. warps, stages: as Triton names them. source: "compiled" or "measured on ...".
    warp_specialize: loads and matrix products in separate warps (Hopper; off until it passed parity on one).
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    source: str = "compiled"
    warp_specialize: bool = False


FORWARD, BACKWARD_KV, BACKWARD_Q = "forward", "backward_kv", "backward_q"
KERNELS = (FORWARD, BACKWARD_KV, BACKWARD_Q)
WIDTHS = (64, 128, 256)  # head widths as padded inside
MOST_WIDTH = WIDTHS[-1]

# (kernel, padded head width, bytes an element) -> tile, by architecture
_SM90 = {
    (FORWARD, 64, 2): Tile(128, 128, 8, 2),
    (FORWARD, 128, 2): Tile(128, 64, 8, 3),
    (FORWARD, 256, 2): Tile(128, 64, 8, 2),
    (BACKWARD_KV, 64, 2): Tile(64, 128, 8, 2),
    (BACKWARD_KV, 128, 2): Tile(64, 64, 8, 2),
    (BACKWARD_KV, 256, 2): Tile(32, 64, 8, 1),
    (BACKWARD_Q, 64, 2): Tile(128, 64, 8, 2),
    (BACKWARD_Q, 128, 2): Tile(128, 64, 8, 2),
    (BACKWARD_Q, 256, 2): Tile(64, 32, 8, 1),
    (FORWARD, 64, 4): Tile(64, 32, 4, 2),
    (FORWARD, 128, 4): Tile(64, 32, 8, 2),
    (FORWARD, 256, 4): Tile(32, 32, 8, 1),
    (BACKWARD_KV, 64, 4): Tile(32, 32, 4, 1),
    (BACKWARD_KV, 128, 4): Tile(32, 32, 8, 1),
    (BACKWARD_KV, 256, 4): Tile(16, 16, 4, 1),
    (BACKWARD_Q, 64, 4): Tile(32, 32, 4, 1),
    (BACKWARD_Q, 128, 4): Tile(32, 32, 8, 1),
    (BACKWARD_Q, 256, 4): Tile(16, 16, 4, 1),
}
_TABLES = {80: _SM90, 90: _SM90, 100: _SM90, 0: _SM90}
_INTERPRETED = Tile(16, 16, 4, 1, source="interpreted")

_pinned: dict[str, Tile] = {}


def padded_width(width: int) -> int:
    """The head width that a kernel computes with: a power of two of at least 64 (narrower tiles break on Hopper)."""
    return next(padded for padded in WIDTHS if padded >= width)


def tile(kernel: str, width: int, itemsize: int, target: Target) -> Tile:
    """The tile of `kernel` for a head width, an element size in bytes and a target.

    Float64 exists in the interpreter only, which has one tile.
    """
    if kernel in _pinned:
        return _pinned[kernel]
    if target.kind == "interpreter":
        return _INTERPRETED
    return table(target)[kernel, padded_width(width), itemsize]


def table(target: Target) -> dict[tuple[str, int, int], Tile]:
    """All rows for a target: those of the newest architecture that is not newer."""
    newest = max(arch for arch in _TABLES if arch <= target.arch)
    return _TABLES[newest]


@contextlib.contextmanager
def pinned(**tiles: Tile) -> Iterator[None]:
    """Use the given tiles, by kernel name, inside the block: for tests and for the search of new rows."""
    before = dict(_pinned)
    _pinned.update(tiles)
    try:
        yield
    finally:
        _pinned.clear()
        _pinned.update(before)


def splits(programs: int, key_tiles: int, target: Target) -> int:
    """Over how many programs the keys of one query tile are split: 1 unless a few queries leave the device idle."""
    if programs * 2 > target.multiprocessors or key_tiles < 2 * _TILES_A_SPLIT:
        return 1
    return min(2 * target.multiprocessors // programs, key_tiles // _TILES_A_SPLIT, _MOST_SPLITS)


_TILES_A_SPLIT = 2  # fewer key tiles than this are not worth a program and a partial result
_MOST_SPLITS = 128


def specialized(found: Tile) -> Tile:
    """The warp-specialised form of a tile: four warps as written, the compiler adds the partitions."""
    return replace(found, warps=4, warp_specialize=True)
