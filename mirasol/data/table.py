"""One question about one clip, and tables of them."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Example:
    """A question about a span of a clip; a label to be named is a question that asks nothing.

    Attributes:
        clip: path of the media file, or its key in a set of shards.
        question: text before the answer; "" where the answer is a class or a caption.
        answer: the text to be learned, the truth in an evaluation; None where it is not known.
        start, end: the span in seconds of the file; None: from its beginning, to its end.
        type: the group that the accuracy is also told for; "" for none.
        choices: answers to choose from; empty for a free answer.
        references: further answers that are as good.
        id: the set's own name of the question, as its prediction files want it.
    """

    clip: str
    question: str = ""
    answer: str | None = None
    start: float | None = None
    end: float | None = None
    type: str = ""
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    id: str = ""


COLUMNS = ("clip", "start", "end", "question", "answer", "type", "choices", "references", "id")


def read_table(path: str | Path, folder: str | Path | None = None) -> list[Example]:
    """Read a table of questions, a row each: CSV with a header, JSON lines, or Parquet, told by the suffix.

    Columns: those of `Example`, of which only `clip` must be there. `start` and `end` are seconds or HH:MM:SS.mmm;
    `choices` and `references` are lists, and in CSV a JSON list or texts separated by "|". An empty cell is one that
    says nothing. Other columns are ignored, with one warning that names them.

    Args:
        path: a .csv, .jsonl, .ndjson or .parquet file.
        folder: what relative clips are relative to; default: the table's folder. "" leaves them as they are written,
            for the keys of shards.
    Raises:
        FileNotFoundError: no such file.
        ImportError: Parquet without pyarrow.
        ValueError: what cannot be read, by file, line (in Parquet: row, from 1) and column.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a table, was {str(path)!r}: no such file")
    folder = path.parent if folder is None else Path(folder)
    rows = list(read_rows(path))
    if not rows:
        raise ValueError(f"{path}: a table must hold at least one row, had none")
    found = list(dict.fromkeys(name for _, row in rows for name in row))
    if "clip" not in found:
        raise ValueError(f"{path}: a table must have a column 'clip', had {', '.join(map(repr, found))}")
    unknown = [name for name in found if name not in COLUMNS]
    if unknown:
        warnings.warn(f"{path}: columns that mean nothing are ignored: {', '.join(map(repr, unknown))}", stacklevel=2)
    return [to_example(row, place, folder) for place, row in rows]


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table as (place, values by column); the place is what errors call the row."""
    readers = {".csv": csv_rows, ".jsonl": _json_rows, ".ndjson": _json_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"path must end in one of {', '.join(readers)}, was {str(path)!r}")
    return reader(path)


def to_example(row: Mapping[str, Any], place: str, folder: Path) -> Example:
    """An example of the values of a row; relative clips are made relative to `folder`."""
    clip = _text(row, "clip", place)
    if not clip:
        raise ValueError(f"{place}, column 'clip': must name a media file, was empty")
    start, end = _seconds(row, "start", place), _seconds(row, "end", place)
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"{place}, column 'end': must come after the start at {start or 0.0:g} s, was {row['end']!r}")
    answer, choices = _text(row, "answer", place) or None, _texts(row, "choices", place)
    if choices and answer is not None and answer not in choices:
        raise ValueError(f"{place}, column 'answer': must be one of the choices {list(choices)}, was {answer!r}")
    return Example(
        clip=str(folder / clip),
        question=_text(row, "question", place),
        answer=answer,
        start=start,
        end=end,
        type=_text(row, "type", place),
        choices=choices,
        references=_texts(row, "references", place),
        id=_text(row, "id", place),
    )


def parse_seconds(value: str | int | float) -> float:
    """Seconds, or hours, minutes and seconds as HH:MM:SS.mmm (or MM:SS.mmm).

    Raises:
        ValueError: anything else, also negative or endless times.
    """
    parts = [float(part) for part in str(value).split(":")]
    whole = all(part >= 0 and part == int(part) for part in parts[:-1])
    if len(parts) > 3 or not whole or not all(math.isfinite(part) and part >= 0 for part in parts):
        raise ValueError(value)
    if any(part >= 60 for part in parts[1:]):
        raise ValueError(value)
    return sum(part * 60**power for power, part in enumerate(reversed(parts)))


def csv_rows(path: Path, header: tuple[str, ...] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a CSV file, as `read_rows` gives them; `header` names the columns where the file does not."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        line = 1
        try:
            for cells in reader:
                if header is None:
                    header = tuple(cells)
                    doubled = sorted({name for name in header if header.count(name) > 1})
                    if doubled:
                        raise ValueError(f"{path}, line {line}: column names must differ, had {doubled} more than once")
                elif cells:  # not an empty line
                    if len(cells) != len(header):
                        must = f"must have {len(header)} cells ({', '.join(header)}), had {len(cells)}"
                        raise ValueError(f"{path}, line {line}: {must}")
                    yield f"{path}, line {line}", dict(zip(header, cells, strict=True))
                line = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {line}: must be CSV in UTF-8: {error}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line, text in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: must be JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {line}: must be a JSON object, was {row!r}")
        yield f"{path}, line {line}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet is read by pyarrow, which is not installed: pip install -e '.[data]'") from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: must be a Parquet file: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _text(row: Mapping[str, Any], name: str, place: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{place}, column {name!r}: must be a text, was {value!r}")
    return str(value).strip()


def _seconds(row: Mapping[str, Any], name: str, place: str) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(value)
        return parse_seconds(value)
    except ValueError as error:
        raise ValueError(f"{place}, column {name!r}: must be seconds or HH:MM:SS.mmm, was {value!r}") from error


def _texts(row: Mapping[str, Any], name: str, place: str) -> tuple[str, ...]:
    value = row.get(name)
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else value.split("|")
        except ValueError as error:
            must = 'must be a JSON list or texts separated by "|"'
            raise ValueError(f"{place}, column {name!r}: {must}, was {value!r}") from error
    if not isinstance(value, list) or not all(isinstance(text, str | int) and str(text).strip() for text in value):
        raise ValueError(f"{place}, column {name!r}: must be a list of texts, none empty, was {value!r}")
    return tuple(str(text).strip() for text in value)
