"""Results of the study: kept in one file, told as tables."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from core import provenance
from learning import floor
from learning.data import draw_test
from learning.rows import ROWS
from report.console import Table
from report.tables import scaled

SCHEMA = 1
TEST, HELD_OUT, WORDINGS = "questions-test.csv", "questions-heldout.csv", "questions-wordings.csv"
FAR = 16
"""Chunks ago from which on a question is about what is long past."""
PUBLISHED = 18.0
"""Per cent of the model's compute that the paper's TTM Combiner saves against its Transformer Combiner."""
EVEN = 2.0
"""Points of right answers that two rows of one seed each may differ by and are called equal."""
BLIND = ("this-1", "this-4", "perceiver", "mean", "none")
"""Combiners that see their own chunk only."""
GROUPS = {
    "combiner": "Combiners: texts look at the last chunk, all else must have been kept",
    "sight": "The same where texts look at all chunks, on shorter clips",
    "training": "What else the TTM is trained with (beside ttm-16 below)",
    "questions": "More families of questions, TTM (beside ttm-16 below)",
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
    """Right answers to questions of a type, of all or of those that are "far"; None where none is asked."""
    return _share([run["right"][table] for run in runs], of)


def last_chunk(runs: list[dict[str, Any]], of: str = "all") -> Share | None:
    """What who knows the last chunk only is right about in the test of these runs, see `learning.floor`."""
    first = runs[0]
    return _share([_last_chunk(first["chunks"], first["events"], ROWS[first["row"]].families)], of)


@lru_cache
def _last_chunk(chunks: int, events: int, families: tuple[str, ...]) -> dict[str, list[float]]:
    worlds, tables = draw_test(chunks, events, families)
    return floor.last_chunk(worlds, tables[TEST])


def _share(found: list[dict[str, list[float]]], of: str) -> Share | None:
    counted = [[sum(pair) for pair in zip(*_matching(right, of), strict=True)] for right in found]
    return Share.of(right / count for right, count in counted) if all(counted) else None


def far(runs: list[dict[str, Any]]) -> Share | None:
    """Right answers to questions about `FAR` chunks ago and more."""
    return share(runs, "far")


def guessed(runs: list[dict[str, Any]], of: str = "all") -> float:
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


def _range(shares: Iterable[Share | None]) -> str:
    means = [f"{100 * value.mean:.1f}" for value in shares if value is not None]
    return " to ".join(dict.fromkeys((min(means), max(means))))


def _group(name: str, title: str, runs: dict[str, list[dict[str, Any]]]) -> Table:
    columns = [
        "row",
        "what",
        "chunks",
        "right, %",
        f"{FAR}+ ago, %",
        "new kinds, %",
        "new words, %",
        "guessed, %",
        "last chunk, %",
    ]
    columns += ["FLOPs", "Combiner", "stream", "parameters", "seeds"]
    lines = []
    for row, own in runs.items():
        first = own[0]
        lines.append(
            [
                *(row, ROWS[row].says, str(first["chunks"]), _percent(share(own, "all")), _percent(far(own))),
                *(_percent(share(own, "all", HELD_OUT)), _percent(share(own, "all", WORDINGS))),
                f"{100 * guessed(own):.1f}",
                _percent(last_chunk(own)),
                *(scaled(first["flops"]), scaled(first["combiner_flops"]), scaled(first["stream_bytes"], "B")),
                *(scaled(first["parameters"]), str(len(own))),
            ]
        )
    notes = [
        "right: exact answers on new clips, the mean of the seeds (lowest..highest)",
        "guessed: the most common answer to each wording; last chunk: who always says what that shows",
        "FLOPs: of a clip and a question; stream: bytes that it keeps",
    ]
    return Table(title, columns, lines, left=2, notes=notes)


def _by_type(runs: dict[str, list[dict[str, Any]]]) -> Table:
    first = next(iter(runs.values()))
    kinds = [kind for kind in first[0]["right"][TEST] if kind != "all"]
    known = [last_chunk(first, kind) for kind in kinds]
    lines = [
        ["guessed", *(f"{100 * guessed(first, kind):.0f}" for kind in kinds)],
        ["last chunk", *("–" if value is None else f"{100 * value.mean:.0f}" for value in known)],
    ]
    for row, own in runs.items():
        values = [share(own, kind) for kind in kinds]
        lines.append([row, *("–" if value is None else f"{100 * value.mean:.0f}" for value in values)])
    return Table("Right answers by type of question, %", ["row", *kinds], lines)


def _published(runs: dict[str, list[dict[str, Any]]]) -> Table:
    """Where TTM saves what the paper says, and is as often right."""
    lines = [
        [ROWS[other.row].says, f"{other.points:+.1f}", other.verdict, f"{other.model:.1f}", f"{other.combiner:.1f}"]
        for other in against(runs)
    ]
    columns = ["TTM against", "right, points", "TTM is", "saves of the model, %", "of the Combiner, %"]
    notes = [
        f"published: {PUBLISHED:.0f} % of the model at equal accuracy; here of this study's small model",
        "equal: the ranges of the seeds overlap, or with one seed each 2 points lie between them at most",
    ]
    return Table("What the TTM Combiner saves, and at which accuracy", columns, lines, notes=notes)


@dataclass(frozen=True)
class Against:
    """TTM beside another Combiner: points of right answers more, and shares of FLOPs less, in per cent."""

    row: str
    points: float
    verdict: str  # TTM is "better", "equal" or "worse"
    model: float
    combiner: float


def against(runs: dict[str, list[dict[str, Any]]]) -> list[Against]:
    """TTM beside every other Combiner that has results; none without TTM's own."""
    out = []
    own = share(runs.get("ttm", []), "all") if "ttm" in runs else None
    for name, other in runs.items():
        theirs = share(other, "all")
        if own is None or theirs is None or name == "ttm" or ROWS[name].group != "combiner":
            continue
        points = 100 * (own.mean - theirs.mean)
        single = len(runs["ttm"]) == len(other) == 1
        even = abs(points) <= EVEN if single else own.low <= theirs.high and theirs.low <= own.high
        verdict = "equal" if even else "better" if points > 0 else "worse"
        first = runs["ttm"][0]
        saved = [100 * (1 - first[key] / other[0][key]) for key in ("flops", "combiner_flops")]
        out.append(Against(name, points, verdict, *saved))
    return out


