"""Tables of predictions in kernels/*/PREDICTIONS.md, between two markers; what people wrote around them stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from core import machine
from core.predict import H100, H200, LAUNCH, PEAK, PRODUCTS, SERIAL, SERIAL_SPECIALIZED
from core.rows import Row
from report.tables import number

BEGIN, END = "<!-- predictions: begin -->", "<!-- predictions: end -->"
PAGES = ("attention", "combiner", "ttm", "tubes")
COMMAND = "python bench/run.py --only traffic --write-predictions"


def write(rows: list[Row], folder: Path = machine.REPOSITORY / "kernels") -> list[Path]:
    """Put the tables of every operator that has rows into its page; the pages written.

    Raises:
        ValueError: a page lacks the markers, or a row failed.
    """
    failed = [row for row in rows if row.status != "ok"]
    if failed:
        raise ValueError(f"{failed[0].case} failed: {failed[0].reason}; no page was written")
    written = []
    for page in PAGES:
        own = [row for row in rows if row.case.split()[0] == page]
        if own:
            path = folder / page / "PREDICTIONS.md"
            path.write_text(replaced(path.read_text(), text(page, own)))
            written.append(path)
    return written


def replaced(old: str, between: str, begin: str = BEGIN, end: str = END, page: str = "a page of predictions") -> str:
    """`old` with other text between the lines `begin` and `end`; `page` names it where they are missing."""
    before, found, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} needs the lines {begin} and {end}")
    return f"{before}{begin}\n{between}\n{end}{after}"


def text(page: str, rows: list[Row]) -> str:
    """The tables of a page, with what stands behind them."""
    about = (
        f"Written by `{COMMAND}`. **All of it is predicted, nothing was measured on a\n"
        "GPU.** Counted: compiled sm_90 kernels, run in the emulator of "
        "`tests/emulator`. "
        "Times (`bench/core/predict.py`): the longest\nof DRAM "
        f"(distinct bytes at {H100.copy / 1e12:.1f} TB/s on an H100, {H200.copy / 1e12:.1f} on an H200), L2 cache "
        f"({H100.l2 / 1e12:.1f} TB/s), loads in flight, and the\nbusiest multiprocessor, whose products reach "
        f"{PRODUCTS:.0%} of their rate and leave {SERIAL:.0%} of the shorter of products and\nother instructions "
        f"unhidden ({SERIAL_SPECIALIZED:.0%} with specialised warps); and {1e6 * LAUNCH:.0f} us a launch. Those shares "
        "are calibrated against\npublished kernels (`tests/bench/test_predict.py`), so a row is worth 15 %, one of a "
        "few microseconds less."
    )
    summary = _attention if page == "attention" else _floors
    return "\n\n".join([about, summary(rows), "Launch by launch:", _launches(rows)])


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = "|".join("--" for _ in columns)
    return "\n".join(
        ["| " + " | ".join(columns) + " |", f"|{rule}|", *("| " + " | ".join(line) + " |" for line in lines)]
    )


def _passes(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by case and pass, in order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.case, row.mode), []).append(row)
    return found


def seconds(rows: list[Row], device: str) -> float:
    return sum(row.detail["predicted"][device]["seconds"] for row in rows)


def _bound(rows: list[Row]) -> str:
    """What holds back the launch that takes longest."""
    longest = max(rows, key=lambda row: row.detail["predicted"]["H200"]["seconds"])
    return str(longest.detail["predicted"]["H200"]["bound"])


def _table(rows: list[Row], columns: Sequence[str], more: Callable[[list[Row], float, float], list[str]]) -> str:
    lines = []
    for (case, mode), own in _passes(rows).items():
        slow, fast = (seconds(own, device) for device in ("H100", "H200"))
        us = [number(1e6 * slow), number(1e6 * fast)]
        lines.append([case.partition(" ")[2], mode, str(len(own)), _bound(own), *us, *more(own, slow, fast)])
    return _markdown(["", "pass", "launches", "bound", "H100 us", "H200 us", *columns], lines)


def _attention(rows: list[Row]) -> str:
    def more(own: list[Row], slow: float, fast: float) -> list[str]:
        useful = own[0].flops or 0
        return [number(useful / slow / 1e12), number(useful / fast / 1e12), f"{useful / fast / PEAK:.0%}"]

    return _table(rows, ["useful TFLOP/s, H100", "H200", "of 989"], more)


def _floors(rows: list[Row]) -> str:
    def more(own: list[Row], slow: float, fast: float) -> list[str]:
        floor = (own[0].bytes or 0) / H200.copy
        return [number(1e6 * floor), f"{floor / fast:.0%}"]

    return _table(rows, ["floor on an H200: bytes once, us", "of the floor"], more)


def _launches(rows: list[Row]) -> str:
    """Those of the cases that stand for the others, which differ in length only."""
    columns = [
        "",
        "launch",
        "programs",
        "registers",
        "shared",
        "DRAM MB",
        "L2 to SM MB",
        "GFLOP",
        "exp2 M",
        "instructions M",
    ]
    columns += ["conflicts", "bound", "H200 us"]
    lines = []
    for row in rows:
        if not row.detail["listed"]:
            continue
        d, counters = row.detail, row.detail["counters"]
        exponentials = sum(n for opcode, n in d["executed"].items() if opcode.startswith("ex2."))
        numbers = [d["distinct"] / 1e6, d["loaded"] / 1e6, counters.get("matrix_flops", 0) / 1e9, exponentials / 1e6]
        lines.append(
            [
                row.case.partition(" ")[2],
                row.impl.partition(" ")[2],
                *[str(d[name]) for name in ("programs", "registers", "shared")],
                *[number(value) for value in numbers],
                number(counters.get("warp_instructions", 0) / 1e6),
                conflicts(counters),
                d["predicted"]["H200"]["bound"],
                number(1e6 * d["predicted"]["H200"]["seconds"]),
            ]
        )
    return _markdown(columns, lines)


def conflicts(counters: dict[str, float]) -> str:
    """Cycles of shared memory over those without bank conflicts."""
    ideal = sum(counters[name] for name in counters if name.endswith("_ideal"))
    waves = sum(counters[name] for name in counters if name.endswith("_wavefronts"))
    return f"{waves / ideal:.2f}" if ideal else "–"
