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
    masks: "none" where every tile is seen completely; "edges" masks only the tiles that are not, in a loop apart; "all"
    masks every tile in one loop, for heads so wide that two loops do not fit into the registers.
    tma: loads by the tensor memory accelerator; needs 16-byte aligned strides and a power of two of grouped heads.
    warp_specialize: loads and matrix products in separate warps.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    masks: str = "edges"
    tma: bool = False
    warp_specialize: bool = False
    source: str = "compiled"


FORWARD, BACKWARD_KV, BACKWARD_Q = "forward", "backward_kv", "backward_q"
KERNELS = (FORWARD, BACKWARD_KV, BACKWARD_Q)
WIDTHS = (64, 128, 256)  # head widths as padded inside
MOST_WIDTH = WIDTHS[-1]

Row = tuple[str, int, int, bool]  # kernel, padded head width, bytes an element, whether tiles need masks

# By pointers: sm_80 and newer, AMD, and any target where descriptors cannot read the tensors.
_POINTERS: dict[Row, Tile] = {
    (FORWARD, 64, 2, False): Tile(128, 64, 8, 3),
    (FORWARD, 64, 2, True): Tile(128, 64, 8, 3),
    (FORWARD, 128, 2, False): Tile(64, 64, 8, 2),
    (FORWARD, 128, 2, True): Tile(64, 64, 8, 2),
    (FORWARD, 256, 2, False): Tile(64, 64, 8, 2),
    (FORWARD, 256, 2, True): Tile(64, 32, 8, 2, masks="all"),
    (BACKWARD_KV, 64, 2, False): Tile(64, 128, 8, 2),
    (BACKWARD_KV, 64, 2, True): Tile(32, 64, 4, 2),
    (BACKWARD_KV, 128, 2, False): Tile(64, 64, 8, 2),
    (BACKWARD_KV, 128, 2, True): Tile(64, 64, 8, 2),
    (BACKWARD_KV, 256, 2, False): Tile(32, 32, 8, 1),
    (BACKWARD_KV, 256, 2, True): Tile(32, 32, 8, 1, masks="all"),
    (BACKWARD_Q, 64, 2, False): Tile(128, 64, 8, 2),
    (BACKWARD_Q, 64, 2, True): Tile(128, 64, 8, 2),
    (BACKWARD_Q, 128, 2, False): Tile(64, 64, 8, 2),
    (BACKWARD_Q, 128, 2, True): Tile(64, 64, 8, 2),
    (BACKWARD_Q, 256, 2, False): Tile(64, 32, 8, 1),
    (BACKWARD_Q, 256, 2, True): Tile(64, 32, 8, 1, masks="all"),
    (FORWARD, 64, 4, False): Tile(32, 32, 8, 1),
    (FORWARD, 64, 4, True): Tile(32, 32, 8, 1, masks="all"),
    (FORWARD, 128, 4, False): Tile(32, 32, 8, 1),
    (FORWARD, 128, 4, True): Tile(32, 32, 8, 1, masks="all"),
    (FORWARD, 256, 4, False): Tile(16, 16, 8, 1),
    (FORWARD, 256, 4, True): Tile(16, 16, 8, 1, masks="all"),
    (BACKWARD_KV, 64, 4, False): Tile(16, 32, 4, 1),
    (BACKWARD_KV, 64, 4, True): Tile(16, 32, 4, 1, masks="all"),
    (BACKWARD_KV, 128, 4, False): Tile(16, 16, 4, 1),
    (BACKWARD_KV, 128, 4, True): Tile(16, 16, 4, 1, masks="all"),
    (BACKWARD_KV, 256, 4, False): Tile(16, 16, 8, 1),
    (BACKWARD_KV, 256, 4, True): Tile(16, 16, 8, 1, masks="all"),
    (BACKWARD_Q, 64, 4, False): Tile(32, 32, 8, 1),
    (BACKWARD_Q, 64, 4, True): Tile(32, 32, 8, 1, masks="all"),
    (BACKWARD_Q, 128, 4, False): Tile(16, 16, 4, 1),
    (BACKWARD_Q, 128, 4, True): Tile(16, 16, 4, 1, masks="all"),
    (BACKWARD_Q, 256, 4, False): Tile(16, 16, 8, 1),
    (BACKWARD_Q, 256, 4, True): Tile(16, 16, 8, 1, masks="all"),
}

