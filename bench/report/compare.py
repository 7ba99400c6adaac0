"""A run beside an earlier one, by ratios that each took inside its own process.

Absolute times of two runs differ by machine, clock and neighbours. What is compared is a variant's speed-up over its
baseline, the median of the rounds' own ratios, then and now; FLOPs and peak memory, which are exact, as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from core.rows import Row
from report.console import Table
from report.tables import mebibytes, number, ratio, scaled

Run = tuple[dict[str, Any], list[Row]]
EXACT: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("flops", "FLOPs", scaled),
    ("peak_bytes", "peak memory", mebibytes),
)
COLUMNS = ["case", "implementation", "of", "then", "now", "now / then"]


def compare_runs(old: Run, new: Run, tolerance: float) -> tuple[Table, bool]:
    """Speed-ups, FLOPs and peak memory of the rows that both runs hold.

    Returns:
        A table of what changed by more than `tolerance`, with the geometric mean and the worst of the paired ratios in
        its notes, and whether anything of ours became worse: a speed-up that fell, more FLOPs or memory, each by more
        than `tolerance`, a row that was fine and now fails, is not measured or has no speed-up any more, or nothing
        in common at all.
    """
    before, after = ({row.key: row for row in rows} for _, rows in (old, new))
    lines: list[list[str]] = []
    worse, paired, matched, loose = False, {}, 0, 0
    for key, was in before.items():
        if was.status != "ok":
            continue
        row = after.get(key)
        if row is None and not any(_same_case(was, other) for other in new[1]):
            continue  # a filtered run need not hold every case
        matched += row is not None
        ours, where = was.role == "ours", [f"{was.suite}/{was.case} {was.mode}".strip(), was.impl]
        if row is None or row.status != "ok":
            now = "not measured" if row is None else row.status
            lines.append([*where, "result", "ok", now, ""])
            worse = worse or ours or now == "FAIL"
            continue
        if was.impl != was.baseline:
            change = _change(was, row)
            if change is None:
                lost = _usable(was.speedup) and not (_usable(row.speedup) and row.baseline == was.baseline)
                loose += not lost
                if lost:
                    now = f"none over {was.baseline}"
                    lines.append([*where, "speed-up", ratio(was.speedup), now, ""])
                    worse = worse or ours
            else:
                paired[" ".join(where)] = change, ours
                if _beyond(change, tolerance):
                    lines.append([*where, "speed-up", ratio(was.speedup), ratio(row.speedup), f"{number(change)}x"])
                    worse = worse or (ours and change < 1)
        for name, title, show in EXACT:
            a, b = getattr(was, name), getattr(row, name)
            if not a or b is None or not _beyond(b / a, tolerance):
                continue
            lines.append([*where, title, show(a), show(b), f"{number(b / a)}x"])
            worse = worse or (b > a and (ours or row.mode == "count"))  # what is counted belongs to the models
    notes = [f"{matched} rows in both runs; shown: changes beyond {tolerance:.0%}", *_summary(paired)]
    if loose:
        notes.append(f"{loose} rows have no baseline within their run: their times are not compared")
    notes += _machines(old[0], new[0])
    if not matched:
        worse = True
        notes.append("nothing in common: no row of this run is in that file")
    return Table("Compared with the earlier run, by ratios inside each", COLUMNS, lines, 3, notes), worse


def _same_case(one: Row, other: Row) -> bool:
    """Whether two rows stand in one comparison: all but the implementation is the same."""
    names = ("suite", "case", "mode", "dtype", "device")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _usable(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _change(was: Row, now: Row) -> float | None:
    """The speed-up now over the speed-up then; None where either is missing or over another baseline."""
    if was.baseline != now.baseline or not _usable(was.speedup) or not _usable(now.speedup):
        return None
    assert was.speedup is not None
    assert now.speedup is not None
    return now.speedup / was.speedup


def _beyond(change: float, tolerance: float) -> bool:
    """As far below one as above: a change and its way back count alike."""
    return not 1 / (1 + tolerance) <= change <= 1 + tolerance


def _summary(paired: dict[str, tuple[float, bool]]) -> list[str]:
    ours = {where: change for where, (change, mine) in paired.items() if mine}
    if not ours:
        return ["no speed-up of ours is in both runs"]
    mean = math.exp(sum(math.log(change) for change in ours.values()) / len(ours))
    worst = min(ours, key=lambda where: ours[where])
    return [f"speed-ups of ours, {len(ours)} pairs: geometric mean {mean:.3f}x, worst {ours[worst]:.3f}x ({worst})"]


def _machines(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    notes = []
    for fact in ("cpu", "gpu", "threads", "torch"):
        then, now = (run["machine"].get(fact) for run in (old, new))
        if then != now:
            notes.append(f"different {fact}: {then} then, {now} now")
    if old.get("interrupted"):
        notes.append("the earlier run was interrupted: it holds the cases that had ended")
    return notes
