"""What a person sees: tables and a progress bar through rich where it is installed, plain text otherwise."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from shutil import get_terminal_size
from textwrap import fill
from typing import Any, TextIO

try:
    import rich  # noqa: F401

    HAS_RICH = True
except ImportError:
    HAS_RICH = False

NARROWEST = 12  # characters in which a cell is still read
WITHOUT_EXTRA = "The extra adds a progress bar, tables in colour, plots and the report: pip install -e '.[bench]'"


@dataclass
class Table:
    """A table of text. The first `left` columns are aligned to the left, the others to the right."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    left: int = 1
    notes: list[str] = field(default_factory=list)
    wrap: int = 0  # cells of text are folded at so many characters; 0: never


class Console:
    """Writes to a stream; `plain` forces text without rich."""

    def __init__(self, stream: TextIO | None = None, plain: bool = False) -> None:
        self.stream = stream if stream is not None else sys.stdout
        self.rich = HAS_RICH and not plain

    @property
    def width(self) -> int:
        """Columns of the terminal; of a file or a pipe, as many as it takes."""
        return get_terminal_size().columns if self.stream.isatty() else sys.maxsize

    def say(self, text: str = "") -> None:
        print(text, file=self.stream, flush=True)

    def table(self, table: Table) -> None:
        """One table with its title and notes."""
        if table.wrap:
            fitting = (self.width - 2 * (len(table.columns) - 1)) // len(table.columns)
            width = min(table.wrap, max(NARROWEST, fitting))
            table = replace(table, rows=[[fill(cell, width) for cell in row] for row in table.rows])
        if self.rich and self.stream.isatty():
            self._rich_table(table)
        else:
            self.say(plain_table(table))
        for note in table.notes:
            self.say(f"  {note}")
        self.say()

    def _rich_table(self, table: Table) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console as RichConsole
        from rich.table import Table as RichTable
        from rich.text import Text

        drawn = RichTable(title=Text(table.title, "bold"), box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for index, name in enumerate(table.columns):
            drawn.add_column(Text(name), justify="left" if index < table.left else "right", no_wrap=True)
        for row in table.rows:
            style = "red" if "FAIL" in row else "dim" if "SKIP" in row else ""
            drawn.add_row(*(Text(cell) for cell in row), style=style)
        console = RichConsole(file=self.stream)
        console.width = max(console.width, console.measure(drawn, options=console.options.update(width=1000)).maximum)
        console.print(drawn)  # a narrow terminal folds lines; nothing is cut off

    def progress(self, total: int) -> Progress:
        return _RichProgress(self, total) if self.rich and self.stream.isatty() else Progress(self, total)


class Progress:
    """A line when a case begins, and how long it took. Used as a context manager."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done, self.started = console, total, 0, 0.0
        self.running = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.running:
            self.console.say()

    def begin(self, name: str) -> None:
        self.started, self.running = time.perf_counter(), True
        count = f"[{self.done + 1:>{len(str(self.total))}}/{self.total}]"
        print(f"{count} {name} ", end="", file=self.console.stream, flush=True)

    def end(self, outcome: str) -> None:
        self.done, self.running = self.done + 1, False
        self.console.say(f"{outcome} ({time.perf_counter() - self.started:.1f} s)")


class _RichProgress(Progress):
    """A bar with the case that is running and the time since the start."""

    def __init__(self, console: Console, total: int) -> None:
        super().__init__(console, total)
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self.bar: Any = Bar(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=RichConsole(file=console.stream),
            transient=True,
            refresh_per_second=2,  # drawing must not take time from what is measured
        )
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def begin(self, name: str) -> None:
        self.bar.update(self.task, description=name)

    def end(self, outcome: str) -> None:
        self.bar.advance(self.task)


def plain_table(table: Table) -> str:
    """The table as aligned text, with a rule under the header. A cell of several lines makes its row as tall."""
    tall = [zip_longest(*(cell.split("\n") for cell in row), fillvalue="") for row in table.rows]
    rows = [list(line) for lines in tall for line in lines]
    widths = [max(len(row[index]) for row in [table.columns, *rows]) for index in range(len(table.columns))]

    def line(cells: list[str]) -> str:
        aligned = (
            cell.ljust(width) if index < table.left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([table.title, line(table.columns), rule, *(line(row) for row in rows)])
