"""The tile functions: every row is reached, every multiprocessor gets a program, nothing is left out."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mirasol.kernels.combiner.configs import (
    FOLDED_TILES,
    FORWARD_TILES,
    UNALIGNED_TILE,
    backward_rows,
    folded_tile,
    forward_tile,
)
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


@settings(deadline=None)
@given(sizes, st.integers(1, 8192), st.sampled_from([2, 4]), st.booleans(), targets)
def test_forward_tile_is_one_of_its_table_and_shares_columns_among_no_more_programs_than_tiles(
    rows, d_out, element_size, aligned, target
):
    tile, groups = forward_tile(rows, d_out, element_size, aligned, target)
    if target is INTERPRETER:
        assert groups == 2
        return
    assert 1 <= groups <= -(-d_out // tile.columns)
    assert any(tile in tiles for tiles in FORWARD_TILES.values()) if aligned else tile == UNALIGNED_TILE


@settings(deadline=None)
@given(sizes, st.integers(1, 8192), st.booleans(), targets)
def test_folded_tile_is_one_of_its_table(rows, d_out, aligned, target):
    tile = folded_tile(rows, d_out, 2, aligned, target)
    if target is INTERPRETER:
        assert tile.source == "interpreter"
    else:
        assert any(tile in tiles for tiles in FOLDED_TILES.values()) if aligned else tile == UNALIGNED_TILE


def test_folded_tile_at_the_shapes_of_the_model():
    chosen = {rows: folded_tile(rows, 1024, 2, True, TARGETS[2]) for rows in (32, 512, 2048, 8192)}
    assert {rows: (tile.rows, tile.columns) for rows, tile in chosen.items()} == {
        32: (64, 64),  # spread over the columns
        512: (64, 64),
        2048: (128, 128),  # 128 programs for 132 multiprocessors
        8192: (128, 256),
    }


def test_forward_tile_at_the_shapes_of_the_model():
    def chosen(rows: int, d_out: int = 1024):
        tile, groups = forward_tile(rows, d_out, 2, True, TARGETS[2])
        return tile.rows, tile.columns, groups

    assert chosen(32) == (64, 64, 16)  # a streaming step spreads over the columns
    assert chosen(512) == (64, 64, 16)
    assert chosen(2048) == (128, 128, 8)  # 128 programs for 132 multiprocessors
    assert chosen(8192) == (128, 256, 2)  # the statistics are read twice, not four times
    assert chosen(65536)[:2] == (128, 256)


@settings(deadline=None)
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

    assert tile(103) == tile(100)
    assert tile(103) in FORWARD_TILES[100, 2]
    assert tile(89) == tile(80) == tile(0, "hip")
    assert tile(89) in FORWARD_TILES[80, 2]
