"""Claims from rows: what is said where ours wins, where it does not, and where nothing was measured."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import run
from core.rows import Row, Settings
from report import claims, page, stored
from report.claims import (
    SPECS,
    Spec,
    against_peers,
    last_m,
    same_weights,
    table,
    time_of_everything,
    ttm_of_transformer,
    work_of_everything,
)
from report.files import write_json
from report.savings import CHUNKED, CHUNKED_TTM, EVERYTHING
from report.stored import Result

CLEAN = {"commit": "abc", "dirty": False, "gpu": None, "cpu": "one", "threads": 2, "cores": 2, "date": "d"}
CLEAN |= {"torch": "2", "triton": None, "cuda": None}


def about(*suites: str, **changes) -> dict:
    settings = {"suites": list(suites), "effort": "default", "filter": "", "device": "cpu", "dtype": None}
    settings |= {name: changes.pop(name) for name in list(changes) if name in settings}
    known = {"command": "python bench/run.py", "seconds": 1.0, "finished": "now", "interrupted": False}
    return {"machine": CLEAN, "settings": settings, **known, **changes}


def ours(case: str, speedup: float | None, against: float | None, **values) -> Row:
    values = {"median_ms": 1.0, "suite": "ttm", "impl": "mirasol, torch", "mode": "fwd", "dtype": "float32", **values}
    best = dict(baseline="eager", best_peer="compiled", speedup=speedup, against_best=against)
    return Row(case=case, role="ours", **values, **best)


def scan(*speeds: tuple[float | None, float | None]) -> list[Row]:
    return [ours(f"scan {index}", *pair) for index, pair in enumerate(speeds)]


def combiner(name: str, flops: int | None, frames: int = 128) -> Row:
    return Row(
        "savings", f"every Combiner {frames} frames", name, flops=flops, detail={"frames": frames, "preset": "p"}
    )


def test_where_ours_is_slower_is_counted_and_the_worst_case_named():
    found = against_peers(scan((2.0, 1.5), (1.2, 0.8), (1.1, 0.9), (1.0, 0.98)), "scan ")
    assert found.number == "1.00 to 2.00x eager"
    assert found.peer == "0.800 to 1.50x compiled"
    assert found.fails == "2 of 4 cases: 0.800x compiled (scan 1 fwd)"


def test_the_fastest_of_ours_stands_for_a_case_and_nothing_fails_within_three_percent():
    rows = [*scan((2.0, 0.98)), ours("scan 0", 1.0, 0.5, impl="mirasol, other")]
    found = against_peers(rows, "scan ")
    assert (found.number, found.fails) == ("2.00x eager", claims.NOWHERE)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, 0.0])
def test_what_is_no_number_is_no_claim(value):
    assert against_peers(scan((value, 1.0)), "scan ") is None
    assert against_peers(scan((1.0, value)), "scan ") is None
    assert against_peers([*scan((1.0, value)), ours("scan 9", 3.0, 2.0)], "scan ").number == "3.00x eager"


def test_cases_are_kept_apart_by_prefix_mode_and_variant():
    rows = [ours("scan 0", 2.0, 2.0), ours("scan 0", 3.0, 3.0, mode="step"), ours("read", 4.0, 4.0)]
    assert against_peers(rows, "scan ", modes=("fwd",)).number == "2.00x eager"
    assert against_peers(rows, "", impl="theirs") is None
    assert against_peers(rows, "", keep=lambda row: row.case == "read").number == "4.00x eager"


def test_combiners_that_cost_as_little_as_ttm_are_named():
    rows = [combiner("TTM", 800), combiner("Transformer", 1000), combiner("mean pooling", 796), combiner("one", 804)]
    found = ttm_of_transformer(rows)
    assert found.number == "20.0 % of 1.00 k at 128 frames (preset p)"
    assert found.peer == "mean pooling: -0.5 %"
    assert found.fails == "under 1 % against 2 of 3 Combiners: mean pooling -0.5 % to one 0.5 %"
    assert ttm_of_transformer(rows[1:]) is None
    assert ttm_of_transformer([combiner("TTM", None), *rows[1:]]) is None
    longer = [combiner("TTM", 500, 512), combiner("Transformer", 1000, 512)]
    assert ttm_of_transformer([*longer, *rows]).number == found.number, "the main setting where it is there"
    assert ttm_of_transformer(longer).number.startswith("50.0 %")


def timed(frames: int, **speeds: float) -> list[Row]:
    names = {"everything": EVERYTHING, "chunked": CHUNKED, "ttm": CHUNKED_TTM}
    detail = {"frames": frames, "preset": "p"}
    return [
        Row(
            "savings",
            f"time {frames} frames",
            names[name],
            speedup=speed,
            peak_bytes=100 // max(1, int(speed)),
            detail=detail,
        )
        for name, speed in speeds.items()
    ]


def test_a_length_at_which_chunks_lose_is_named():
    rows = [*timed(512, everything=1.0, chunked=2.0, ttm=4.0), *timed(16, everything=1.0, chunked=0.9, ttm=0.8)]
    found = time_of_everything(rows, "time ")
    assert found.number == "4.00x the speed, 75.0 % less memory at 512 frames (preset p)"
    assert found.peer == "chunks + Transformer: 2.00x"
    assert found.fails == "0.800x at 16 frames"
    assert time_of_everything(timed(16, everything=1.0, chunked=4.0), "time ") is None


def test_a_peer_that_beats_chunks_with_ttm_is_named():
    rows = timed(16, everything=1.0, chunked=2.0, ttm=4.0)
    rows.append(replace(rows[0], impl="everything at once, pooled", speedup=8.0))
    found = time_of_everything(rows, "time ")
    assert found.peer == "everything at once, pooled: 8.00x"
    assert found.fails == "everything at once, pooled is 2.00x as fast"
    works = [
        Row("savings", "work 16 frames", name, flops=flops, detail={"frames": 16})
        for name, flops in ((EVERYTHING, 1000), (CHUNKED_TTM, 400), ("everything at once, pooled", 300))
    ]
    found = work_of_everything(works)
    assert (found.number, found.peer) == ("60.0 % of 1.00 k at 16 frames", "everything at once, pooled: 70.0 %")
    assert found.fails == "everything at once, pooled takes 25.0 % less"
    assert work_of_everything(works[:2]).fails == "nowhere measured; least 60.0 %"
    assert work_of_everything(works[1:]) is None


def test_new_parameters_are_counted():
    rows = [
        Row("savings", f"work {frames} frames", CHUNKED_TTM, detail={"frames": frames, "parameters": size})
        for frames, size in ((512, 1003), (16, 1000))
    ]
    assert same_weights(rows).number == "3 new parameters from 16 to 512 frames, of 1.00 k"
    assert same_weights(rows).fails == "3 parameters are new"
    assert same_weights(rows[:1]) is None


def test_pruning_needs_what_is_counted_and_what_is_timed():
    name = "last-m pruning 4 chunks"
    counted = [
        Row("savings", f"{name}, 6 layers", impl, mode="count", flops=flops)
        for impl, flops in (("last m only", 80), ("all, then slice", 100))
    ]
    measured = [Row("savings", name, "last m only", mode="fwd", speedup=0.9)]
    found = last_m([*counted, *measured])
    assert found.number == "20.0 to 20.0 % of the Combiner's FLOPs; 0.900x the speed"
    assert found.fails == "slower: last-m pruning 4 chunks"
    assert last_m(counted) is None
    assert last_m(measured) is None


SCAN = [Spec("scan", "ttm", "scan", partial(against_peers, prefix="scan "))]


def test_a_claim_without_rows_says_how_to_measure_it():
    (line, learned) = claims.claims([Result("a.json", about("ttm"), [])], None, SCAN)
    assert (line.number, line.state, line.measured) == ("not measured", "not measured", False)
    assert line.command == 'python bench/run.py --only ttm --filter "ttm/scan"'
    assert (learned.claim, learned.state) == ("What the Combiners learn", "not measured")


def test_a_failed_row_of_the_claim_is_where_it_fails():
    broken = Row("ttm", "scan 7", "mirasol, torch", status="FAIL", reason="wrong result", role="ours")
    other = Row("ttm", "read 7", "mirasol, torch", status="FAIL", reason="wrong result", role="ours")
    (line, _) = claims.claims([Result("a.json", about("ttm"), [*scan((2.0, 2.0)), broken, other])], None, SCAN)
    assert (line.number, line.fails) == ("2.00x eager", "FAIL: scan 7 mirasol, torch: wrong result")
    (line, _) = claims.claims([Result("a.json", about("ttm"), [broken])], None, SCAN)
    assert (line.number, line.fails) == ("not measured", "FAIL: scan 7 mirasol, torch: wrong result")


def test_every_device_and_dtype_has_a_line():
    first, second, results = scan((2.0, 2.0)), scan((3.0, 3.0)), []
    low = [replace(row, dtype="bfloat16", speedup=4.0) for row in first]
    for name, dtype, rows in (("c", "bfloat16", low), ("a", None, first), ("b", None, second)):
        results.append(Result(f"{name}.json", about("ttm", dtype=dtype), rows))
    lines = claims.claims(results, None, SCAN)[:-1]
    assert [(line.file, line.where, line.number) for line in lines] == [
        ("a.json", "cpu, float32", "2.00x eager"),
        ("c.json", "cpu, bfloat16", "4.00x eager"),
    ]


def test_the_newest_result_counts():
    old = Result("z.json", about("ttm", finished="2026-01-01"), scan((2.0, 2.0)))
    new = Result("a.json", about("ttm", finished="2026-02-01"), scan((3.0, 3.0)))
    for results in ([old, new], [new, old]):
        assert claims.claims(results, None, SCAN)[0].file == "a.json"


def test_the_run_that_has_just_ended_stands_in_place_of_what_is_stored():
    old, other = Result("old.json", about("ttm"), scan((2.0, 2.0))), Result("other.json", about("tubes"), [])
    fresh = Result("new.json", about("ttm"), scan((3.0, 3.0)))
    assert stored.with_run([old, other], fresh) == [fresh, other]
    for part in (about("ttm", effort="quick"), about("ttm", filter="scan"), about("ttm", interrupted=True)):
        half = Result("new.json", part, scan((3.0, 3.0)))
        assert stored.with_run([old, other], half) == [half, old, other]
    on_gpu = Result("gpu.json", {**about("ttm"), "machine": {**CLEAN, "gpu": "H200"}}, scan((3.0, 3.0)))
    assert stored.with_run([old], on_gpu) == [on_gpu, old]


def test_the_state_says_quick_and_interrupted():
    state, why = Result("a.json", about("ttm", effort="quick", interrupted=True), []).state
    assert (state, why) == ("quick, interrupted, unknown", "no record of its code")


def test_files_that_cannot_be_read_are_named_and_cost_only_themselves(tmp_path):
    write_json(tmp_path / "good.json", about("ttm"), scan((2.0, math.nan)))
    whole = (tmp_path / "good.json").read_text()
    (tmp_path / "cut.json").write_text(whole[: len(whole) // 2])
    (tmp_path / "odd.json").write_text(json.dumps({"schema": 1, "machine": CLEAN, "rows": []}))
    (tmp_path / "new.json").write_text(json.dumps({"schema": 1, **about("ttm"), "rows": [{"colour": 1}]}))
    (tmp_path / "learn.json").write_text('{"schema": 1, "runs": []}')
    results, problems = stored.load(tmp_path)
    assert [result.file for result in results] == ["good.json"]
    assert [problem.split()[0] for problem in problems] == ["cut.json", "new.json", "odd.json"]
    assert math.isnan(results[0].rows[0].against_best)


def test_the_table_tells_this_run_from_what_is_stored():
    fresh = Result("new.json", about("ttm"), scan((2.0, 2.0)), fresh=True)
    kept = Result("new.json", about("tubes"), [ours("cut", 2.0, 2.0, suite="tubes")])
    tubes, step = (Spec(name, name, "", partial(against_peers, prefix="")) for name in ("tubes", "step"))
    drawn = table(claims.claims([fresh, kept], None, [*SCAN, tubes, step]))
    assert [row[4] for row in drawn.rows] == [
        "this run; cpu, float32; abc; unknown",
        "new.json; cpu, float32; abc; unknown",
        "not measured",
        "not measured",
    ]
    assert "new.json: unknown: no record of its code" in drawn.notes


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.claim)
def test_the_command_of_a_claim_runs_a_case(spec):
    suite = importlib.import_module(f"cases.{spec.suite}")
    names = [f"{spec.suite}/{case.name}" for case in suite.cases(Settings(torch.device("cpu")))]
    assert any(f"{spec.suite}/{spec.filter}" in name for name in names)


def test_what_is_stored_holds_claims_of_every_suite_it_has():
    results, problems = stored.load()
    assert problems == []
    lines = claims.claims(results, None)
    for suite in {suite for result in results for suite in result.suites}:
        assert any(line.measured for line in lines if line.suite == suite), suite


def test_a_run_ends_in_the_claims_and_a_page(tmp_path, capsys):
    assert run.main(["--quick", "--filter", "work", "--out", str(tmp_path), "--plain"]) == 0
    said = capsys.readouterr().out
    assert said.index("rows measured") < said.index("\nClaims\n") < said.index(f"Report: {tmp_path / 'report.html'}")
    assert "everything at once" in said
    text = Path(tmp_path / "report.html").read_text()
    assert text.count("<svg") >= 2
    assert "quick, " in text
    assert run.main(["--claims", "--out", str(tmp_path / "claims")]) == 0
    assert (tmp_path / "claims" / "report.html").is_file()


def test_without_matplotlib_the_page_has_no_plots(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "report.plots", None)
    monkeypatch.delattr("report.plots", raising=False)
    result = Result("a.json", about("ttm"), scan((2.0, math.nan)))
    text = page.write(tmp_path / "r.html", claims.claims([result], None, SCAN), [result]).read_text()
    assert "<svg" not in text
    assert "scan 0" in text
    assert "nan" in text
    assert [file.name for file in tmp_path.iterdir()] == ["r.html"]


def test_a_stored_file_that_cannot_be_read_fails_the_claims(tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.json").write_text("{")
    load = stored.load
    monkeypatch.setattr(stored, "load", lambda: load(tmp_path))
    assert run.main(["--claims", "--out", str(tmp_path)]) == 1
    assert "FAIL bad.json cannot be read" in capsys.readouterr().out
