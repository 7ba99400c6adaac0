"""Two runs, compared by ratios that each took inside its own process."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from core.rows import Row
from report.compare import compare_runs

MACHINE = {"cpu": "one", "threads": 2, "gpu": None, "torch": "2"}
RUN = {"machine": MACHINE}


def case(name: str = "case", *, clock: float = 1.0, **ours) -> list[Row]:
    """A peer, and ours at twice its speed, on a clock of its own."""
    about = dict(mode="fwd", dtype="float32", device="cpu", baseline="peer", n=3, peak_bytes=100, flops=4)
    mine = Row("s", name, "ours", role="ours", median_ms=1.0 * clock, speedup=2.0, **about)
    return [replace(mine, **ours), Row("s", name, "peer", median_ms=2.0 * clock, speedup=1.0, **about)]


def compare(old: list[Row], new: list[Row], tolerance: float = 0.1):
    return compare_runs((RUN, old), (RUN, new), tolerance)


def test_a_slower_machine_is_no_worse():
    table, worse = compare(case(), case(clock=7.0))
    assert not worse
    assert table.rows == []
    assert "speed-ups of ours, 1 pairs: geometric mean 1.000x, worst 1.000x (s/case fwd ours)" in table.notes


@pytest.mark.parametrize(
    ("now", "worse", "shown"),
    [
        (dict(speedup=1.9), False, 0),
        (dict(speedup=1.7), True, 1),
        (dict(speedup=3.0), False, 1),
        (dict(peak_bytes=200), True, 1),
        (dict(peak_bytes=50), False, 1),
        (dict(flops=8), True, 1),
        (dict(status="FAIL", speedup=None), True, 1),
        (dict(status="SKIP", speedup=None), True, 1),
        (dict(speedup=math.nan), True, 1),
        (dict(speedup=None), True, 1),
        (dict(baseline="another"), True, 1),
        (dict(impl="renamed"), True, 1),
    ],
)
def test_what_became_of_ours_decides(now, worse, shown):
    table, found = compare(case(), case(**now))
    assert found is worse
    assert len(table.rows) == shown


def test_a_peer_that_became_slower_or_is_not_there_is_shown_and_no_fault_of_ours():
    without = case()[:1]
    table, worse = compare(case(), without)
    assert not worse
    assert table.rows == [["s/case fwd", "peer", "result", "ok", "not measured", ""]]
    wrong = case()
    wrong[1].status = "FAIL"
    assert compare(case(), wrong)[1], "a wrong result is worse, whose ever it is"


def test_mean_and_worst_go_over_all_pairs_of_ours():
    old = [*case("a"), *case("b")]
    table, worse = compare(old, [*case("a", speedup=4.0), *case("b", speedup=1.0)])
    assert worse
    assert "speed-ups of ours, 2 pairs: geometric mean 1.000x, worst 0.500x (s/b fwd ours)" in table.notes
    assert [line[5] for line in table.rows] == ["2.00x", "0.500x"]


def test_a_filtered_run_need_not_hold_every_case_but_something():
    old = [*case("a"), *case("b")]
    assert not compare(old, case("b"))[1]
    table, worse = compare(old, case("c"))
    assert worse
    assert any("nothing in common" in note for note in table.notes)


def test_counted_work_of_a_model_is_compared_though_nothing_was_timed():
    count = Row("s", "work", "model", mode="count", device="meta", flops=100)
    more = Row("s", "work", "model", mode="count", device="meta", flops=120)
    assert compare([count], [more])[1]
    assert not compare([more], [count])[1]


def test_another_machine_and_an_interrupted_run_are_said():
    old = {"machine": {**MACHINE, "cpu": "two"}, "interrupted": True}
    table, _ = compare_runs((old, case()), (RUN, case()), 0.1)
    assert any("different cpu: two then, one now" in note for note in table.notes)
    assert any("interrupted" in note for note in table.notes)
