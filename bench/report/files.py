"""Results as JSON and CSV."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

from core.rows import Row

SCHEMA = 1


def write_json(path: Path, run: dict[str, Any], rows: list[Row]) -> None:
    """The whole run, one line for each row, without what does not apply to a row.

    Written beside and moved into place, so that an interrupted write leaves the last good file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"schema": SCHEMA, **run}, indent=1).removesuffix("\n}")
    lines = [json.dumps({name: value for name, value in row.to_dict().items() if value is not None}) for row in rows]
    beside = path.with_name(path.name + ".part")
    beside.write_text(f'{head},\n "rows": [\n' + ",\n".join(lines) + "\n ]\n}\n")
    os.replace(beside, path)


def read_json(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What `write_json` wrote: the run and its rows.

    Raises:
        ValueError: no such file's text: cut off, another schema, or rows of another program.
    """
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}, this program reads {SCHEMA}")
    try:
        rows = [Row.from_dict(values) for values in document.pop("rows")]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no rows of this program: {error}") from error
    return document, rows


def write_csv(path: Path, run: dict[str, Any], rows: list[Row]) -> None:
    """One line a row, `detail` as JSON, the machine's main facts at the end of each line."""
    machine = run["machine"]
    names = ("cpu", "threads", "gpu", "torch", "triton", "cuda", "commit", "dirty", "date")
    facts = {name: machine.get(name) for name in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*Row("", "", "").to_dict(), *facts])
        writer.writeheader()
        for row in rows:
            writer.writerow({**row.to_dict(), "detail": json.dumps(row.detail), **facts})
