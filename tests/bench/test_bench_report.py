"""Tables, files and the comparison of two runs."""

from __future__ import annotations

import csv
import io
import json

import pytest

from core.rows import Row
from report import tables as report
from report.console import Console, Table, plain_table

MACHINE = {
    "cpu": "one", "threads": 2, "gpu": None, "torch": "2", "triton": None, "cuda": None,
    "commit": "c", "dirty": False, "date": "d",
}  # fmt: skip


def row(**values) -> Row:
    made = Row("s", "case", "ours", mode="fwd", role="ours", dtype="float32", device="cpu", median_ms=2.0, n=3)
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_plain_table():
    table = Table("Title", ["name", "ms"], [["a", "1.00"], ["longer", "22.0"]])
    assert plain_table(table) == "Title\nname      ms\n------  ----\na       1.00\nlonger  22.0"


def test_comparison_table_leaves_out_empty_columns_and_names_troubles():
    rows = [
        row(p20_ms=1.9, p80_ms=2.1, speedup=1.5, baseline="peer", error=1e-7),
        row(impl="peer", role="peer", p20_ms=3.0, p80_ms=3.2, median_ms=3.1, baseline="peer", speedup=1.0),
        row(impl="limit", role="limit", p20_ms=1, p80_ms=1, median_ms=1.0),
        row(impl="bad", status="FAIL", reason="wrong result: x", median_ms=None, n=0),
    ]
    table = report.comparison_table("T", rows)
    assert table.columns == ["case", "implementation", "ms (p20–p80)", "n", "x peer", "error"]
    assert [line[0] for line in table.rows] == ["case fwd", "", "", ""]
    assert table.rows[0][2:] == ["2.00 (1.90–2.10)", "3", "1.50", "1e-07"]
    assert table.rows[2][1] == "limit *"
    assert table.rows[3][2] == "FAIL"
    assert table.notes[-1] == "FAIL case fwd bad: wrong result: x"


def test_console_without_rich_writes_title_rows_and_notes():
    stream = io.StringIO()
    Console(stream, plain=True).table(Table("T", ["a"], [["1"]], notes=["why"]))
    assert stream.getvalue() == "T\na\n-\n1\n  why\n\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (0.01234, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (1234.0, "1234")],
)
def test_numbers(value, text):
    assert report.number(value) == text


def test_units():
    assert report.scaled(6_256_038_379_520) == "6.26 T"
    assert report.scaled(12.0) == "12.0"
    assert report.milliseconds(12_345.0) == "12.3 s"
    assert report.milliseconds(999.0) == "999 ms"
    assert report.mebibytes(3 << 20) == "3.00 MiB"
    assert report.mebibytes(3 << 30) == "3.00 GiB"


def test_json_round_trip(tmp_path):
    path = tmp_path / "deep" / "run.json"
    rows = [row(detail={"frames": 16}), row(impl="peer")]
    report.write_json(path, {"machine": MACHINE, "interrupted": False}, rows)
    run, again = report.read_json(path)
    assert again == rows
    assert run["schema"] == report.SCHEMA
    assert run["machine"] == MACHINE
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


def test_another_schema_is_refused(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"schema": 0, "rows": []}))
    with pytest.raises(ValueError, match="schema 0"):
        report.read_json(path)


def test_csv_has_one_line_a_row_and_the_machine(tmp_path):
    path = tmp_path / "run.csv"
    report.write_csv(path, {"machine": MACHINE}, [row(detail={"frames": 16}), row(impl="peer")])
    lines = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [line["impl"] for line in lines] == ["ours", "peer"]
    assert lines[0]["median_ms"] == "2.0"
    assert json.loads(lines[0]["detail"]) == {"frames": 16}
    assert lines[0]["cpu"] == "one"
    assert set(Row("", "", "").to_dict()) < set(lines[0])


@pytest.mark.parametrize(
    ("now", "worse", "shown"),
    [
        (dict(median_ms=2.1), False, 0),
        (dict(median_ms=2.5), True, 1),
        (dict(median_ms=1.0), False, 1),
        (dict(median_ms=2.0, peak_bytes=200), True, 1),
        (dict(median_ms=2.0, flops=8), True, 1),
        (dict(status="FAIL", median_ms=None), True, 1),
        (dict(impl="new"), True, 0),
    ],
)
def test_comparison_with_an_earlier_run(now, worse, shown):
    old = ({"machine": MACHINE}, [row(peak_bytes=100, flops=4)])
    values = {"peak_bytes": 100, "flops": 4, **now}
    table, found = report.compare_runs(old, ({"machine": MACHINE}, [row(**values)]), tolerance=0.1)
    assert found is worse
    assert len(table.rows) == shown


def test_comparison_says_when_the_machine_differs():
    table, _ = report.compare_runs(
        ({"machine": MACHINE}, [row()]), ({"machine": {**MACHINE, "cpu": "two"}}, [row()]), tolerance=0.1
    )
    assert any("different cpu" in note for note in table.notes)
