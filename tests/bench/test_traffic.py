"""Counting at small sizes and extrapolating, and the pages written of it, with launches made by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cases import traffic as suite_traffic
from core import traffic
from core.predict import Work
from core.rows import Settings
from core.traffic import Problem, Unlike, deviation, extrapolate, finish, measure, regrid
from report import pages

REPOSITORY = Path(__file__).resolve().parents[2]


def launch(tokens: int, pairs: float = 0, name: str = "attention_fwd_kernel", shared: int = 1000) -> Work:
    """Counters linear in tokens and pairs, as a kernel's are."""
    counters = {
        "warp_instructions": 70 * tokens + 3 * pairs,
        "matrix_flops": 4 * pairs,
        "distinct_read_bytes": 6 * tokens,
    }
    return Work(name, tokens // 8, 256, shared, counters, {"ex2.approx.ftz.f32": pairs, "ret": 2 * tokens})


def triangle(tokens: int) -> tuple[float, float]:
    return tokens, tokens * (tokens + 8) / 2


def test_two_sizes_give_the_counters_of_any_other():
    counted = [(triangle(n), [launch(*map(int, triangle(n)))]) for n in (16, 32)]
    found = extrapolate(counted, triangle(4096))
    assert deviation(found, [launch(*map(int, triangle(4096)))]) < 1e-9
    assert found[0].programs == 512


def test_what_is_not_linear_is_noticed():
    right, bent = launch(64, 300), launch(64, 300)
    bent = replace(bent, counters=bent.counters | {"matrix_flops": 1.02 * bent.counters["matrix_flops"]})
    assert deviation([right], [right]) == 0
    assert deviation([bent], [right]) == pytest.approx(0.02)
    negligible = replace(right, counters=right.counters | {"barriers": 1})
    assert deviation([negligible], [right]) == 0


@pytest.mark.parametrize("other", [launch(32, 99, name="another_kernel"), launch(32, 99, shared=2000)])
def test_other_kernels_or_blocks_at_another_size_are_refused(other):
    with pytest.raises(Unlike, match="launches differ"):
        extrapolate([((1, 16), [launch(16, 9)]), ((1, 32), [other])], (1, 64))


@pytest.fixture
def counting(monkeypatch):
    """The emulator's place is taken by `launch`; which sizes were counted."""
    seen: list[int] = []

    def count(problem, size, programs=None):
        seen.append(size)
        tokens, pairs = problem.numbers(size)
        return [launch(int(tokens), pairs + (50 if size == 40 else 0))]

    monkeypatch.setattr(traffic, "count", count)
    monkeypatch.setattr(traffic, "registers", lambda make, size: {"attention_fwd_kernel": 168})
    return seen


def test_the_third_size_is_counted_and_must_agree(counting):
    problem = Problem(lambda size, device: lambda: None, 4096, counted=(16, 32, 24), numbers=triangle, copies=3)
    (work,) = measure(problem)
    assert counting == [16, 32, 24]
    assert (work.registers, work.programs) == (168, 3 * 512)
    assert work.counters["matrix_flops"] == pytest.approx(3 * 4 * triangle(4096)[1])
    with pytest.raises(Unlike, match="miss those at 40"):
        measure(replace(problem, counted=(16, 32, 40)))


def test_grids_must_agree_with_the_real_call(counting, monkeypatch):
    problem = Problem(lambda size, device: lambda: None, 64, counted=(16, 32), numbers=triangle)
    assert measure(problem)[0].programs == 8
    assert counting == [16, 32, 64]
    count = traffic.count

    def twice(problem, size, programs=None):
        return [replace(work, programs=work.programs * (1 if programs is None else 2)) for work in count(problem, size)]

    monkeypatch.setattr(traffic, "count", twice)
    with pytest.raises(Unlike, match="16 programs, 8 were extrapolated"):
        measure(problem)


def test_minor_kernels_may_be_split_otherwise():
    main, minor, real = launch(64, 9), launch(2, 0, name="sums"), launch(8, 0, name="sums")
    found = regrid([main, replace(minor, programs=3)], [main, replace(real, programs=1)])
    assert [work.programs for work in found] == [8, 1]
    assert found[1].counters == minor.counters


def test_long_programs_start_first_and_copies_repeat_them():
    problem = Problem(lambda size, device: lambda: None, 16, copies=2, weights=(1.0, 2.0))
    assert finish(launch(32, 9), problem).lengths == [2.0] * 4 + [1.0] * 4
    assert finish(launch(32, 0), problem).lengths == []  # no products: all alike


def test_an_interpreting_process_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=0"):
        traffic.require_compiler()


def rows_of(monkeypatch, *works: Work):
    monkeypatch.setattr(suite_traffic, "measure", lambda problem: list(works))
    operator = suite_traffic.attention(128, 2048, 2)
    return suite_traffic.run(operator, Settings(torch.device("cpu")))


def test_a_page_keeps_what_people_wrote_and_gets_tables(monkeypatch, tmp_path):
    rows = rows_of(monkeypatch, launch(4096, 1e9), launch(4096, 2e9, name="attention_bwd_dq_kernel"))
    page = tmp_path / "attention" / "PREDICTIONS.md"
    page.parent.mkdir()
    page.write_text(f"# Title\n\nBefore.\n\n{pages.BEGIN}\nold\n{pages.END}\n\nAfter.\n")
    assert pages.write(rows, tmp_path) == [page]
    text = page.read_text()
    assert text.startswith(f"# Title\n\nBefore.\n\n{pages.BEGIN}\n")
    assert text.endswith(f"{pages.END}\n\nAfter.\n")
    assert "old" not in text
    assert "nothing was measured" in text
    useful = 4 * 256 * suite_traffic.visible_pairs(2048, 2048, q_chunk=512, window=2) * 128
    rate = useful / pages.seconds(rows[:1], "H200") / 1e12
    assert f"| fwd | 1 | {rows[0].detail['predicted']['H200']['bound']} |" in text
    assert pages.number(rate) in text
    pages.write(rows, tmp_path)
    assert page.read_text() == text


def test_a_page_without_markers_and_failed_rows_write_nothing(monkeypatch, tmp_path):
    rows = rows_of(monkeypatch, launch(4096, 1e9))
    page = tmp_path / "attention" / "PREDICTIONS.md"
    page.parent.mkdir()
    page.write_text("no markers")
    with pytest.raises(ValueError, match="needs the lines"):
        pages.write(rows, tmp_path)
    rows[0].status = "FAIL"
    with pytest.raises(ValueError, match="failed"):
        pages.write(rows, tmp_path)
    assert page.read_text() == "no markers"


@pytest.mark.parametrize("page", pages.PAGES)
def test_the_pages_have_markers(page):
    text = (REPOSITORY / "kernels" / page / "PREDICTIONS.md").read_text()
    assert pages.replaced(text, "") != text


def test_every_page_has_cases():
    found = {case.name.split()[0] for case in suite_traffic.cases(Settings(torch.device("cpu")))}
    assert found == set(pages.PAGES)


def test_covered_bytes_of_tubes_are_those_of_the_tokens():
    """Tubes that do not overlap cover as many bytes as their tokens hold."""
    covered = suite_traffic._covered(32, 224)
    assert covered.sum() <= sum(
        suite_traffic.np.prod(suite_traffic.tube_grid(tube, 32, 224, 224)) * tube.size
        for tube in suite_traffic.TUBEVIT_TUBES
    )
    assert covered[0, :16, :16].all()


@pytest.mark.slow
def test_the_command_counts_a_compiled_kernel(tmp_path):
    command = [sys.executable, str(REPOSITORY / "bench" / "run.py"), "--only", "traffic", "--filter", "ttm read B 1 "]
    ended = subprocess.run(
        [*command, "--plain", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "pool_fwd" in ended.stdout
    assert "Predicted, not measured" in ended.stdout
