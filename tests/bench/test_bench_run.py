"""The command line: whole runs, failures, interruptions, and a machine without the extra."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import run
from core import provenance
from core.rows import Case, Row
from report import files, tables

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCKER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("rich", "matplotlib", "jinja2"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def suite(monkeypatch):
    """Put cases in place of the savings suite's."""

    def install(*cases: Case) -> None:
        fake = SimpleNamespace(
            cases=lambda settings: list(cases), tables=lambda rows: [tables.comparison_table("Fake", rows)]
        )
        monkeypatch.setitem(sys.modules, "cases.savings", fake)
        monkeypatch.setattr("core.roofline.measure", lambda settings: {"copy_gbps": 10.0, "gemm_tflops_float32": 1.0})

    return install


def fine(name: str, speedup: float = 2.0) -> Case:
    """Ours and a peer; the run's clock is another each time, and must not matter."""
    times = dict(p20_ms=1, p80_ms=3, n=3, baseline="peer")

    def rows(settings):
        one = time.perf_counter()
        ours = Row("savings", name, "ours", role="ours", median_ms=one, speedup=speedup, **times)
        return [ours, Row("savings", name, "peer", median_ms=one * speedup, speedup=1.0, **times)]

    return Case(name, rows)


def failing(name: str, error: BaseException) -> Case:
    def raises(settings):
        raise error

    return Case(name, raises)


def rows_of(path: Path) -> dict[str, str]:
    return {row["case"]: row["status"] for row in json.loads(path.read_text())["rows"]}


def test_a_failing_case_does_not_stop_the_sweep(suite, tmp_path, capsys):
    suite(fine("first"), failing("second", RuntimeError("broken")), fine("third"))
    assert run.main(["--only", "savings", "--out", str(tmp_path), "--json", str(tmp_path / "r.json")]) == 1
    assert rows_of(tmp_path / "r.json") == {"first": "ok", "second": "FAIL", "third": "ok"}
    assert "RuntimeError: broken" in capsys.readouterr().out


def test_an_interrupted_run_keeps_its_rows(suite, tmp_path, capsys):
    suite(fine("first"), failing("second", KeyboardInterrupt()), fine("third"))
    assert (
        run.main(["--only", "savings", "--out", str(tmp_path), "--json", str(tmp_path / "r.json")]) == run.INTERRUPTED
    )
    assert rows_of(tmp_path / "r.json") == {"first": "ok"}
    assert json.loads((tmp_path / "r.json").read_text())["interrupted"] is True
    assert "Interrupted: 2 rows" in capsys.readouterr().out


def test_compare_exits_with_1_beyond_the_tolerance(suite, tmp_path):
    old = str(tmp_path / "old.json")
    suite(fine("first", 2.0))
    assert run.main(["--only", "savings", "--out", str(tmp_path), "--json", old]) == 0
    assert run.main(["--only", "savings", "--out", str(tmp_path), "--compare", old]) == 0
    suite(fine("first", 1.5))
    assert run.main(["--only", "savings", "--out", str(tmp_path), "--compare", old]) == 1
    assert run.main(["--only", "savings", "--out", str(tmp_path), "--compare", old, "--tolerance", "0.6"]) == 0
    assert run.main(["--only", "savings", "--out", str(tmp_path), "--json", old, "--compare", old]) == 1, (
        "read before it is written over"
    )


