"""Results of the study: kept in one file, told as tables."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import provenance
from learning.rows import ROWS
from report.console import Table
from report.tables import scaled

SCHEMA = 1
TEST, HELD_OUT, WORDINGS = "questions-test.csv", "questions-heldout.csv", "questions-wordings.csv"
FAR = 16
"""Chunks ago from which on a question is about what is long past."""
PUBLISHED = 18.0
"""Per cent of the model's compute that the paper's TTM Combiner saves against its Transformer Combiner."""
GROUPS = {
    "combiner": "Combiners: texts look at the last chunk, all else must have been kept",
    "sight": "The same where texts look at all chunks",
    "training": "What else the TTM is trained with",
    "questions": "More families of questions, TTM",
    "length": "Clips of other lengths",
}


def code() -> str:
    """Of what a result depends on in the code at hand; see `core.provenance`."""
    return hashlib.sha256(json.dumps(provenance.code_of(["learn"])).encode()).hexdigest()[:12]


def read(path: Path) -> dict[str, Any]:
    """The file of results; an empty one where there is none.

    Raises:
        ValueError: another schema.
    """
    if not path.is_file():
        return {"schema": SCHEMA, "runs": []}
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {results.get('schema')!r}, this program reads {SCHEMA}")
    return results


def add(path: Path, run: dict[str, Any]) -> None:
    """Put a run into the file, in place of one of the same row and seed; a line a run, written beside and moved."""
    results = read(path)
    known = {(old["row"], old["seed"]): old for old in results["runs"]} | {(run["row"], run["seed"]): run}
    order = list(ROWS)
    runs = sorted(known.values(), key=lambda own: (order.index(own["row"]) if own["row"] in order else -1, own["seed"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    lines = ",\n".join(json.dumps(own) for own in runs)
    beside.write_text(f'{{"schema": {SCHEMA}, "runs": [\n{lines}\n]}}\n', encoding="utf-8")
    os.replace(beside, path)


@dataclass(frozen=True)
class Share:
    """A share of right answers: the mean over seeds, and the lowest and highest seed; 0 .. 1."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, shares: Iterable[float]) -> Share:
        values = list(shares)
        return cls(statistics.fmean(values), min(values), max(values))

    def __str__(self) -> str:
        mean = f"{100 * self.mean:.1f}"
        return mean if self.low == self.high else f"{mean} ({100 * self.low:.1f}..{100 * self.high:.1f})"


def current(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of every row that belong to its recipe of today, in the order of the rows."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ROWS}
    for run in results["runs"]:
        if run["row"] in ROWS and run["digest"] == ROWS[run["row"]].digest:
            runs[run["row"]].append(run)
    return {name: own for name, own in runs.items() if own}


def share(runs: list[dict[str, Any]], of: str, table: str = TEST) -> Share | None:
    """Right answers to questions of a type, or of several whose name begins so; None where none is asked."""
    counted = [[sum(pair) for pair in zip(*_matching(run["right"][table], of), strict=True)] for run in runs]
    return Share.of(right / count for right, count in counted) if all(counted) else None


def far(runs: list[dict[str, Any]]) -> Share | None:
    """Right answers to questions about `FAR` chunks ago and more."""
    return share(runs, "far")


def floor(runs: list[dict[str, Any]], of: str = "all") -> float:
    """What can be guessed without looking and listening: by the most common answer to a wording, 0 .. 1."""
    floors = runs[0]["floors"]
    rows = [row for name, row in floors.items() if _is(name, of)]
    return sum(row["count"] * max(row["majority"], row["question"]) for row in rows) / sum(row["count"] for row in rows)


def tables(results: dict[str, Any]) -> list[Table]:
    """A table for each group of rows that has results, by type of question, and what TTM saves at which accuracy."""
    runs = current(results)
    out = [_group(name, title, own) for name, title in GROUPS.items() if (own := _of_group(runs, name))]
    combiners = _of_group(runs, "combiner")
    if combiners:
        out.append(_by_type(combiners))
    if "ttm" in combiners and len(combiners) > 1:
        out.append(_published(combiners))
    return out


def _matching(right: dict[str, list[int]], of: str) -> list[list[int]]:
    return [pair for name, pair in right.items() if _is(name, of)]


def _is(name: str, of: str) -> bool:
    """Whether a type of question is the one named, or one of "far"."""
    if of != "far":
        return name == of
    first = name.rpartition("-ago-")[2].partition("-")[0]
    return "-ago-" in name and int(first) >= FAR


def _of_group(runs: dict[str, list[dict[str, Any]]], group: str) -> dict[str, list[dict[str, Any]]]:
    return {name: own for name, own in runs.items() if ROWS[name].group == group}


def _percent(value: Share | None) -> str:
    return "–" if value is None else str(value)


def _group(name: str, title: str, runs: dict[str, list[dict[str, Any]]]) -> Table:
    columns = ["row", "what", "chunks", "right, %", f"{FAR}+ ago, %", "new kinds, %", "new words, %", "floor, %"]
    columns += ["FLOPs", "Combiner", "stream", "parameters", "seeds"]
    lines = []
    for row, own in runs.items():
        first = own[0]
        lines.append(
            [
                *(row, ROWS[row].says, str(first["chunks"]), _percent(share(own, "all")), _percent(far(own))),
                *(_percent(share(own, "all", HELD_OUT)), _percent(share(own, "all", WORDINGS))),
                f"{100 * floor(own):.1f}",
                *(scaled(first["flops"]), scaled(first["combiner_flops"]), scaled(first["stream_bytes"], "B")),
                *(scaled(first["parameters"]), str(len(own))),
            ]
        )
    notes = [
        "right: exact answers on new clips, the mean of the seeds (lowest..highest)",
        "floor: the most common answer to each wording; FLOPs: of a clip and a question; stream: bytes that it keeps",
    ]
    return Table(title, columns, lines, left=2, notes=notes)


def _by_type(runs: dict[str, list[dict[str, Any]]]) -> Table:
    first = next(iter(runs.values()))
    kinds = [kind for kind in first[0]["right"][TEST] if kind != "all"]
    floors = [f"{100 * floor(first, kind):.0f}" for kind in kinds]
    lines = [["floor", *floors]]
    for row, own in runs.items():
        values = [share(own, kind) for kind in kinds]
        lines.append([row, *("–" if value is None else f"{100 * value.mean:.0f}" for value in values)])
    return Table("Right answers by type of question, %", ["row", *kinds], lines)


def _published(runs: dict[str, list[dict[str, Any]]]) -> Table:
    """Where TTM saves what the paper says, and is as often right."""
    ttm = runs["ttm"]
    own = share(ttm, "all")
    assert own is not None
    lines = []
    for name, other in runs.items():
        theirs = share(other, "all")
        if name == "ttm" or theirs is None:
            continue
        saved = [100 * (1 - ttm[0][key] / other[0][key]) for key in ("flops", "combiner_flops")]
        apart = (
            "equal"
            if own.low <= theirs.high and theirs.low <= own.high
            else "better"
            if own.mean > theirs.mean
            else "worse"
        )
        difference = f"{100 * (own.mean - theirs.mean):+.1f}"
        lines.append([ROWS[name].says, difference, apart, *(f"{value:.1f}" for value in saved)])
    columns = ["TTM against", "right, points", "ranges of seeds", "saves of the model, %", "of the Combiner, %"]
    notes = [f"published: {PUBLISHED:.0f} % of the model at equal accuracy; here in this study's small model"]
    return Table("What the TTM Combiner saves, and at which accuracy", columns, lines, notes=notes)
