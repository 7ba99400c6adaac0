"""All runs of a study that are missing, a few at a time, each in a process of its own; a result is kept at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learning.rows import Row

COMMAND = Path(__file__).resolve().parents[1] / "learn.py"


@dataclass(frozen=True)
class Job:
    """A row with a seed, or the base that the rows of a seed begin from (row None)."""

    row: Row | None
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row.name if self.row else 'base'}-{self.seed}"


def missing(rows: Iterable[Row], seeds: Iterable[int], runs: list[dict[str, Any]]) -> list[Job]:
    """What has no result by the row's recipe of today, seed after seed, so that an early end leaves whole seeds."""
    done = {(run["row"], run["seed"], run["digest"]) for run in runs}
    rows = list(rows)
    return [Job(row, seed) for seed in seeds for row in rows if (row.name, seed, row.digest) not in done]


def work_of(job: Job, work: Path) -> Path:
    """The folder of a job; another recipe has another."""
    return work / (f"{job.name}-{job.row.digest}" if job.row else job.name)


def run_all(
    jobs: list[Job],
    work: Path,
    at_once: int,
    keep: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> list[str]:
    """Run jobs, `at_once` together with one thread each; returns the names of those that failed.

    Args:
        work: folder of what is being trained; a job that was interrupted goes on from there.
        keep: is given each result as it comes.
    """
    bases = [Job(None, seed) for seed in dict.fromkeys(job.seed for job in jobs)]
    waiting = [*bases, *jobs]
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    failed: list[str] = []
    made: set[int] = set()
    began = time.perf_counter()
    try:
        while waiting or running:
            for job in list(waiting):
                ready = job.row is None or job.seed in made
                if ready and len(running) < at_once:
                    waiting.remove(job)
                    running.append((job, _start(job, work)))
            for job, process in list(running):
                if process.poll() is None:
                    continue
                running.remove((job, process))
                result = work_of(job, work) / "result.json"
                if process.returncode or not result.is_file():
                    failed.append(job.name)
                    say(f"FAIL {job.name}: see {work_of(job, work) / 'log.txt'}")
                    if job.row is None:
                        failed += [other.name for other in waiting if other.seed == job.seed]
                        waiting = [other for other in waiting if other.seed != job.seed]
                    continue
                if job.row is None:
                    made.add(job.seed)
                else:
                    keep(json.loads(result.read_text(encoding="utf-8")))
                minutes = (time.perf_counter() - began) / 60
                say(f"{minutes:5.1f} min  {job.name} done, {len(waiting) + len(running)} to go")
            time.sleep(0.2)
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait()
    return failed


def _start(job: Job, work: Path) -> subprocess.Popen[bytes]:
    folder = work_of(job, work)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(COMMAND), "--work", str(work), "--job", job.row.name if job.row else "base"]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen([*command, "--seed", str(job.seed)], stdout=log, stderr=log, env=environment)
