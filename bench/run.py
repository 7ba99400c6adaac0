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

from core import machine, provenance, roofline
from core.harness import one_line
from core.rows import Case, Row, Settings
from report import claims, files, pages, stored, tables
from report.compare import compare_runs
from report.console import HAS_RICH, WITHOUT_EXTRA, Console

DEFAULT = ("savings", "embedded")  # what chunks and Combiners save; the answers of the model in the package
MEASURED = (*DEFAULT, "attention", "combiner", "ttm", "tubes")
SUITES = (
    *MEASURED,
    "decode",
    "step",
    "stream",
    "traffic",
)  # tokens; training steps; live streams; kernels' moves, counted
DTYPES = ("float32", "bfloat16", "float16", "float64")
INTERRUPTED = 130
REFUSED = 2
BUILD = machine.REPOSITORY / "build" / "bench"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    chosen = f"suites, with commas: {', '.join(SUITES)}; all: all but the last four (default: {','.join(DEFAULT)})"
    add("--only", default=",".join(DEFAULT), help=chosen)
    add("--filter", default="", help="only cases whose suite/name contains this text")
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="small sizes, few rounds: does it run at all")
    effort.add_argument("--full", action="store_true", help="all sizes, many rounds")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: cuda if there)")
    add("--dtype", choices=DTYPES, help="default: the suite's own choice")
    add("--threads", type=int, help="CPU threads (default: PyTorch's)")
    add("--out", type=Path, default=BUILD, help="folder (default: build/bench)")
    add("--json", type=Path, help="results file (default: OUT/SUITES-MACHINE.json)")
    add("--csv", type=Path, help="also write the rows as CSV")
    add("--compare", type=Path, help="an earlier JSON file; exit 1 if a speed-up, FLOPs or memory of ours is worse")
    add("--tolerance", type=float, default=0.1, help="relative change that counts as such (default: 0.1)")
    add("--plot", type=Path, help="folder for PNG plots (default: OUT)")
    add("--profile", action="store_true", help="write a torch.profiler trace of every variant to OUT/traces")
    add("--tlx-python", type=Path, help="interpreter with torch and fbtriton, to time TLX in a process of its own")
    add("--write-predictions", action="store_true", help="put traffic's tables into kernels/*/PREDICTIONS.md")
    add("--claims", action="store_true", help="show what is claimed, from bench/results, and stop")
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
    try:  # before the run, which may write that very file
        options.earlier = files.read_json(options.compare) if options.compare else None
    except (OSError, ValueError) as error:
        parser.error(f"--compare must name a results file: {error}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(plain=options.plain)
    if options.claims:
        return show_claims(console, None, options.out)
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
    session = Session(options, settings, console, suites, cases)
    why = provenance.refusal(session.target, session.about)
    if why:
        print(f"run.py: error: {why}", file=sys.stderr)
        return REFUSED
    return session.run()


def show_claims(console: Console, fresh: stored.Result | None, folder: Path) -> int:
    """The table that every run ends in, and the page behind it. 0: all is well; 1: a stored result cannot be read."""
    kept, problems = stored.load()
    try:
        learned = stored.load_learned()
    except ValueError as error:
        learned, problems = None, [*problems, f"{stored.LEARNED} is no JSON: {error}"]
    results = kept if fresh is None else stored.with_run(kept, fresh)
    lines = claims.claims(results, learned)
    console.table(claims.table(lines))
    for problem in problems:
        console.say(f"FAIL {problem}")
    console.say(write_page(lines, results, folder))
    return 1 if problems else 0


def write_page(lines: list[claims.Claim], results: list[stored.Result], folder: Path) -> str:
    """The report as one HTML file; returns what to say about it."""
    try:
        from report import page
    except ImportError as missing:
        return f"No report: {missing}. {WITHOUT_EXTRA}"
    return f"Report: {page.write(folder / 'report.html', lines, results)}"


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
        self.target: Path = options.json or options.out / f"{'-'.join(options.suites)}-{machine.slug(facts)}.json"
        # what is kept in bench/results is replaced by a run that has come to its end, never by a part of one
        kept = self.target.resolve().is_relative_to(provenance.RESULTS)
        self.file = BUILD / self.target.name if kept else self.target
        self.page_folder: Path = BUILD if options.out.resolve().is_relative_to(provenance.RESULTS) else options.out
        self.about: dict[str, Any] = {
            "machine": facts | provenance.commit(),
            "code": provenance.code_of(options.suites),
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
        whole = self.keep()
        self.show(whole)
        worse = self.compare()
        show_claims(self.console, stored.Result(self.file.name, self.about, self.rows, fresh=True), self.page_folder)
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
        files.write_json(self.file, self.about, self.rows)
        if self.options.csv:
            files.write_csv(self.options.csv, self.about, self.rows)

    def keep(self) -> bool:
        """Write what there is for good: whole runs of committed code where they were asked for; False: not there."""
        other = provenance.changed(self.about["code"], provenance.code_of(self.options.suites))
        if other:
            self.about["machine"] |= {"dirty": True, "uncommitted": other}
            self.console.say(f"Changed while it was measured: {', '.join(other)}")
        self.finish()
        if self.file == self.target:
            return True
        if self.about["interrupted"] or other:
            self.console.say(f"Not kept in {self.target}: {'interrupted' if self.about['interrupted'] else 'changed'}")
            return False
        self.file = self.target
        self.finish()
        return True

    def show(self, whole: bool) -> None:
        """Tables, plots and the last lines."""
        say = self.console.say
        headlines = []
        for name, suite in self.suites.items():
            rows = [row for row in self.rows if row.suite == name]
            for drawn in suite.tables(rows) if rows else []:
                self.console.table(drawn)
            headlines.append(getattr(suite, "headline", tables.headline)(rows))
        self.say_rates()
        folder = self.options.plot or (self.options.out if whole else BUILD)
        for line in [*self.plot(folder), *self.write_predictions(), *filter(None, headlines)]:
            say(line)
        say(f"{tables.verdict(self.rows)}; {self.about['seconds']:.0f} s; {self.file}")

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

    def plot(self, folder: Path) -> list[str]:
        """Draw what can be drawn; returns what to say about it."""
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
        if self.options.earlier is None:
            return False
        table, worse = compare_runs(self.options.earlier, (self.about, self.rows), self.options.tolerance)
        self.console.table(table)
        self.console.say("Worse than before" if worse else "No worse than before")
        return worse


if __name__ == "__main__":
    sys.exit(main())
