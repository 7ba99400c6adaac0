"""The configurations are a pure function with an answer for every supported call."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirasol.kernels.attention import configs, search
from mirasol.kernels.attention.configs import KERNELS, WIDTHS, Tile
from mirasol.kernels.core.device import INTERPRETER, Target

AMPERE = Target(80, "cuda", 108, 166912)
HOPPER = Target(90, "cuda", 132, 232448)
BLACKWELL = Target(100, "cuda", 148, 232448)
HOPPER_NEWEST = replace(HOPPER, triton=(3, 9))
AMD = Target(0, "hip", 304, 65536)
TARGETS = [AMPERE, HOPPER, HOPPER_NEWEST, BLACKWELL, AMD, INTERPRETER]

widths = st.integers(1, configs.MOST_WIDTH)
targets = st.sampled_from(TARGETS)


@settings(deadline=None)
@given(st.sampled_from(KERNELS), widths, st.sampled_from([2, 4]), targets, st.booleans(), st.booleans(), st.booleans())
def test_every_call_has_a_tile(
    kernel: str, width: int, itemsize: int, target: Target, masked: bool, tma: bool, flat: bool
) -> None:
    tile = configs.tile(kernel, width, itemsize, target, masked=masked, tma=tma, flat=flat)
    assert all(size & (size - 1) == 0 and size >= 16 for size in (tile.block_m, tile.block_n))
    assert (tile.masks == "none") == (not masked)
    assert not tile.tma or (tma and target.arch >= 90)
    assert not tile.warp_specialize
    assert tile == configs.tile(kernel, width, itemsize, target, masked=masked, tma=tma, flat=flat)


def test_every_row_says_where_it_comes_from() -> None:
    for target in (AMPERE, HOPPER, HOPPER_NEWEST, BLACKWELL, AMD):
        for tma in (False, True):
            rows = configs.table(target, tma)
            assert len(rows) == len(KERNELS) * len(WIDTHS) * 2 * 2
            assert all(tile.source == "compiled" or tile.source.startswith("measured on") for tile in rows.values())


@settings(deadline=None)
@given(widths)
def test_padding_is_the_least_that_fits(width: int) -> None:
    padded = configs.padded_width(width)
    assert padded >= width
    assert padded in WIDTHS
    assert not any(width <= other < padded for other in WIDTHS)


def test_warps_are_specialised_only_when_asked_and_only_on_hopper() -> None:
    def chosen(target: Target, masked: bool = False, flat: bool = True) -> bool:
        return configs.tile(configs.FORWARD, 128, 2, target, masked=masked, tma=True, flat=flat).warp_specialize

    assert not chosen(HOPPER)
    with configs.warp_specialized():
        assert chosen(HOPPER)
        assert not chosen(HOPPER, masked=True)
        assert not chosen(HOPPER, flat=False)
        assert not chosen(BLACKWELL)
        assert not chosen(AMPERE)
        assert not chosen(AMD)
        assert chosen(HOPPER_NEWEST)
    assert not chosen(HOPPER)


@pytest.mark.parametrize(
    ("version", "found"), [((3, 5), "this is 3.5"), ((3, 10), "this is 3.10"), (None, "it is not")]
)
def test_warps_are_not_specialised_by_compilers_that_may_fail(
    version: tuple[int, int] | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "triton_version", lambda: version)
    with pytest.raises(RuntimeError, match=f"needs Triton 3.6 to 3.9, {found}"), configs.warp_specialized():
        pass
    assert not configs._switches["warp_specialized"]


def test_pinned_tiles_hold_inside_the_block_only() -> None:
    before = configs.tile(configs.FORWARD, 64, 2, HOPPER, masked=True, tma=True)
    with configs.pinned(forward=Tile(64, 32, 4, 1)):
        assert configs.tile(configs.FORWARD, 64, 2, HOPPER, masked=True, tma=True) == Tile(64, 32, 4, 1)
    assert configs.tile(configs.FORWARD, 64, 2, HOPPER, masked=True, tma=True) == before


@settings(deadline=None)
@given(st.integers(1, 4096), st.integers(0, 10**6), targets)
def test_keys_are_split_only_where_the_device_would_idle(programs: int, key_tiles: int, target: Target) -> None:
    splits = configs.splits(programs, key_tiles, target)
    assert splits >= 1
    assert splits == 1 or programs * splits <= 2 * target.multiprocessors
    assert splits == 1 or key_tiles // splits >= 1


@pytest.mark.parametrize(("programs", "key_tiles"), [(4, 1000), (1, 128)])
def test_a_streaming_step_fills_the_device(programs: int, key_tiles: int) -> None:
    assert programs * configs.splits(programs, key_tiles, HOPPER) >= 64


def test_the_search_ranks_what_runs_and_prints_rows() -> None:
    """The interpreter runs the kernels; a timer that counts programs' keys stands in for a GPU's."""
    problem = search.Problem(1, 1, 2, 32, 16, torch.float32)
    tiles = [Tile(16, 16, 4, 1), Tile(32, 32, 4, 1), Tile(24, 16, 4, 1)]  # the last is no power of two: it fails

    def timer(call: Callable[[], object]) -> float:
        call()
        return 1.0 / configs._pinned[configs.FORWARD].block_m

    found = search.search(problem, configs.FORWARD, tiles, timer, "cpu")
    assert [tile.block_m for _, tile in found] == [32, 16]
    row = search.format_row(problem, configs.FORWARD, found[0][1], True, "a test")
    (key,) = ast.literal_eval("[" + row.split(": Tile")[0].strip() + "]")
    assert key == ("forward", 64, 4, True)
    assert "measured on a test" in row


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_the_search_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main([]) == 1
    assert "needs a GPU" in capsys.readouterr().err
