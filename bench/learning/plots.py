"""Accuracy against what it costs, one point a model, and against how long ago something was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
        for name, own in runs.items():
            value = report.share(own, "all")
            assert value is not None
            x, y = own[0][key] / unit, 100 * value.mean
            axes.plot([x, x], [100 * value.low, 100 * value.high], color=COLOURS[name], linewidth=1.5)
            axes.plot(x, y, "o", color=COLOURS[name], markersize=7)
            axes.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=9, color=COLOURS[name])
        _floor(axes, runs)
        axes.set_xlabel(label)
        axes.set_xscale("log")
        axes.grid(True, color="#E6E6E6")
    figure.axes[0].set_ylabel("right answers, %")
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


def _floor(axes: Axes, runs: dict[str, list[dict[str, Any]]]) -> None:
    axes.axhline(100 * report.floor(next(iter(runs.values()))), color="#888888", linestyle="--", linewidth=1)
