"""Tables of questions in CSV, JSON lines and Parquet: the same examples from each, and errors that say where."""

import json
import re
import warnings
from pathlib import Path

import pytest

from mirasol.data import Example, read_table

ROWS = [
    Example("a.mp4", "what is it?", "a dog, black", 1.5, 3723.25, "what", (), ("dog", "a dog"), "q1"),
    Example("sub/b.mp4", 'say "yes"\nor no', "yes", None, 2.0, "", ("yes", "no"), (), "7"),
    Example("c.wav"),
]


def at(folder: Path, rows=ROWS) -> list[Example]:
    return [Example(str(folder / row.clip), *list(vars(row).values())[1:]) for row in rows]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


CSV = """clip,start,end,question,answer,type,choices,references,id
a.mp4,1.5,01:02:03.250,what is it?,"a dog, black",what,,dog|a dog,q1
sub/b.mp4,,2,"say ""yes""
or no",yes,,"[""yes"", ""no""]",,7

c.wav,,,,,,,,
"""


def test_csv(tmp_path):
    assert read_table(write(tmp_path / "t.csv", CSV)) == at(tmp_path)
    assert read_table(write(tmp_path / "bom.csv", "\ufeff" + CSV.replace("\n", "\r\n"))) == [
        *at(tmp_path, ROWS[:1]),
        Example(str(tmp_path / "sub/b.mp4"), 'say "yes"\r\nor no', "yes", None, 2.0, "", ("yes", "no"), (), "7"),
        *at(tmp_path, ROWS[2:]),
    ]


def test_json_lines_and_parquet_hold_lists_and_numbers(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{k: list(v) if isinstance(v, tuple) else v for k, v in vars(row).items()} for row in ROWS]
    write(tmp_path / "t.jsonl", "\n\n".join(json.dumps(row) for row in rows) + "\n")
    assert read_table(tmp_path / "t.jsonl") == at(tmp_path)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet") == at(tmp_path)
    write(tmp_path / "n.jsonl", '{"clip": "x.mp4", "answer": 2, "id": 31, "end": "0:10"}')
    assert read_table(tmp_path / "n.jsonl") == [Example(str(tmp_path / "x.mp4"), answer="2", id="31", end=10.0)]


def test_clips_are_relative_to_a_folder_or_kept_as_keys(tmp_path):
    table = write(tmp_path / "t.csv", "clip\nx.mp4\n/abs/y.mp4\n")
    assert [e.clip for e in read_table(table, "/media")] == ["/media/x.mp4", "/abs/y.mp4"]
    assert [e.clip for e in read_table(table, "")] == ["x.mp4", "/abs/y.mp4"]


def test_columns_that_mean_nothing_are_named_in_one_warning(tmp_path):
    table = write(tmp_path / "t.csv", "clip,anser,split\n" + "x.mp4,dog,val\n" * 3)
    with pytest.warns(UserWarning, match="'anser', 'split'") as caught:
        assert len(read_table(table)) == 3
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_table(write(tmp_path / "u.csv", "clip\nx.mp4\n"))


BAD = {
    "clip, misspelt": ("t.csv", "video,question\nx,y\n", "must have a column 'clip', had 'video', 'question'"),
    "clip, empty": ("t.csv", "clip,id\nx.mp4,1\n,2\n", "t.csv, line 3, column 'clip': must name a media file"),
    "start": (
        "t.csv",
        "clip,start\nx.mp4,soon\n",
        "line 2, column 'start': must be seconds or HH:MM:SS.mmm, was 'soon'",
    ),
    "start, negative": ("t.csv", "clip,start\nx.mp4,-1\n", "line 2, column 'start'"),
    "start, endless": ("t.csv", "clip,start\nx.mp4,inf\n", "line 2, column 'start'"),
    "start, 75 minutes": ("t.csv", "clip,start\nx.mp4,1:75:00\n", "line 2, column 'start'"),
    "end before start": (
        "t.csv",
        "clip,start,end\nx.mp4,3,2\n",
        "line 2, column 'end': must come after the start at 3",
    ),
    "end at 0": ("t.csv", "clip,end\nx.mp4,0\n", "line 2, column 'end'"),
    "after a cell of two lines": ("t.csv", 'clip,start\n"x\ny",1\nx.mp4,a\n', "line 4, column 'start'"),
    "too few cells": ("t.csv", "clip,id\nx.mp4\n", "line 2: must have 2 cells (clip, id), had 1"),
    "too many cells": (
        "t.csv",
        "clip,question\nx.mp4,what, where\n",
        "line 2: must have 2 cells (clip, question), had 3",
    ),
    "column twice": ("t.csv", "clip,clip\nx,y\n", "column names must differ, had ['clip']"),
    "quotes": ("t.csv", 'clip,id\nx.mp4,1\n"y"z,2\n', "line 3: must be CSV"),
    "choices": ("t.csv", 'clip,choices\nx.mp4,"[""a"", b]"\n', "line 2, column 'choices': must be a JSON list or"),
    "choices, one empty": ("t.csv", "clip,choices\nx.mp4,a||b\n", "line 2, column 'choices': must be a list of texts"),
    "answer, no choice": ("t.csv", "clip,answer,choices\nx.mp4,c,a|b\n", "line 2, column 'answer': must be one of"),
    "no rows": ("t.csv", "clip\n", "must hold at least one row"),
    "nothing": ("t.csv", "", "must hold at least one row"),
    "JSON": ("t.jsonl", '{"clip": "x"}\n{"clip": \n', "t.jsonl, line 2: must be JSON"),
    "JSON, no object": ("t.jsonl", '["x"]\n', "t.jsonl, line 1: must be a JSON object, was ['x']"),
    "JSON, a list for a text": (
        "t.jsonl",
        '{"clip": "x", "answer": ["a"]}\n',
        "line 1, column 'answer': must be a text",
    ),
    "JSON, true for a time": ("t.jsonl", '{"clip": "x", "start": true}\n', "line 1, column 'start': must be seconds"),
    "JSON, NaN for a time": ("t.jsonl", '{"clip": "x", "start": NaN}\n', "line 1, column 'start': must be seconds"),
    "Parquet": ("t.parquet", "not that", "t.parquet: must be a Parquet file"),
    "suffix": ("t.xlsx", "x", "path must end in one of .csv, .jsonl"),
}


@pytest.mark.parametrize(("name", "text", "message"), BAD.values(), ids=BAD.keys())
def test_errors_name_file_line_and_column(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_table(write(tmp_path / name, text))


def test_bytes_that_are_not_utf_8_and_files_that_are_not_there(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"clip\nx.mp4\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"t\.csv, line \d: must be CSV in UTF-8"):
        read_table(tmp_path / "t.csv")
    with pytest.raises(FileNotFoundError, match="path must be a table"):
        read_table(tmp_path / "missing.csv")
