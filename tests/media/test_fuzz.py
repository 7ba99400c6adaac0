"""A few hundred damaged files; `python tests/media/fuzz.py --count 10000` is the long run."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("av")

import fuzz


@pytest.mark.slow
def test_damaged_files_are_read_or_refused(tmp_path):
    seeds, kept = tmp_path / "seeds", tmp_path / "kept"
    seeds.mkdir()
    kept.mkdir()
    assert len(fuzz.write_seeds(seeds)) > 20
    counts = Counter(result for _, result, _, _ in fuzz.fuzz(seeds, 0, range(600), kept))
    assert counts["loaded"] > 200
    assert counts["refused"] > 100
    assert set(counts) == {"loaded", "refused"}, sorted(path.name for path in kept.iterdir())


def test_damage_is_a_function_of_two_numbers():
    contents = [bytes(range(256)) * 20, b"RIFF" * 500]
    first, again, other = (fuzz.case(seed, 4, ["a", "b"], contents) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[1] != contents[0]
