"""The results that are kept, and the run that has just ended: what claims, report and README are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from core import provenance
from core.provenance import RESULTS
from core.rows import Row
from learning import report as learning
from report.files import read_json

NEEDED = ("machine", "settings", "command", "seconds", "finished")
LEARNED = "learn.json"
"""What the Combiners learn, a study of its own: see `learning.report`."""


@dataclass(frozen=True)
class Result:
    """One file of rows."""

    file: str  # its name, or where it lies
    run: dict[str, Any]
    rows: list[Row]
    fresh: bool = False  # of the run that has just ended

    @cached_property
    def state(self) -> tuple[str, str]:
        """What it is worth today, and why; see `core.provenance`."""
        state, why = provenance.state(self.run)
        about = [text for text, holds in (("quick", self.quick), ("interrupted", self.run.get("interrupted"))) if holds]
        return ", ".join([*about, state]), why

    @property
    def quick(self) -> bool:
        return self.run["settings"]["effort"] == "quick"

    @property
    def suites(self) -> list[str]:
        return self.run["settings"]["suites"]

    @property
    def commit(self) -> str:
        return self.run["machine"].get("commit") or "unknown"

    @property
    def kind(self) -> tuple[str, str]:
        """Device, and the dtype that was asked for: what makes two results of a suite stand beside each other."""
        device = self.run["machine"].get("gpu") or self.run["settings"]["device"]
        return device, self.run["settings"]["dtype"] or ""

    @property
    def where(self) -> str:
        """Device and the dtype that most of it was timed in, "cpu, float32"."""
        device, dtype = self.kind
        timed = Counter(row.dtype for row in self.rows if row.median_ms is not None and row.dtype)
        return ", ".join([device, *([dtype] if dtype else [name for name, _ in timed.most_common(1)])])


def load(folder: Path = RESULTS) -> tuple[list[Result], list[str]]:
    """Every file of results in a folder, by name, and a sentence for each that cannot be read."""
    results, problems = [], []
    for path in sorted(folder.glob("*.json")):
        if path.name == LEARNED:
            continue
        try:
            run, rows = read_json(path)
        except ValueError as error:
            problems.append(f"{path.name} cannot be read: {error}")
            continue
        missing = [name for name in NEEDED if name not in run]
        if missing:
            problems.append(f"{path.name} cannot be read: it has no {', '.join(missing)}")
        else:
            results.append(Result(path.name, run, rows))
    return results, problems


def newest_first(results: Iterable[Result]) -> list[Result]:
    return sorted(results, key=lambda one: one.run["finished"], reverse=True)


def with_run(stored: Iterable[Result], fresh: Result) -> list[Result]:
    """The fresh run first, then the stored results that it does not stand in place of.

    A whole run replaces what is stored of its suites on that device and in that dtype. One that is quick, filtered or
    interrupted comes before it: what it does not hold is still to be seen.
    """
    part = fresh.quick or fresh.run["settings"]["filter"] or fresh.run.get("interrupted")
    replaced = set() if part else set(fresh.suites)
    return [fresh, *(one for one in stored if one.kind != fresh.kind or not set(one.suites) <= replaced)]


def load_learned(folder: Path = RESULTS) -> dict[str, Any] | None:
    """The study's file, None where there is none yet.

    Raises:
        ValueError: it cannot be read.
    """
    return learning.read(folder / LEARNED) if (folder / LEARNED).is_file() else None
