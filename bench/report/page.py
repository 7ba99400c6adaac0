"""The report: claims, plots and all rows in one HTML file that loads nothing. Needs jinja2, for plots matplotlib."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from core import machine
from core.rows import Row
from report.claims import Claim
from report.stored import Result
from report.tables import number

HERE = Path(__file__).parent
COLUMNS: tuple[tuple[str, Callable[[Row], Any]], ...] = (
    ("case", lambda row: row.case),
    ("mode", lambda row: row.mode),
    ("implementation", lambda row: row.impl),
    ("role", lambda row: row.role),
    ("result", lambda row: row.status),
    ("ms", lambda row: row.median_ms),
    ("p20", lambda row: row.p20_ms),
    ("p80", lambda row: row.p80_ms),
    ("n", lambda row: row.n or None),
    ("x baseline", lambda row: row.speedup),
    ("baseline", lambda row: row.baseline),
    ("x best peer", lambda row: row.against_best),
    ("best peer", lambda row: row.best_peer),
    ("GFLOP", lambda row: row.flops / 1e9 if row.flops else None),
    ("peak MiB", lambda row: row.peak_bytes / 2**20 if row.peak_bytes is not None else None),
    ("error", lambda row: row.error),
    ("why", lambda row: row.reason),
)


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number that it is sorted by; None: by its text."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Section:
    """One file of results: its rows under the columns that any of them fills, and its plots."""

    result: Result
    machine: str
    columns: list[str]
    rows: list[tuple[str, Row, list[Cell]]]  # with the name that links lead to
    plots: dict[str, str]


def write(path: Path, claims: list[Claim], results: list[Result]) -> Path:
    """Write the report beside `path` and move it into place."""
    sections = [_section(index, result) for index, result in enumerate(results)]
    names = {id(row): name for section in sections for name, row, _ in section.rows}
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("page.html.jinja").render(
        claims=[(claim, names[id(claim.rows[0])] if claim.rows else "") for claim in claims], sections=sections
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    os.replace(beside, path)
    return path


def _section(index: int, result: Result) -> Section:
    columns = [(name, value) for name, value in COLUMNS if any(_cell(value(row)).text for row in result.rows)]
    rows = [
        (f"row-{index}-{place}", row, [_cell(value(row)) for _, value in columns])
        for place, row in enumerate(result.rows)
    ]
    line = machine.line(result.run["machine"])
    return Section(result, line, [name for name, _ in columns], rows, _plots(index, result, line))


def _cell(value: Any) -> Cell:
    if value is None or isinstance(value, str):
        return Cell(value or "")
    if not math.isfinite(value):
        return Cell(str(value))
    return Cell(f"{value:.0e}" if 0 < abs(value) < 1e-3 else number(value), value)


def _plots(index: int, result: Result, caption: str) -> dict[str, str]:
    try:
        from report import plots
    except ImportError:
        return {}
    return plots.as_svg(result.rows, f"plot-{index}", caption)
