"""Benchmarks of mirasol: `python bench/run.py` shows what chunks, Combiners and last-m pruning save on this machine.

`--only attention` times an operator against its peers. See `--help` and `--list`.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import shlex
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

# Python has put bench/ on the path. The repository's root must not be on it: its folder `kernels` is no package.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which measures memory, is to keep quiet

import torch

from core import machine, roofline
from core.harness import one_line
from core.rows import Case, Row, Settings
from report import pages
from report import tables as report
from report.console import HAS_RICH, WITHOUT_EXTRA, Console

MEASURED = ("savings", "attention", "combiner", "ttm", "tubes")
SUITES = (
    *MEASURED,
    "decode",
    "step",
    "stream",
    "traffic",
)  # tokens; training steps; live streams; kernels' moves, counted
DTYPES = ("float32", "bfloat16", "float16", "float64")
INTERRUPTED = 130


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    chosen = f"suites, with commas: {', '.join(SUITES)}, or all, which is all but the last four (default: savings)"
    add("--only", default="savings", help=chosen)
    add("--filter", default="", help="only cases whose suite/name contains this text")
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="small sizes, few rounds: does it run at all")
    effort.add_argument("--full", action="store_true", help="all sizes, many rounds")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: cuda if there)")
    add("--dtype", choices=DTYPES, help="default: the suite's own choice")
    add("--threads", type=int, help="CPU threads (default: PyTorch's)")
    add("--out", type=Path, default=machine.REPOSITORY / "build" / "bench", help="folder (default: build/bench)")
    add("--json", type=Path, help="results file (default: OUT/SUITES-MACHINE.json)")
    add("--csv", type=Path, help="also write the rows as CSV")
    add("--compare", type=Path, help="an earlier JSON file; exit 1 if something is worse beyond the tolerance")
    add("--tolerance", type=float, default=0.1, help="relative change that counts as such (default: 0.1)")
    add("--plot", type=Path, help="folder for PNG plots (default: OUT)")
    add("--profile", action="store_true", help="write a torch.profiler trace of every variant to OUT/traces")
    add("--tlx-python", type=Path, help="interpreter with torch and fbtriton, to time TLX in a process of its own")
    add("--write-predictions", action="store_true", help="put traffic's tables into kernels/*/PREDICTIONS.md")
    add("--list", action="store_true", help="name the cases and stop")
    add("--plain", action="store_true", help="plain text even where rich is installed")
    options = parser.parse_args(arguments)
    names = MEASURED if options.only == "all" else tuple(options.only.split(","))
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        parser.error(f"--only must name suites out of {', '.join(SUITES)}, was {', '.join(unknown)}")
    options.suites = names
    if options.write_predictions and names != ("traffic",):
        parser.error("--write-predictions goes with --only traffic")
    wholes = ("", *(f"traffic/{page}" for page in pages.PAGES))
    if options.write_predictions and options.filter not in wholes:
        parser.error(f"--write-predictions writes whole pages: --filter must be one of {', '.join(wholes[1:])}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that this PyTorch can use; there is none")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(plain=options.plain)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(
        device=torch.device(options.device),
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        effort="quick" if options.quick else "full" if options.full else "default",
        traces=options.out / "traces" if options.profile else None,
        tlx_python=options.tlx_python,
    )
    suites = {name: importlib.import_module(f"cases.{name}") for name in options.suites}
    found = [(name, case) for name, suite in suites.items() for case in suite.cases(settings)]
    cases = [(name, case) for name, case in found if options.filter in f"{name}/{case.name}"]
    if options.list:
        for name, case in cases:
            console.say(f"{name}/{case.name}")
        return 0
    if not cases:
        console.say(f"No case holds {options.filter!r}; see --list")
        return 1
    return Session(options, settings, console, suites, cases).run()


class Session:
    """One run: its cases, its rows and what is written of them."""

    def __init__(
        self,
        options: argparse.Namespace,
        settings: Settings,
        console: Console,
        suites: dict[str, ModuleType],
        cases: list[tuple[str, Case]],
    ) -> None:
        self.options, self.settings, self.console = options, settings, console
        self.suites, self.cases = suites, cases
        self.rows: list[Row] = []
        self.started = time.perf_counter()
        facts = machine.describe(settings.device)
        self.file = options.json or options.out / f"{'-'.join(options.suites)}-{machine.slug(facts)}.json"
        self.about: dict[str, Any] = {
            "machine": facts,
            "command": shlex.join(["python", "bench/run.py", *sys.argv[1:]]),
            "settings": {
                "suites": list(options.suites),
                "filter": options.filter,
                "effort": settings.effort,
                "device": str(settings.device),
                "dtype": options.dtype,
            },
            "interrupted": False,
        }

    def run(self) -> int:
        """Measure, write, show. 0: all is well; 1: a row failed or became worse; 130: interrupted."""
        say = self.console.say
        say(machine.line(self.about["machine"]))
        if not HAS_RICH:
            say(WITHOUT_EXTRA)
        say()
        gc.freeze()  # collections between measurements need not look at what the imports left
        try:
            timed = self.options.suites != ("traffic",)
            if timed:
                self.about["roofline"] = roofline.measure(self.settings)
            self.measure()
            if timed:
                self.about["roofline_at_end"] = roofline.measure(self.settings)
        except KeyboardInterrupt:
            self.about["interrupted"] = True
        finally:
            gc.unfreeze()
        self.finish()
        self.show()
        worse = self.compare()
        if self.about["interrupted"]:
            say(f"Interrupted: {len(self.rows)} rows of the cases that had ended are kept in {self.file}")
            return INTERRUPTED
        return 1 if worse or any(row.status == "FAIL" for row in self.rows) else 0

    def measure(self) -> None:
        """Run the cases one after the other; a case that raises costs its own rows only."""
        with self.console.progress(len(self.cases)) as progress:
            for suite, case in self.cases:
                progress.begin(f"{suite}/{case.name}")
                try:
                    rows = case.run(self.settings)
                except Exception as error:
                    rows = [Row(suite, case.name, "", status="FAIL", reason=one_line(error))]
                if "roofline" in self.about:
                    roofline.place(rows, self.about["roofline"])
                self.rows += rows
                self.finish()
                failed = sum(row.status == "FAIL" for row in rows)
                progress.end(f"FAIL in {failed} of {len(rows)} rows" if failed else "ok")

    def finish(self) -> None:
        """Write what there is."""
        self.about["seconds"] = round(time.perf_counter() - self.started, 1)
        self.about["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        report.write_json(self.file, self.about, self.rows)
        if self.options.csv:
            report.write_csv(self.options.csv, self.about, self.rows)

    def show(self) -> None:
        """Tables, plots and the last lines."""
        say = self.console.say
        headlines = []
        for name, suite in self.suites.items():
            rows = [row for row in self.rows if row.suite == name]
            for table in suite.tables(rows) if rows else []:
                self.console.table(table)
            headlines.append(getattr(suite, "headline", report.headline)(rows))
        self.say_rates()
        for line in [*self.plot(), *self.write_predictions(), *filter(None, headlines)]:
            say(line)
        say(f"{report.verdict(self.rows)}; {self.about['seconds']:.0f} s; {self.file}")

    def say_rates(self) -> None:
        start, end = self.about.get("roofline"), self.about.get("roofline_at_end")
        if start is None:
            return
        gemm = "gemm_tflops_"
        rates = ", ".join(f"{name.removeprefix(gemm)} {start[name]:.3g}" for name in start if name.startswith(gemm))
        line = f"This process: copy {start['copy_gbps']:.3g} GB/s; matrix products in TFLOP/s: {rates}"
        if end is not None:
            line += f"; changed by up to {roofline.drift(start, end):.0%} until the end"
        self.console.say(line)

    def plot(self) -> list[str]:
        """Draw what can be drawn; returns what to say about it."""
        folder = self.options.plot or self.options.out
        try:
            from report import plots
        except ImportError as missing:
            return [f"No plots: {missing}. {WITHOUT_EXTRA}"]
        try:
            files = plots.draw(self.rows, folder, self.file.stem, machine.line(self.about["machine"]))
        except Exception as error:
            self.rows.append(Row(self.options.suites[0], "plots", "", status="FAIL", reason=one_line(error)))
            self.finish()
            return [f"FAIL plots: {one_line(error)}"]
        return [f"Plot: {file}" for file in files]

    def write_predictions(self) -> list[str]:
        """Put the tables into the operators' pages, if asked for; returns what to say about it."""
        if not self.options.write_predictions:
            return []
        try:
            return [f"Written: {path}" for path in pages.write(self.rows)]
        except ValueError as error:
            self.rows.append(Row("traffic", "pages", "", status="FAIL", reason=one_line(error)))
            return [f"FAIL pages: {error}"]

    def compare(self) -> bool:
        """Whether something is worse than in the file that --compare names."""
        if self.options.compare is None:
            return False
        old = report.read_json(self.options.compare)
        table, worse = report.compare_runs(old, (self.about, self.rows), self.options.tolerance)
        self.console.table(table)
        self.console.say("Worse than before" if worse else "No worse than before")
        return worse


if __name__ == "__main__":
    sys.exit(main())
