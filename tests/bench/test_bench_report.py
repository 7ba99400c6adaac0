"""Tables and files."""

from __future__ import annotations

import csv
import io
import json

import pytest

from core.rows import Row
from report import files, tables
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


def test_a_cell_of_several_lines_makes_its_row_as_tall():
    stream = io.StringIO()
    Console(stream, plain=True).table(Table("T", ["a", "b"], [["one two", "x"], ["y", "z"]], 2, wrap=4))
    assert stream.getvalue() == "T\na    b\n---  -\none  x\ntwo\ny    z\n\n"


def test_a_folded_table_fits_its_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    stream.isatty = lambda: True
    Console(stream, plain=True).table(Table("T", ["a", "b"], [["word " * 30, "other " * 30]], 2, wrap=30))
    assert max(map(len, stream.getvalue().splitlines())) <= 40


def test_comparison_table_leaves_out_empty_columns_and_names_troubles():
    rows = [
        row(p20_ms=1.9, p80_ms=2.1, speedup=1.5, baseline="peer", error=1e-7),
        row(impl="peer", role="peer", p20_ms=3.0, p80_ms=3.2, median_ms=3.1, baseline="peer", speedup=1.0),
        row(impl="limit", role="limit", p20_ms=1, p80_ms=1, median_ms=1.0),
        row(impl="bad", status="FAIL", reason="wrong result: x", median_ms=None, n=0),
    ]
    table = tables.comparison_table("T", rows)
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
    assert tables.number(value) == text


def test_units():
    assert tables.scaled(6_256_038_379_520) == "6.26 T"
    assert tables.scaled(12.0) == "12.0"
    assert tables.milliseconds(12_345.0) == "12.3 s"
    assert tables.milliseconds(999.0) == "999 ms"
    assert tables.mebibytes(3 << 20) == "3.00 MiB"
    assert tables.mebibytes(3 << 30) == "3.00 GiB"


def test_json_round_trip(tmp_path):
    path = tmp_path / "deep" / "run.json"
    rows = [row(detail={"frames": 16}), row(impl="peer")]
    files.write_json(path, {"machine": MACHINE, "interrupted": False}, rows)
    run, again = files.read_json(path)
    assert again == rows
    assert run["schema"] == files.SCHEMA
    assert run["machine"] == MACHINE
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


def test_another_schema_is_refused(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"schema": 0, "rows": []}))
    with pytest.raises(ValueError, match="schema 0"):
        files.read_json(path)


def test_csv_has_one_line_a_row_and_the_machine(tmp_path):
    path = tmp_path / "run.csv"
    files.write_csv(path, {"machine": MACHINE}, [row(detail={"frames": 16}), row(impl="peer")])
    lines = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [line["impl"] for line in lines] == ["ours", "peer"]
    assert lines[0]["median_ms"] == "2.0"
    assert json.loads(lines[0]["detail"]) == {"frames": 16}
    assert lines[0]["cpu"] == "one"
    assert set(Row("", "", "").to_dict()) < set(lines[0])
