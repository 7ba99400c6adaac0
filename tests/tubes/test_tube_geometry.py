"""Grids, centres and the check of tubes, against a convolution's shape and a list of covered indices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirasol.kernels import TUBEVIT_TUBES, Tube, check_tubes, tube_centres, tube_grid

triples = st.tuples(*[st.integers(1, 6)] * 3)
tubes = st.builds(Tube, triples, triples, st.tuples(*[st.integers(0, 4)] * 3))


@settings(deadline=None)
@given(tube=tubes, clip=st.tuples(*[st.integers(1, 14)] * 3))
def test_grid_counts_the_windows_that_fit(tube, clip):
    expected = tuple(
        sum(start + k <= size for start in range(o, size, s)) for size, k, s, o in zip(clip, *tube, strict=True)
    )
    assert tube_grid(tube, *clip) == expected


@settings(deadline=None)
@given(tube=tubes, clip=st.tuples(*[st.integers(1, 14)] * 3))
def test_centres_are_the_means_of_covered_indices(tube, clip):
    grid = tube_grid(tube, *clip)
    if 0 in grid:
        with pytest.raises(ValueError, match="yields no token"):
            tube_centres([tube], *clip)
        return
    indices = torch.stack(torch.meshgrid(*[torch.arange(c, dtype=torch.float32) for c in clip], indexing="ij"), -1)
    expected = []
    for axis, (k, s, o) in enumerate(zip(*tube, strict=True)):
        indices = indices.narrow(axis, o, clip[axis] - o).unfold(axis, k, s)
    expected = indices.mean((-3, -2, -1)).reshape(-1, 3)
    torch.testing.assert_close(tube_centres([tube], *clip), expected)


def test_centres_of_the_published_tubes():
    centres = tube_centres(TUBEVIT_TUBES, 32, 224, 224)
    assert centres.shape == (539, 3)
    assert centres[0].tolist() == [3.5, 3.5, 3.5]
    assert centres[98].tolist() == [4 + 7.5, 8 + 1.5, 8 + 1.5]
    assert centres[-1].tolist() == [0, 13 * 16 + 7.5, 13 * 16 + 7.5]


def test_the_check_names_the_tube_and_the_axis():
    with pytest.raises(ValueError, match=r"tubes\[1\] .* yields no token: along t it needs offset 4 \+ kernel 16"):
        check_tubes(TUBEVIT_TUBES, 8, 224, 224)
    assert check_tubes(TUBEVIT_TUBES, 20, 224, 224) == TUBEVIT_TUBES


def test_plain_tuples_are_taken():
    checked = check_tubes([((1, 2, 2), (1, 2, 2)), [[2, 2, 2], [1, 1, 1], [0, 1, 0]]], 4, 4, 4)
    assert checked == (Tube((1, 2, 2), (1, 2, 2)), Tube((2, 2, 2), (1, 1, 1), (0, 1, 0)))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], ValueError, "tubes must hold at least one"),
        ([(1, 2, 2)], TypeError, r"tubes\[0\].kernel must be three ints"),
        (["abc"], TypeError, r"tubes\[0\] must be a Tube"),
        ([Tube((1, 2), (1, 1, 1))], TypeError, r"tubes\[0\].kernel must be three ints"),
        ([Tube((1, 2, 2.0), (1, 1, 1))], TypeError, r"tubes\[0\].kernel along w must be an int"),
        ([Tube((0, 2, 2), (1, 1, 1))], ValueError, r"tubes\[0\].kernel along t must be at least 1"),
        ([Tube((1, 2, 2), (1, 0, 1))], ValueError, r"tubes\[0\].stride along h must be at least 1"),
        ([Tube((1, 2, 2), (1, 1, 1), (0, 0, -1))], ValueError, r"tubes\[0\].offset along w must be at least 0"),
    ],
)
def test_bad_tubes(bad, error, message):
    with pytest.raises(error, match=message):
        check_tubes(bad, 4, 4, 4)
