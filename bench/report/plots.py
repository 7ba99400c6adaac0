"""Plots of a run as PNG files and as SVG, from its rows. Needs matplotlib."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from core.rows import Row
from report import tables as report
from report.savings import CHUNKED, CHUNKED_TTM, EVERYTHING, POOLED, PUBLISHED, RESAMPLED, SUITE, saving

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = {EVERYTHING: "#555555", POOLED: "#E69F00", RESAMPLED: "#009E73", CHUNKED: "#0072B2", CHUNKED_TTM: "#D55E00"}
DASHES = {EVERYTHING: "-", POOLED: ":", RESAMPLED: ":", CHUNKED: "--", CHUNKED_TTM: "-"}  # where lines fall together
SIZES = {EVERYTHING: 8, POOLED: 4, RESAMPLED: 4, CHUNKED: 5, CHUNKED_TTM: 5}
OURS, PEER, LIMIT = "#D55E00", "#8DA0B5", "#D9D9D9"
PANELS: list[tuple[str, str, Callable[[Row], Any], dict[str, float]]] = [
    ("work ", "FLOPs", lambda row: row.flops, {"M": 1e6, "G": 1e9, "T": 1e12}),
    ("time ", "Time", lambda row: row.median_ms, {"ms": 1.0, "s": 1e3}),
    ("work ", "Peak memory of a training step", lambda row: row.detail.get("step_bytes"), {"MB": 1e6, "GB": 1e9}),
]
"""Cases, title, what is drawn, units."""
STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlesize": 11}


def draw(rows: list[Row], folder: Path, prefix: str, caption: str) -> list[Path]:
    """Draw every plot for which there are rows; returns the files.

    Args:
        prefix: of the files' names; caption: the machine line, at the foot of each plot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure in _figures(rows):
            _caption(figure, caption)
            path = folder / f"{prefix}-{name}.png"
            figure.savefig(path, dpi=150)
            written.append(path)
    return written


def as_svg(rows: list[Row], prefix: str, caption: str) -> dict[str, str]:
    """The same plots as SVG that a page may hold: name -> `<svg>` element, its text left as text."""
    drawn = {}
    # identifiers must differ between the pictures of one page, and be the same in every run
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": prefix}):
        for name, figure in _figures(rows):
            _caption(figure, caption)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
            drawn[name] = text.getvalue()[text.getvalue().index("<svg") :]
    return drawn


def _caption(figure: Figure, caption: str) -> None:
    foot = textwrap.fill(caption, int(18 * figure.get_figwidth()))
    figure.text(0.01, 0.01, foot, fontsize=6.5, color="#666666", ha="left", va="bottom")


def _figures(rows: list[Row]) -> list[tuple[str, Figure]]:
    good = [row for row in rows if row.status == "ok"]
    savings = [row for row in good if row.suite == SUITE]
    figures = []
    if any(row.case.startswith(("work ", "time ")) for row in savings):
        figures.append(("frames", _frames(savings)))
    if any(row.case.startswith("TTM share ") for row in savings):
        figures.append(("ttm", _ttm(savings)))
    suites = dict.fromkeys(row.suite for row in good if row.suite != SUITE and row.median_ms)
    figures += [(f"{suite}-peers", _peers(suite, [row for row in good if row.suite == suite])) for suite in suites]
    return figures


def _frames(rows: list[Row]) -> Figure:
    """Work, time and memory over the length of the clip, both axes logarithmic, one panel each."""
    panels = [
        (title, value, units, shown)
        for prefix, title, value, units in PANELS
        if (shown := [row for row in rows if row.case.startswith(prefix) and value(row)])
    ]
    figure = Figure(figsize=(max(7.5, 4.0 * len(panels)), 4.6))
    for index, (title, value, units, shown) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), index)
        unit, scale = _unit(units, max(value(row) for row in shown))
        for name, colour in COLOURS.items():
            line = sorted((row for row in shown if row.impl == name), key=lambda row: row.detail["frames"])
            x, y = [row.detail["frames"] for row in line], [value(row) / scale for row in line]
            axes.plot(x, y, DASHES[name], marker="o", color=colour, linewidth=2, markersize=SIZES[name], label=name)
            if title == "Time":
                _spread(axes, line, scale, colour)
        _log_axes(axes, sorted({row.detail["frames"] for row in shown}))
        preset = shown[0].detail["preset"]
        where = "counted" if shown[0].mode == "count" else f"{shown[0].device}, {shown[0].dtype}"
        where = "predicted" if title.startswith("Peak memory") else where
        axes.set_title(f"{title}, {unit}\n", loc="left", weight="bold")
        axes.text(0, 1.025, f"preset {preset}, {where}", transform=axes.transAxes, color="#444444", fontsize=9)
        axes.set_xlabel("frames in the clip")
    columns = 1 + 2 * len(panels)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="upper center", ncols=columns, frameon=False)
    figure.subplots_adjust(left=0.54 / figure.get_figwidth(), right=0.985, bottom=0.17, top=0.8, wspace=0.18)
    return figure


def _unit(units: dict[str, float], largest: float) -> tuple[str, float]:
    """The largest unit in which the largest value is at least 3."""
    fitting = [(name, scale) for name, scale in units.items() if largest >= 3 * scale]
    return fitting[-1] if fitting else next(iter(units.items()))


