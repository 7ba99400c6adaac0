"""The small study: which Combiner learns what, at which cost. `--full` for all rows and three seeds.

Models watch generated clips and answer questions about what was seen and heard up to 31 chunks ago. Results that are
there already, and belong to the recipe of today, are not trained again: an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # the repository's root must not be on the path: its folder `kernels` is no package
    sys.path.insert(0, str(HERE))

from core import machine, provenance  # noqa: E402
from learning import plots, queue, report  # noqa: E402
from learning.rows import ROWS, chosen  # noqa: E402
from report.console import Console  # noqa: E402

INTERRUPTED = 130


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--full", action="store_true", help="all rows, three seeds (default: the main rows, one seed)")
    add("--only", default="", help="rows, with commas")
    add("--seeds", type=int, help="seeds of each row (default: 1, with --full 3)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each (default: one a core)")
    add("--json", type=Path, help="results, which are added to (default: build/learn/learn.json)")
    add("--work", type=Path, default=machine.REPOSITORY / "build" / "learn", help="folder of what is being trained")
    add("--plot", type=Path, help="folder for PNG plots (default: that of the results)")
    add("--show", action="store_true", help="train nothing: tables and plots of the results that are there")
    add("--embed", metavar="ROW-SEED", help="put the model of a run into the package, with its card, and stop")
    add("--list", action="store_true", help="name the rows and stop")
    add("--plain", action="store_true", help="plain text even where rich is installed")
    add("--job", choices=("base", *ROWS), help=argparse.SUPPRESS)  # what the queue asks of its processes
    add("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("seeds", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, was {value}")
    options.seeds = options.seeds or (3 if options.full else 1)
    try:
        options.rows = chosen(options.full, [name for name in options.only.split(",") if name])
    except ValueError as error:
        parser.error(str(error))
    options.json = options.json or options.work / "learn.json"
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.job:
        return run_job(options)
    console = Console(plain=options.plain)
    if options.list:
        for row in options.rows:
            console.say(f"{row.name:20}{row.says}")
        return 0
    results = report.read(options.json)
    if options.embed:
        from learning.embed import embed

        run = next((run for run in results["runs"] if f"{run['row']}-{run['seed']}" == options.embed), None)
        if run is None:
            console.say(f"--embed must name a run of {options.json}, was {options.embed}")
            return 2
        console.say(str(embed(run, options.work)))
        return 0
    if not options.show and options.json.resolve().is_relative_to(provenance.RESULTS):
        here = provenance.commit()
        if here["commit"] is None or here["dirty"]:
            console.say(f"bench/results takes results of committed code only; not committed: {here['uncommitted']}")
            return 2
    jobs = [] if options.show else queue.missing(options.rows, range(options.seeds), results["runs"])

    def keep(run: dict[str, Any]) -> None:
        report.add(options.json, run)

    failed: list[str] = []
    if jobs:
        console.say(f"{len(jobs)} runs, {options.jobs} at once; results in {options.json}")
        try:
            failed = queue.run_all(jobs, options.work, options.jobs, keep, console.say)
        except KeyboardInterrupt:
            console.say(f"Interrupted: the same command goes on; what is there lies in {options.json}")
            return INTERRUPTED
    results = report.read(options.json)
    for table in report.tables(results):
        console.table(table)
    for file in plots.draw(results, options.plot or options.json.parent):
        console.say(f"Plot: {file}")
    return 1 if failed else 0


def run_job(options: argparse.Namespace) -> int:
    """One run, in the process that the queue started for it."""
    from learning import run

    row = None if options.job == "base" else ROWS[options.job]
    folder = queue.work_of(queue.Job(row, options.seed), options.work)
    base = run.learn_base(options.seed, queue.work_of(queue.Job(None, options.seed), options.work))
    here = {**machine.describe(torch.device("cpu")), **provenance.commit()}
    result = {} if row is None else run.learn_row(row, options.seed, folder, base)
    new = folder / "result.json.new"
    new.write_text(json.dumps({**result, "machine": here, "code": report.code()}) + "\n", encoding="utf-8")
    os.replace(new, folder / "result.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