@pytest.mark.parametrize("text", [None, "{", '{"schema": 1}', '{"schema": 0, "rows": []}', "[]"])
def test_compare_names_a_file_that_holds_no_results_before_it_measures(suite, tmp_path, capsys, text):
    suite(failing("first", RuntimeError("measured all the same")))
    if text is not None:
        (tmp_path / "old.json").write_text(text)
    with pytest.raises(SystemExit):
        run.main(["--only", "savings", "--out", str(tmp_path), "--compare", str(tmp_path / "old.json")])
    assert "--compare must name a results file" in capsys.readouterr().err


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder in place of bench/results, and a commit with nothing else changed."""
    monkeypatch.setattr(provenance, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(provenance, "commit", lambda: {"commit": "c", "dirty": False, "uncommitted": []})
    monkeypatch.setattr(run, "BUILD", tmp_path / "build")
    return tmp_path / "results" / "savings-cpu.json"


def test_a_whole_run_is_kept_and_a_part_of_one_does_not_replace_it(suite, shelf, capsys):
    arguments = ["--only", "savings", "--out", str(shelf.parent), "--device", "cpu"]
    suite(fine("first"), fine("second"))
    assert run.main(arguments) == 0
    assert rows_of(shelf) == {"first": "ok", "second": "ok"}
    assert files.read_json(shelf)[0]["code"], "what it was measured with"
    suite(fine("first"), failing("second", KeyboardInterrupt()))
    assert run.main(arguments) == run.INTERRUPTED
    assert rows_of(shelf) == {"first": "ok", "second": "ok"}
    assert rows_of(run.BUILD / shelf.name) == {"first": "ok"}
    assert f"Not kept in {shelf}: interrupted" in capsys.readouterr().out
    assert not list(shelf.parent.glob("*.html"))


def test_code_that_changes_while_it_is_measured_is_not_kept(suite, shelf, monkeypatch, capsys):
    contents = iter(["then", "now"])

    def changing(suites):
        return {"kernels/a.py": next(contents) if "savings" in suites else "the same"}

    monkeypatch.setattr(provenance, "code_of", changing)
    suite(fine("first"))
    run.main(["--only", "savings", "--out", str(shelf.parent), "--device", "cpu"])
    said = capsys.readouterr().out
    assert "Changed while it was measured: kernels/a.py" in said
    assert f"Not kept in {shelf}: changed" in said
    assert not shelf.exists()
    assert files.read_json(run.BUILD / shelf.name)[0]["machine"]["uncommitted"] == ["kernels/a.py"]


def test_list_and_filter_name_cases_without_running_them(suite, tmp_path, capsys):
    suite(failing("first", RuntimeError()), failing("second", RuntimeError()))
    assert run.main(["--list", "--filter", "sec"]) == 0
    assert capsys.readouterr().out == "savings/second\n"
    assert run.main(["--filter", "nothing", "--out", str(tmp_path)]) == 1


def dry_run(target: str) -> str:
    """What make would do, nothing of it done."""
    command = ["make", "-n", target, "OUT=results", "TLX_PYTHON=other/python"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.replace(
        "\\\n", ""
    )


def test_the_steps_of_make_gpu_fit_one_call_of_ten_minutes():
    plan = dry_run("gpu")
    limits = [int(seconds) for seconds in re.findall(r"timeout --signal=INT --kill-after=5 (\d+) ", plan)]
    assert len(limits) == 9
    assert sum(limits) <= 580
    for tool in ("memcheck", "initcheck", "racecheck"):
        assert f"compute-sanitizer --tool {tool} " in plan
    for suite in ("attention", "ttm", "combiner", "tubes"):
        line = next(line for line in plan.splitlines() if f"bench/run.py --only {suite} " in line)
        assert f"--json results/{suite}.json" in line
        assert run.parse(line.split("bench/run.py")[1].replace("--device cuda", "").split()).tlx_python == Path(
            "other/python"
        )


def test_make_gpu_tune_searches_in_two_calls():
    for what in ("attention", "blocks"):
        call = f"bench/tune/search.py {what} --seconds 540 --json results/tune-{what}.json"
        assert call in dry_run(f"gpu-tune-{what}")
    assert dry_run("gpu-tune").count("bench/tune/search.py") == 2


def test_all_suites_measure_and_predictions_go_with_traffic_alone(capsys):
    assert not {"traffic", "step", "decode"} & set(run.parse(["--only", "all"]).suites)
    assert run.parse(["--only", "step"]).suites == ("step",)
    assert run.parse(["--only", "traffic", "--write-predictions"]).write_predictions
    with pytest.raises(SystemExit):
        run.parse(["--only", "attention", "--write-predictions"])
    assert "--only traffic" in capsys.readouterr().err
    assert run.parse(["--only", "traffic", "--write-predictions", "--filter", "traffic/ttm"]).filter == "traffic/ttm"
    with pytest.raises(SystemExit):
        run.parse(["--only", "traffic", "--write-predictions", "--filter", "read"])
    assert "whole pages" in capsys.readouterr().err


def test_failed_rows_write_no_page(monkeypatch, tmp_path, capsys):
    failed = [failing("ttm read", RuntimeError("not counted"))]
    monkeypatch.setitem(sys.modules, "cases.traffic", SimpleNamespace(cases=lambda _: failed, tables=lambda rows: []))
    assert run.main(["--only", "traffic", "--write-predictions", "--out", str(tmp_path)]) == 1
    assert "FAIL pages: ttm read failed: RuntimeError: not counted" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--quick", "--full"], ["--dtype", "int8"]])
def test_bad_arguments_are_named(arguments, capsys):
    with pytest.raises(SystemExit):
        run.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "bench" / "run.py"), *arguments, "--out", str(folder), "--threads", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=folder,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_without_the_extra_it_runs_in_plain_text_and_says_what_the_extra_adds(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    ended = command(
        tmp_path, "--only", "savings", "--quick", "--csv", str(tmp_path / "rows.csv"), PYTHONPATH=str(tmp_path)
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ".[bench]" in ended.stdout
    assert "No plots" in ended.stdout
    assert "No report: No module named 'jinja2'" in ended.stdout
    assert "512 frames need no new" in ended.stdout
    assert "FLOPs of one forward pass" in ended.stdout
    assert "Peak memory" in ended.stdout
    assert not list(tmp_path.glob("*.png"))
    document, rows = files.read_json(next(tmp_path.glob("savings-*.json")))
    assert {row.status for row in rows} == {"ok"}
    assert {"cpu", "threads", "torch", "triton", "cuda", "driver", "gpu", "commit", "dirty", "date"} <= set(
        document["machine"]
    )
    counted = [row for row in rows if row.mode == "count"]
    assert counted
    assert all(row.flops == row.flops_model for row in counted)
    timed = [row for row in rows if row.case.startswith("time ")]
    assert {row.detail["frames"] for row in timed} == {8, 16}
    assert all(row.n >= 2 and row.median_ms and row.peak_bytes and row.speedup for row in timed)
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == len(rows) + 1


def test_with_the_extra_it_draws(tmp_path, capsys):
    assert run.main(["--quick", "--filter", " 16 frames", "--out", str(tmp_path)]) == 0
    drawn = sorted(tmp_path.glob("*.png"))
    assert [path.name.rsplit("-", 1)[1] for path in drawn] == ["frames.png", "ttm.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in drawn)
    assert f"Plot: {drawn[0]}" in capsys.readouterr().out


def test_every_suite_of_operators_is_right_and_timed(tmp_path):
    json_file = tmp_path / "operators.json"
    arguments = ["--quick", "--only", "attention,combiner,ttm,tubes", "--out", str(tmp_path), "--json", str(json_file)]
    assert run.main(arguments) == 0
    _, rows = files.read_json(json_file)
    assert {row.status for row in rows} <= {"ok", "SKIP"}
    timed = [row for row in rows if row.status == "ok"]
    assert {row.suite for row in timed} == {"attention", "combiner", "ttm", "tubes"}
    assert all(row.n and row.median_ms for row in timed)
    judged = [row for row in timed if row.role != "limit" and row.mode != "step"]
    assert all(row.error is not None and row.allowed is not None and row.error <= row.allowed for row in judged)
    ours = {(row.case, row.mode) for row in timed if row.role == "ours"}
    assert ours == {(row.case, row.mode) for row in timed}