def claims(results: dict[str, Any]) -> list[dict[str, str]]:
    """What the study shows: claim, number, strongest peer, and where it fails; empty without results for TTM."""
    runs = _of_group(current(results), "combiner")
    others = against(runs)
    if not others:
        return []
    ttm = runs["ttm"]
    blind = [own for name, own in runs.items() if name in BLIND]
    strongest = max(others, key=lambda other: -other.points)
    best = runs[strongest.row]
    weak = f"new kinds {_percent(share(ttm, 'all', HELD_OUT))} %, new words {_percent(share(ttm, 'all', WORDINGS))} %"
    kept = f"{scaled(ttm[0]['stream_bytes'], 'B')}; {_percent(far(ttm))} % right about {FAR} and more chunks ago"
    kept += f" (the last chunk alone tells {_percent(last_chunk(ttm, 'far'))} %)"
    theirs = f"{ROWS[strongest.row].says}: {scaled(best[0]['stream_bytes'], 'B')}; {_percent(far(best))} %"
    theirs += f"; who sees each chunk alone {_range(far(own) for own in blind)} %" if blind else ""
    lines = [
        {
            "claim": "TTM answers what a stream saw and heard",
            "number": f"{_percent(share(ttm, 'all'))} % right (guessed: {100 * guessed(ttm):.0f} %)",
            "peer": f"{ROWS[strongest.row].says}: {_percent(share(best, 'all'))} %",
            "fails": weak,
        },
        {
            "claim": "TTM remembers in a state that does not grow",
            "number": kept,
            "peer": theirs,
            "fails": f"in new words {_percent(share(ttm, 'far', WORDINGS))} %",
        },
    ]
    good = [other for other in others if other.verdict != "worse" and other.model >= PUBLISHED]
    poor = sorted((other for other in others if other not in good), key=lambda other: other.model)
    lines.append(
        {
            "claim": f"TTM saves the published {PUBLISHED:.0f} % of the model and is as often right",
            "number": f"against {len(good)} of {len(others)} Combiners",
            "peer": "; ".join(f"{ROWS[other.row].says} ({other.model:.0f} %)" for other in good) or "none",
            "fails": "; ".join(f"{other.row} {other.model:.0f} %, {other.points:+.1f} points" for other in poor)
            or "nowhere measured",
        }
    )
    return lines


def state(results: dict[str, Any]) -> tuple[str, str]:
    """Whether the results are of the code at hand, and why not; in the words of `core.provenance`."""
    runs = [run for own in current(results).values() for run in own]
    dirty = [f"{run['row']}-{run['seed']}" for run in runs if run["machine"]["dirty"]]
    if dirty:
        return "uncommitted code", ", ".join(dirty[:3])
    now = code()
    old = [f"{run['row']}-{run['seed']}" for run in runs if run["code"] != now]
    return ("older than its code", f"{len(old)} of {len(runs)} runs") if old else ("current", "")


def commits(results: dict[str, Any]) -> str:
    """Of the code that trained, each once."""
    runs = [run for own in current(results).values() for run in own]
    return ", ".join(dict.fromkeys(str(run["machine"]["commit"]) for run in runs))
