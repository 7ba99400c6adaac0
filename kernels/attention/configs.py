"""Tiles of the Triton kernels, as a pure function of head width, element size and target.

Rows of the table say where they come from: "compiled" rows are known to fit (no spills, shared memory within the limit,
the right matrix instructions), see tests/aot/test_attention_aot.py; "measured" rows were the fastest in a search on the
named GPU. `MIRASOL`-wide rule: nothing is tuned at run time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mirasol.kernels.core.device import Target, triton_version


@dataclass(frozen=True)
class Tile:
    """One kernel's tile.

    block_m: query rows. block_n: keys. warps, stages: as Triton names them. source: "compiled" or "measured on ...".
    masks: "none" where every tile is seen completely; "edges" masks only the tiles that are not, in a loop apart; "all"
    masks every tile in one loop, for heads so wide that two loops do not fit into the registers.
    tma: loads by the tensor memory accelerator; needs 16-byte aligned strides and a power of two of grouped heads.
    warp_specialize: loads and matrix products in separate warps.
    registers: the most that a thread may take. 0 leaves it to the compiler, which may spill a few to make room for one
    more program.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    masks: str = "edges"
    tma: bool = False
    warp_specialize: bool = False
    registers: int = 0
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
    (BACKWARD_KV, 128, 2, True): Tile(32, 64, 8, 2),
    (BACKWARD_KV, 256, 2, False): Tile(32, 32, 8, 1),
    (BACKWARD_KV, 256, 2, True): Tile(32, 32, 8, 1, masks="all"),
    (BACKWARD_Q, 64, 2, False): Tile(128, 64, 8, 2),
    (BACKWARD_Q, 64, 2, True): Tile(128, 32, 8, 2),
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
    (BACKWARD_KV, 128, 4, True): Tile(16, 16, 4, 1, masks="all", registers=168),
    (BACKWARD_KV, 256, 4, False): Tile(16, 16, 8, 1, registers=128),
    (BACKWARD_KV, 256, 4, True): Tile(16, 16, 8, 1, masks="all"),
    (BACKWARD_Q, 64, 4, False): Tile(32, 32, 8, 1),
    (BACKWARD_Q, 64, 4, True): Tile(32, 32, 8, 1, masks="all", registers=128),
    (BACKWARD_Q, 128, 4, False): Tile(16, 16, 4, 1),
    (BACKWARD_Q, 128, 4, True): Tile(16, 16, 4, 1, masks="all", registers=168),
    (BACKWARD_Q, 256, 4, False): Tile(16, 16, 8, 1, registers=128),
    (BACKWARD_Q, 256, 4, True): Tile(16, 16, 8, 1, masks="all"),
}

# AMD's matrix units (compiled for gfx942, 64 KiB of shared memory): where they differ from the rows above.
_AMD: dict[Row, Tile] = {
    (FORWARD, 64, 2, False): Tile(128, 64, 4, 2),
    (FORWARD, 64, 2, True): Tile(128, 32, 4, 1, masks="all"),
    (FORWARD, 128, 2, False): Tile(128, 64, 4, 2),
    (FORWARD, 128, 2, True): Tile(128, 64, 8, 1, masks="all"),
    (BACKWARD_KV, 64, 2, False): Tile(32, 128, 8, 1),
    (BACKWARD_KV, 64, 2, True): Tile(16, 64, 4, 1),
    (BACKWARD_KV, 128, 2, False): Tile(32, 128, 4, 1),
    (BACKWARD_KV, 128, 2, True): Tile(16, 64, 4, 1),
    (BACKWARD_Q, 64, 2, False): Tile(128, 64, 4, 1),
    (BACKWARD_Q, 64, 2, True): Tile(128, 32, 4, 1),
    (BACKWARD_Q, 128, 2, False): Tile(128, 64, 4, 1),
    (BACKWARD_Q, 128, 2, True): Tile(128, 32, 4, 1),
    (FORWARD, 256, 2, False): Tile(64, 32, 4, 1),
    (FORWARD, 256, 2, True): Tile(64, 32, 8, 1),
    (BACKWARD_KV, 256, 2, False): Tile(16, 64, 8, 1),
    (BACKWARD_KV, 256, 2, True): Tile(16, 32, 8, 1),
    (BACKWARD_Q, 256, 2, False): Tile(32, 32, 4, 1),
    (BACKWARD_Q, 256, 2, True): Tile(64, 16, 4, 1),
    (BACKWARD_KV, 256, 4, False): Tile(16, 16, 4, 1),
    (BACKWARD_KV, 256, 4, True): Tile(16, 16, 4, 1, masks="all"),
    (BACKWARD_Q, 256, 4, False): Tile(16, 16, 4, 1),
    (BACKWARD_Q, 256, 4, True): Tile(16, 16, 4, 1, masks="all"),
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
    (BACKWARD_KV, 256, 2, False): Tile(32, 64, 8, 2, tma=True),
    (BACKWARD_KV, 256, 2, True): Tile(32, 64, 8, 2, tma=True, masks="all"),
    (BACKWARD_Q, 64, 2, False): Tile(128, 128, 8, 2, tma=True),
    (BACKWARD_Q, 64, 2, True): Tile(128, 64, 8, 2, tma=True),
    (BACKWARD_Q, 128, 2, False): Tile(128, 64, 8, 2, tma=True),
    (BACKWARD_Q, 128, 2, True): Tile(128, 32, 8, 2, tma=True),
    (BACKWARD_Q, 256, 2, False): Tile(64, 32, 8, 2, tma=True),
    (BACKWARD_Q, 256, 2, True): Tile(64, 32, 8, 2, tma=True, masks="all"),
    (FORWARD, 256, 4, True): Tile(16, 16, 8, 1, masks="all", registers=168),
    (BACKWARD_Q, 256, 4, False): Tile(16, 16, 4, 1),
    (BACKWARD_Q, 256, 4, True): Tile(16, 16, 4, 1, masks="all"),
}