# By descriptors: sm_90 and newer.
_DESCRIPTORS: dict[Row, Tile] = {
    (FORWARD, 64, 2, False): Tile(128, 128, 8, 3, tma=True),
    (FORWARD, 64, 2, True): Tile(128, 128, 8, 3, tma=True),
    (FORWARD, 128, 2, False): Tile(128, 128, 8, 2, tma=True),
    (FORWARD, 128, 2, True): Tile(128, 64, 8, 3, tma=True),
    (FORWARD, 256, 2, False): Tile(128, 64, 8, 2, tma=True),
    (FORWARD, 256, 2, True): Tile(128, 32, 8, 2, tma=True),
    (BACKWARD_KV, 64, 2, False): Tile(64, 128, 8, 3, tma=True),
    (BACKWARD_KV, 64, 2, True): Tile(64, 128, 8, 3, tma=True),
    (BACKWARD_KV, 128, 2, False): Tile(64, 128, 8, 2, tma=True),
    (BACKWARD_KV, 128, 2, True): Tile(64, 64, 8, 2, tma=True),
    (BACKWARD_KV, 256, 2, False): Tile(64, 64, 8, 1, tma=True),
    (BACKWARD_KV, 256, 2, True): Tile(64, 64, 8, 1, tma=True, masks="all"),
    (BACKWARD_Q, 64, 2, False): Tile(128, 128, 8, 2, tma=True),
    (BACKWARD_Q, 64, 2, True): Tile(128, 64, 8, 2, tma=True),
    (BACKWARD_Q, 128, 2, False): Tile(128, 64, 8, 2, tma=True),
    (BACKWARD_Q, 128, 2, True): Tile(128, 32, 8, 2, tma=True),
    (BACKWARD_Q, 256, 2, False): Tile(64, 32, 8, 2, tma=True),
    (BACKWARD_Q, 256, 2, True): Tile(64, 32, 8, 2, tma=True, masks="all"),
    (BACKWARD_Q, 256, 4, False): Tile(16, 16, 4, 1),
    (BACKWARD_Q, 256, 4, True): Tile(16, 16, 4, 1, masks="all"),
}

# Where sm_100 and newer need another row than Hopper: the second stage would not fit into the registers.
_BLACKWELL: dict[Row, Tile] = {(BACKWARD_Q, 256, 2, False): Tile(64, 32, 8, 1, tma=True)}

# Hopper's warp-specialised form, inside `warp_specialized` until it has passed the parity tests on such a GPU.
_SPECIALIZED: dict[Row, Tile] = {
    (FORWARD, 64, 2, False): Tile(128, 128, 4, 2, tma=True, warp_specialize=True),
    (FORWARD, 128, 2, False): Tile(128, 128, 4, 2, tma=True, warp_specialize=True),
}

_INTERPRETED = Tile(16, 16, 4, 1, source="interpreted")
_pinned: dict[str, Tile] = {}
_switches = {"warp_specialized": False}


def padded_width(width: int) -> int:
    """The head width that a kernel computes with: a power of two of at least 64 (narrower tiles break on Hopper)."""
    return next(padded for padded in WIDTHS if padded >= width)


def tile(
    kernel: str, width: int, itemsize: int, target: Target, *, masked: bool, tma: bool, flat: bool = False
) -> Tile:
    """The tile of a kernel for a head width and an element size in bytes.

    Args:
        masked: False where no tile of the shape needs a mask.
        tma: whether the tensors can be loaded by descriptors.
        flat: whether queries are contiguous and heads not grouped, as the warp-specialised form needs.
    """
    if kernel in _pinned:
        found = _pinned[kernel]
    elif target.kind == "interpreter":
        found = _INTERPRETED
    else:
        found = table(target, tma, flat)[kernel, padded_width(width), itemsize, masked]
    specialize = found.warp_specialize and flat and tma and not masked
    return replace(found, masks=found.masks if masked else "none", tma=found.tma and tma, warp_specialize=specialize)


def table(target: Target, tma: bool, flat: bool = False) -> dict[Row, Tile]:
    """All rows for a target: those with descriptors where it has them, else those with pointers."""
    if not tma or target.arch < 90:
        return _POINTERS
    specialized = _SPECIALIZED if _switches["warp_specialized"] and flat and target.arch == 90 else {}
    return _POINTERS | _DESCRIPTORS | specialized | (_BLACKWELL if target.arch >= 100 else {})


@contextlib.contextmanager
def warp_specialized() -> Iterator[None]:
    """Use the warp-specialised rows inside the block: Hopper, shapes that need no mask, ungrouped heads.

    Triton 3.6 only: the compiler of Triton 3.9 fails on this form.
    """
    before = _switches["warp_specialized"]
    _switches["warp_specialized"] = True
    try:
        yield
    finally:
        _switches["warp_specialized"] = before


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
