"""The configuration is a pure function with an answer for every supported call, and it fits the target."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirasol.kernels.attention.api import MOST_WIDTH
from mirasol.kernels.attention.triton import config as module
from mirasol.kernels.attention.triton.config import (
    FORWARD,
    KERNELS,
    WIDTHS,
    Config,
    config,
    padded_width,
    pinned,
    shared_memory,
    specialized_warps,
    splits,
)
from mirasol.kernels.core.device import INTERPRETER, Target

AMPERE = Target(80, "cuda", 108, 166912)
ADA = Target(89, "cuda", 128, 101376)
HOPPER = Target(90, "cuda", 132, 232448)
HOPPER_NEWEST = replace(HOPPER, triton=(3, 9))
BLACKWELL = Target(100, "cuda", 148, 232448)
RTX_50 = Target(120, "cuda", 170, 101376)
AMD = Target(0, "hip", 304, 65536)

targets = st.sampled_from([AMPERE, ADA, HOPPER, HOPPER_NEWEST, BLACKWELL, RTX_50, AMD, INTERPRETER])


@settings(deadline=None)
@given(
    st.sampled_from(KERNELS),
    st.integers(1, MOST_WIDTH),
    st.sampled_from([2, 4]),
    targets,
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_every_call_has_a_configuration(
    kernel: str, width: int, itemsize: int, target: Target, masked: bool, tma: bool, halves: bool
) -> None:
    found = config(kernel, width, itemsize, target, masked=masked, tma=tma, halves=halves)
    assert all(size & (size - 1) == 0 and size >= 16 for size in (found.block_m, found.block_n))
    assert (found.masks == "none") == (not masked)
    assert not found.tma or (tma and 90 <= target.arch < 120 and itemsize == 2)
    assert not found.specialize


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kilobytes", [99, 64, 48])
def test_less_shared_memory_makes_smaller_configurations(kernel: str, width: int, masked: bool, kilobytes: int) -> None:
    """RTX 40 and 50, L4 and L40S have 99 KB a program; nothing asks for more than there is."""
    small = replace(ADA, shared_memory=kilobytes * 1024)
    found = config(kernel, width, 2, small, masked=masked, tma=True)
    assert shared_memory(kernel, width, 2, found) <= small.shared_memory
    assert found.block_m * found.block_n <= 128 * 128


@settings(deadline=None)
@given(st.integers(1, MOST_WIDTH))
def test_padding_is_the_least_that_fits(width: int) -> None:
    padded = padded_width(width, HOPPER)
    assert padded >= width
    assert padded in WIDTHS
    assert not any(width <= other < padded for other in WIDTHS)
    assert padded >= padded_width(width, INTERPRETER) >= width


def test_warps_are_specialised_only_when_asked_and_only_on_hopper() -> None:
    def chosen(target: Target, masked: bool = False, halves: bool = True, width: int = 128) -> set[bool]:
        found = [config(kernel, width, 2, target, masked=masked, tma=True, halves=halves) for kernel in KERNELS]
        return {each.specialize for each in found}

    assert chosen(HOPPER) == {False}
    with specialized_warps():
        assert chosen(HOPPER) == chosen(HOPPER_NEWEST) == chosen(HOPPER, width=40) == {True}
        assert chosen(HOPPER, masked=True) == chosen(HOPPER, halves=False) == chosen(HOPPER, width=129) == {False}
        assert all(chosen(other) == {False} for other in (AMPERE, ADA, BLACKWELL, RTX_50, AMD))
    assert chosen(HOPPER) == {False}


@pytest.mark.parametrize(
    ("version", "found"), [((3, 5), "this is 3.5"), ((3, 10), "this is 3.10"), (None, "it is not")]
)
def test_warps_are_not_specialised_by_compilers_that_may_fail(
    version: tuple[int, int] | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "triton_version", lambda: version)
    with pytest.raises(RuntimeError, match=f"need Triton 3.6 to 3.9, {found}"), specialized_warps():
        pass
    assert not config(FORWARD, 64, 2, HOPPER, masked=False, tma=True, halves=True).specialize


def test_pinned_configurations_hold_inside_the_block_only() -> None:
    before = config(FORWARD, 64, 2, HOPPER, masked=True, tma=True)
    with pinned(forward=Config(64, 32, 4)):
        assert config(FORWARD, 64, 2, HOPPER, masked=True, tma=True) == Config(64, 32, 4, masks="edges")
    assert config(FORWARD, 64, 2, HOPPER, masked=True, tma=True) == before


@settings(deadline=None)
@given(st.integers(1, 4096), st.integers(0, 10**6), targets)
def test_keys_are_split_only_where_the_device_would_idle(programs: int, key_blocks: int, target: Target) -> None:
    parts = splits(programs, key_blocks, target)
    assert parts >= 1
    assert parts == 1 or programs * parts <= 2 * target.multiprocessors
    assert parts == 1 or key_blocks // parts >= 1


@pytest.mark.parametrize(("programs", "key_blocks"), [(4, 1000), (1, 128)])
def test_a_streaming_step_fills_the_device(programs: int, key_blocks: int) -> None:
    assert programs * splits(programs, key_blocks, HOPPER) >= 64