# Triton 3.9 keeps the addresses of all operands of wgmma in registers, which then do not hold a tile of 32 rows.
_HOPPER_SINCE_3_9: dict[Row, Tile] = {(BACKWARD_KV, 256, 2, True): Tile(16, 64, 8, 3, tma=True, masks="all")}

# Where sm_100 and newer need another row than Hopper: accumulators lie in tensor memory, operands in registers.
_BLACKWELL: dict[Row, Tile] = {
    (BACKWARD_KV, 256, 2, False): Tile(64, 64, 8, 1, tma=True),
    (BACKWARD_KV, 256, 2, True): Tile(64, 64, 8, 1, tma=True, masks="all"),
    (BACKWARD_Q, 256, 2, False): Tile(64, 32, 8, 1, tma=True),
}

# Hopper's warp-specialised form, inside `warp_specialized` until it has passed the parity tests on such a GPU.
_SPECIALIZED: dict[Row, Tile] = {
    (FORWARD, 64, 2, False): Tile(128, 128, 4, 2, tma=True, warp_specialize=True),
    (FORWARD, 128, 2, False): Tile(128, 128, 4, 2, tma=True, warp_specialize=True),
}

# Triton 3.7 and newer do not split a tile of queries between two groups of warps: 64 rows, one group.
_SPECIALIZED_SINCE_3_7: dict[Row, Tile] = {
    (FORWARD, 64, 2, False): Tile(64, 128, 4, 2, tma=True, warp_specialize=True),
    (FORWARD, 128, 2, False): Tile(64, 128, 4, 2, tma=True, warp_specialize=True),
}
SPECIALIZING_TRITON = ((3, 6), (3, 10))  # versions of Triton known to compile these rows: from, below

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
    if target.kind == "hip":
        return _POINTERS | _AMD
    if not tma or target.arch < 90:
        return _POINTERS
    if target.arch >= 100:
        return _POINTERS | _DESCRIPTORS | _BLACKWELL
    newer = _HOPPER_SINCE_3_9 if target.triton >= (3, 9) else {}
    rows = _POINTERS | _DESCRIPTORS | newer
    if not (_switches["warp_specialized"] and flat):
        return rows
    return rows | (_SPECIALIZED_SINCE_3_7 if target.triton >= (3, 7) else _SPECIALIZED)


@contextlib.contextmanager
def warp_specialized() -> Iterator[None]:
    """Use the warp-specialised rows inside the block: Hopper, shapes that need no mask, ungrouped heads.

    Raises:
        RuntimeError: Triton is not installed, or its version was not yet seen to compile this form: a compiler that
            fails on it may end the process.
    """
    first, below = SPECIALIZING_TRITON
    version = triton_version()
    if version is None or not first <= version < below:
        found = "it is not installed" if version is None else f"this is {version[0]}.{version[1]}"
        raise RuntimeError(
            f"the warp-specialised form needs Triton {first[0]}.{first[1]} to {below[0]}.{below[1] - 1}, {found}"
        )
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
