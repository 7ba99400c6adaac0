"""Accuracy against what it costs, one point a model, and against how long ago something was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from learning import report
from learning.rows import ROWS

COLOURS = {
    "ttm": "#0072B2", "ttm-plain": "#56B4E9", "all-1": "#D55E00", "all-4": "#A84300", "this-1": "#999999",
    "this-4": "#555555", "pooling": "#009E73", "perceiver": "#CC79A7", "mean": "#E69F00", "none": "#000000",
}  # fmt: skip


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots that there are results for; returns their files."""
    runs = {name: own for name, own in report.current(results).items() if ROWS[name].group == "combiner"}
    if not runs:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in (("cost", _cost(runs)), ("ago", _ago(runs))):
        files.append(folder / f"learn-{name}.png")
        figure.savefig(files[-1], dpi=110)
    return files


def _cost(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    costs = (("flops", 1e6, "MFLOPs of a clip and a question"), ("stream_bytes", 1e3, "kB that a stream keeps"))
    for axes, (key, unit, label) in zip(figure.subplots(1, 2, sharey=True), costs, strict=True):
        for place, (name, own) in enumerate(sorted(runs.items(), key=lambda pair: pair[1][0][key])):
            value = report.share(own, "all")
            assert value is not None
            x, y = own[0][key] / unit, 100 * value.mean
            axes.plot([x, x], [100 * value.low, 100 * value.high], color=COLOURS[name], linewidth=1.5)
            axes.plot(x, y, "o", color=COLOURS[name], markersize=7)
            side = dict(xytext=(0, 7 if place % 2 else -15), textcoords="offset points", ha="center")
            axes.annotate(name, (x, y), fontsize=9, color=COLOURS[name], **side)
        first = next(iter(runs.values()))
        known = report.last_chunk(first)
        assert known is not None
        for line, name in ((report.guessed(first), "guessed"), (known.mean, "by the last chunk alone")):
            axes.axhline(100 * line, color="#888888", linestyle="--", linewidth=1)
            how = dict(xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", color="#666666")
            axes.annotate(name, (1, 100 * line), (-3, -12), fontsize=9, **how)
        axes.set_xlabel(label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.12)
        axes.grid(True, color="#E6E6E6")
    figure.axes[0].set_ylabel("right answers, %")
    figure.axes[0].set_ylim(20, 100)
    figure.suptitle("Accuracy against work, and against what a stream keeps", x=0.01, ha="left")
    return figure


def _ago(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    kinds = [kind.removeprefix("seen-ago-") for kind in next(iter(runs.values()))[0]["floors"] if "seen-ago-" in kind]
    kinds.sort(key=lambda kind: int(kind.partition("-")[0]))
    for name, own in runs.items():
        both = [[report.share(own, f"{sense}-ago-{kind}") for sense in ("seen", "heard")] for kind in kinds]
        means = [100 * sum(value.mean for value in pair if value is not None) / 2 for pair in both]
        axes.plot(range(len(kinds)), means, "o-", color=COLOURS[name], label=name, linewidth=1.5, markersize=4)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_xlabel("chunks ago")
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 102)
    axes.grid(True, color="#E6E6E6")
    axes.legend(frameon=False, ncols=2, fontsize=9)
    axes.set_title("What was seen and heard, by how long ago", loc="left")
    return figure