def _spread(axes: Axes, line: list[Row], scale: float, colour: str) -> None:
    """The 20th to the 80th percentile of the rounds."""
    for row in line:
        if row.p20_ms and row.p80_ms:
            x = row.detail["frames"]
            axes.plot([x, x], [row.p20_ms / scale, row.p80_ms / scale], color=colour, linewidth=1.2, marker="_")


def _log_axes(axes: Axes, ticks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True, which="major", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)


def _ttm(rows: list[Row]) -> Figure:
    """What TTM saves of the whole model's FLOPs, by depth of the Combiner it replaces, with the published figure."""
    shares = [row for row in rows if row.case.startswith("TTM share ") and row.detail["part"] == "whole model"]
    ttm = {row.detail["frames"]: row.flops for row in shares if row.impl == "TTM"}
    depths = sorted({row.detail["layers"] for row in shares if row.detail["layers"]})
    frames = sorted(ttm)
    figure = Figure(figsize=(7.2, 4.4))
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(depths))
    shades = ["#F6C7A3", "#DD7A33", "#A84300", "#7A3000"]
    for index, depth in enumerate(depths):
        heights = [
            next(
                saving(row.flops, ttm[f]) or 0
                for row in shares
                if (row.detail["frames"], row.detail["layers"]) == (f, depth)
            )
            for f in frames
        ]
        places = [i + (index - (len(depths) - 1) / 2) * width for i in range(len(frames))]
        bars = axes.bar(places, heights, width * 0.92, color=shades[index % 4], label=f"against {depth} layers")
        for bar, height in zip(bars, heights, strict=True):
            ink = "white" if index else "black"
            axes.text(bar.get_x() + bar.get_width() / 2, 0.6, f"{height:.1f}", ha="center", color=ink, fontsize=9)
    axes.axhline(PUBLISHED, color="#0072B2", linewidth=1.5, linestyle="--")
    axes.annotate(
        f"published: {PUBLISHED:.0f} %\n(setting not stated)",
        (1.0, PUBLISHED),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        color="#0072B2",
        va="center",
        fontsize=9,
    )
    axes.set_xticks(range(len(frames)), [f"{f} frames" for f in frames])
    axes.set_ylim(0, None)
    axes.set_ylabel("saved of the whole model's FLOPs, %")
    preset = shares[0].detail["preset"]
    axes.set_title(f"TTM Combiner against the causal-Transformer Combiner\npreset {preset}, counted", loc="left")
    axes.legend(frameon=False, loc="upper left")
    figure.subplots_adjust(left=0.1, right=0.8, bottom=0.16, top=0.86)
    return figure


def _peers(suite: str, rows: list[Row]) -> Figure:
    """Times of every implementation; bars are to scale within a case, the line marks the fastest of ours."""
    timed = [row for row in rows if row.median_ms]
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in timed:
        cases.setdefault((row.case, row.mode), []).append(row)
    lines = len(timed) + 1.4 * len(cases)
    figure = Figure(figsize=(9, 1.3 + 0.25 * lines))
    axes = figure.add_subplot()
    place = 0.0
    for (case, mode), group in cases.items():
        axes.text(-0.6, place, f"{case} {mode}", ha="left", va="center", weight="bold", fontsize=9)
        place += 1
        place = _group(axes, group, place) + 0.4
    axes.set_ylim(place, -0.8)
    axes.set_xlim(-0.6, 1.3)
    axes.set_axis_off()
    dtypes = ", ".join(sorted({row.dtype for row in timed}))
    device = timed[0].device if timed else ""
    figure.text(0.015, 1 - 0.3 / figure.get_figheight(), f"{suite}: {device}, {dtypes}", fontsize=12, weight="bold")
    note = "median time, and over the fastest of mirasol's; bars to scale within a case; light grey: a speed of light"
    figure.text(0.015, 1 - 0.52 / figure.get_figheight(), note, fontsize=8.5, color="#444444")
    bottom, top = 0.4 / figure.get_figheight(), 1 - 0.6 / figure.get_figheight()
    figure.subplots_adjust(left=0.015, right=0.985, bottom=bottom, top=top)
    return figure


def _group(axes: Axes, group: list[Row], place: float) -> float:
    """The bars of one case, from `place` on; returns the place after them."""
    colours = {"ours": OURS, "peer": PEER, "limit": LIMIT}
    times = [row.median_ms or 0.0 for row in group]
    ours = [time for row, time in zip(group, times, strict=True) if row.role == "ours"]
    if ours:
        x = min(ours) / max(times)
        axes.plot([x, x], [place - 0.5, place + len(group) - 0.5], color="#333333", linewidth=1, zorder=0.5)
    for row, time in zip(group, times, strict=True):
        length = time / max(times)
        axes.barh(place, length, 0.78, color=colours[row.role])
        axes.text(-0.01, place, row.impl, ha="right", va="center", fontsize=8.5)
        axes.text(1.15, place, report.milliseconds(time), ha="right", va="center", fontsize=8.5)
        if ours:
            axes.text(1.28, place, f"{time / min(ours):.2f}x", ha="right", va="center", fontsize=8.5)
        place += 1
    return place
