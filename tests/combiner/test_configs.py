"""The tile functions: every row is reached, every multiprocessor gets a program, nothing is left out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mirasol.kernels.combiner.configs import FORWARD_TILES, UNALIGNED_TILE, backward_rows, forward_tile
from mirasol.kernels.core.device import INTERPRETER, Target

TARGETS = [
    Target(80, "cuda", 108, 166912),
    Target(86, "cuda", 84, 101376),
    Target(90, "cuda", 132, 232448),
    Target(100, "cuda", 148, 232448),
    Target(120, "cuda", 170, 101376),
    Target(0, "hip", 304, 65536),
    INTERPRETER,
]
targets = st.sampled_from(TARGETS)
sizes = st.integers(1, 1 << 20)


@given(sizes, st.integers(1, 8192), st.sampled_from([2, 4]), st.booleans(), targets)
def test_forward_tile_fills_the_device_or_is_the_smallest(rows, d_out, element_size, aligned, target):
    tile, groups = forward_tile(rows, d_out, element_size, aligned, target)
    column_tiles = -(-d_out // tile.columns)
    row_blocks = -(-rows // tile.rows)
    if target is INTERPRETER:
        assert groups == 2
        return
    assert 1 <= groups <= column_tiles
    choice = next(tiles for tiles in FORWARD_TILES.values() if tile in tiles) if aligned else (UNALIGNED_TILE,)
    assert tile in choice
    assert row_blocks * column_tiles >= target.multiprocessors or tile == choice[-1]
    assert row_blocks * groups >= min(target.multiprocessors, row_blocks * column_tiles)
    assert (groups - 1) * row_blocks < target.multiprocessors


@given(sizes, st.integers(1, 1024), st.integers(0, 1 << 24), st.integers(1, 4096), targets)
def test_backward_rows_hold_a_row_and_bound_the_partial_sums(kept, chunks, dropped, d, target):
    config = backward_rows(kept, chunks, dropped, d, target)
    assert d <= config.width < max(2 * d, 17)
    assert config.width & (config.width - 1) == 0
    assert config.kept_programs >= 1
    assert config.zero_programs >= 1
    if target is not INTERPRETER:
        assert config.kept_programs <= 4 * target.multiprocessors
        assert config.rows * config.width <= max(4096, config.width)


def test_newer_devices_take_the_newest_row_that_they_can_run():
    def tile(arch: int, kind: str = "cuda"):
        return forward_tile(1 << 20, 1024, 2, True, Target(arch, kind, 132, 232448))[0]

    assert tile(103) == tile(100) == FORWARD_TILES[100, 2][0]
    assert tile(89) == tile(80) == tile(0, "hip") == FORWARD_TILES[80, 2][0]
