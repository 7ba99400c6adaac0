"""Numbers as people read them, and tables of rows."""

from __future__ import annotations

from typing import Any

from core.rows import Row
from report.console import Table


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, no exponent; "–" for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    whole = len(str(int(abs(value))))
    decimals = max(0, digits - whole) if abs(value) >= 1 else digits
    return f"{value:.{decimals}f}"


def scaled(value: float | None, unit: str = "") -> str:
    """1.23 T, 45.6 G, ... by powers of a thousand."""
    if value is None:
        return "–"
    for power, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{number(value / power)} {prefix}{unit}"
    return f"{number(value)} {unit}".rstrip()


def milliseconds(value: float | None) -> str:
    """Seconds from 10 s on, else milliseconds, with the unit."""
    if value is None:
        return "–"
    return f"{number(value / 1e3)} s" if value >= 1e4 else f"{number(value)} ms"


def mebibytes(value: float | None) -> str:
    """Sizes by powers of 1024, with the unit."""
    if value is None:
        return "–"
    return f"{number(value / 2**30)} GiB" if value >= 2**30 else f"{number(value / 2**20)} MiB"


def ratio(value: float | None) -> str:
    return "–" if value is None else f"{number(value)}x"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} %"


def time_range(row: Row) -> str:
    """Median and the 20th to 80th percentile, in milliseconds."""
    if row.median_ms is None:
        return row.status
    return f"{number(row.median_ms)} ({number(row.p20_ms)}–{number(row.p80_ms)})"


def comparison_table(title: str, rows: list[Row], notes: list[str] | None = None) -> Table:
    """Timed rows of any suite, one case after the other. Columns that no row fills are left out."""
    baselines = sorted({row.baseline for row in rows if row.baseline})
    against = f"x {baselines[0]}" if len(baselines) == 1 else "x baseline"
    columns: list[tuple[str, Any]] = [
        ("case", lambda row: f"{row.case} {row.mode}".strip()),
        ("implementation", lambda row: row.impl + (" *" if row.role == "limit" else "")),
        ("ms (p20–p80)", time_range),
        ("n", lambda row: str(row.n) if row.n else ""),
        (against, lambda row: number(row.speedup) if row.speedup else ""),
        ("x best peer", lambda row: number(row.against_best) if row.against_best else ""),
        ("TFLOP/s", lambda row: number(row.tflops) if row.tflops else ""),
        ("GB/s", lambda row: number(row.gbps) if row.gbps else ""),
        ("% of roof", lambda row: f"{row.roof_pct:.0f}" if row.roof_pct else ""),
        ("peak MiB", lambda row: number(row.peak_bytes / 2**20) if row.peak_bytes is not None else ""),
        ("build ms", lambda row: number(row.build_ms) if row.detail.get("show_build") and row.build_ms else ""),
        (
            "launches a chunk",
            lambda row: number(launched) if (launched := row.detail.get("launches_per_chunk")) else "",
        ),
        ("error", lambda row: f"{row.error:.0e}" if row.error is not None else ""),
    ]
    grid = [[cell(row) for _, cell in columns] for row in rows]
    kept = [index for index in range(len(columns)) if any(line[index] for line in grid)]
    previous = ""
    for line in grid:
        if line[0] == previous:
            line[0] = ""
        else:
            previous = line[0]
    lines = list(notes or [])
    if any(row.role == "limit" for row in rows):
        lines.append("* other mathematics: a speed of light to look at, not a peer")
    lines += troubles(rows)
    return Table(title, [columns[i][0] for i in kept], [[line[i] for i in kept] for line in grid], 2, lines)


def troubles(rows: list[Row]) -> list[str]:
    """One sentence for each row that failed or was skipped."""
    return [
        f"{row.status} {row.case} {row.mode} {row.impl}: {row.reason}".replace("  ", " ")
        for row in rows
        if row.status != "ok"
    ]


def headline(rows: list[Row]) -> str:
    """The fastest of ours against the best peer, over the cases that have both."""
    best: dict[str, float] = {}
    for row in rows:
        if row.against_best is not None:
            case = f"{row.case} {row.mode}"
            best[case] = max(best.get(case, 0.0), row.against_best)
    if not best:
        return ""
    slower = sum(factor < 1 for factor in best.values())
    least, most = min(best, key=lambda case: best[case]), max(best, key=lambda case: best[case])
    return (
        f"{rows[0].suite}: mirasol's fastest against the best peer, {len(best)} cases, {slower} of them slower: "
        f"{number(best[least])}x ({least}) to {number(best[most])}x ({most})"
    )


def verdict(rows: list[Row]) -> str:
    """How many rows there are, and how many failed or could not run here."""
    counts = {status: sum(row.status == status for row in rows) for status in ("ok", "SKIP", "FAIL")}
    return f"{counts['ok']} rows measured, {counts['SKIP']} skipped, {counts['FAIL']} failed"
