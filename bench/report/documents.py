"""README.md's numbers and docs/results.md, made of the results that are kept. Needs jinja2.

What is said stands in `readme.md.jinja` and `results.md.jinja`; every figure in them is looked up in a row. One that no
result holds is an error, so that a sentence cannot outlive its number.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from core import machine
from core.machine import REPOSITORY
from core.provenance import RESULTS
from core.rows import Row
from learning import report as learning
from report import pages, stored, tables
from report.claims import Claim, claims
from report.console import Table
from report.savings import saving
from report.stored import Result

BEGIN = "<!-- measured: written by `make readme`, never by hand -->"
END = "<!-- /measured -->"


def differing(root: Path = REPOSITORY, folder: Path = RESULTS) -> dict[Path, str]:
    """The files that are not what the results say, and what they ought to be.

    Raises:
        ValueError: a result cannot be read, a figure that is quoted is in none, or README.md has lost its marks.
    """
    results, problems = stored.load(folder)
    if problems:
        raise ValueError("; ".join(problems))
    study = stored.load_learned(folder)
    render = _renderer(results, claims(results, study), folder, study or {"runs": []})
    readme, page = root / "README.md", root / "docs" / "results.md"
    wanted = {readme: between_marks(readme.read_text(), render("readme.md.jinja")), page: render("results.md.jinja")}
    return {path: text for path, text in wanted.items() if not path.is_file() or path.read_text() != text}


def between_marks(text: str, block: str) -> str:
    """The text with another block between the marks."""
    return pages.replaced(text, block.strip(), BEGIN, END, "README.md")


def _renderer(results: list[Result], lines: list[Claim], folder: Path, study: dict[str, Any]) -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "scaled": tables.scaled,
        "percent": tables.percent,
        "ratio": tables.ratio,
        "number": tables.number,
        "cell": cell,
        "brief": brief,
    }
    told = {
        "results": results,
        "claims": lines,
        "quote": lambda *where: quote(results, *where),
        "rows_of": lambda suite, case: rows_of(results, suite, case),
        "saving": lambda before, after: saving(before.flops, after.flops),
        "machine": machine,
        "tables": tables_of,
        "markdown": markdown,
        "plots": lambda result: plots_of(result, results, folder),
        "main": main_result(results),
        "study": learning.tables(study),
        "study_state": learning.state(study),
        "study_commits": learning.commits(study),
        "study_plots": sorted(path.name for path in folder.glob("learn-*.png")),
        "not_current": not_current(results),
    }
    return lambda name: environment.get_template(name).render(told)


def quote(results: Iterable[Result], suite: str, case: str, impl: str, mode: str = "") -> Row:
    """The row that a sentence quotes, of the newest result that holds it.

    Raises:
        ValueError: none does, or it was not measured.
    """
    for result in stored.newest_first(results):
        for row in result.rows:
            if (row.suite, row.case, row.impl) == (suite, case, impl) and mode in ("", row.mode) and row.status == "ok":
                return row
    raise ValueError(f"a text quotes {suite}/{case}, {impl} {mode}, which no result holds".replace(" ,", ","))


def rows_of(results: Iterable[Result], suite: str, case: str) -> dict[str, Row]:
    """The rows of a case, by implementation, of the newest result that holds it; empty where none does."""
    for result in stored.newest_first(results):
        found = {row.impl: row for row in result.rows if (row.suite, row.case, row.status) == (suite, case, "ok")}
        if found:
            return found
    return {}


def main_result(results: list[Result]) -> Result:
    """The newest one of the savings on a CPU: whose machine and plot the README shows.

    Raises:
        ValueError: there is none.
    """
    for result in stored.newest_first(results):
        if "savings" in result.suites and result.where.startswith("cpu"):
            return result
    raise ValueError("README.md shows the savings on a CPU, which no result holds")


def plots_of(result: Result, results: list[Result], folder: Path) -> list[str]:
    """Names of the pictures that its run drew: they begin as its file does, and as no longer name of another."""
    stems = [Path(one.file).stem for one in results]
    drawn = {
        path.name: max((s for s in stems if path.name.startswith(f"{s}-")), key=len, default="")
        for path in folder.glob("*.png")
    }
    return sorted(name for name, stem in drawn.items() if stem == Path(result.file).stem)


def tables_of(result: Result) -> list[Table]:
    """The tables that its suites make of its rows; a sentence in place of those of a suite that can no longer."""
    found: list[Table] = []
    for suite in result.suites:
        rows = [row for row in result.rows if row.suite == suite]
        try:
            found += importlib.import_module(f"cases.{suite}").tables(rows) if rows else []
        except KeyError as missing:
            held = [list(names) for names in dict.fromkeys((row.case, row.impl) for row in rows)]
            why = f"{suite}: measured before its rows held {missing}; to be measured again"
            found.append(Table(why, ["case", "implementation"], held, 2))
    return found


def not_current(results: list[Result]) -> dict[str, list[str]]:
    """Files by their state, but for those that are of the code at hand."""
    found: dict[str, list[str]] = {}
    for result in results:
        state, _ = result.state
        if state != "current":
            found.setdefault(state, []).append(result.file)
    return found


def markdown(table: Table) -> str:
    """A table with its columns aligned as on the console."""
    head = " | ".join(cell(name) for name in table.columns)
    rule = "|".join("---" if index < table.left else "---:" for index in range(len(table.columns)))
    lines = ["| " + " | ".join(cell(text) for text in row) + " |" for row in table.rows]
    return "\n".join([f"| {head} |", f"|{rule}|", *lines])


def brief(fails: str) -> str:
    """How many cases fail and how far, without the name of the worst, which docs/results.md tells."""
    return re.sub(r"^(\d+ of \d+ cases: \S+) .*", r"\1", fails)


def cell(text: str) -> str:
    """Text in which nothing is read as markup of a table or as emphasis."""
    return text.replace("|", r"\|").replace("*", r"\*")
