"""Which code a result was measured with, and whether it is still the code at hand.

A run writes down the contents of the files that its numbers depend on, as git names them: a result is older than its
code where one of them is another now, whatever became of the history. The commit says where they can be read.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from core.machine import REPOSITORY

RESULTS = REPOSITORY / "bench" / "results"
MATTERS = ("mirasol", "src", "kernels", "csrc", "bench", "setup.py", "pyproject.toml")
"""What must be committed before a result may be kept."""
MEASURING = ("bench/core/harness.py", "bench/core/counting.py", "bench/core/rows.py")
NOT_THE_MODEL = ("__main__.py", "data", "demo", "evaluate.py", "evaluation", "media", "train.py", "training", "kernels")
MODEL = ("mirasol", "kernels", "csrc")
LIBRARY: dict[str, tuple[str, ...]] = {
    "attention": ("kernels/attention", "kernels/core"),
    "combiner": ("kernels/combiner", "kernels/attention", "kernels/core", "mirasol/layers.py"),
    "ttm": ("kernels", "mirasol/combiner.py", "mirasol/ttm.py", "mirasol/layers.py", "mirasol/config.py"),
    "tubes": ("kernels/tubes", "kernels/core", "csrc"),
    "traffic": ("kernels", "csrc", "tests/emulator", "bench/core/traffic.py", "bench/core/predict.py"),
}
"""Beside its cases and peers, what a suite runs; every other suite runs the whole model."""
CASES: dict[str, tuple[str, ...]] = {
    "attention": ("bench/cases/attention_shapes.py", "bench/peers/attention.py", "bench/peers/tlx.py"),
    "decode": ("bench/peers/decode.py",),
    "savings": (
        "bench/cases/sweep.py",
        "bench/cases/attention.py",
        "bench/cases/attention_shapes.py",
        "bench/peers/attention.py",
    ),
    "step": ("bench/peers/mirasol_pytorch.py",),
    "ttm": ("bench/cases/ttm_variants.py",),
}
"""What `bench/cases/SUITE.py` takes from its neighbours."""

State = Literal["current", "older than its code", "uncommitted code", "unknown"]


def code_of(suites: Iterable[str], root: Path = REPOSITORY) -> dict[str, str]:
    """Path and content, as git's blob name cut to ten digits, of the files that results of these suites depend on."""
    paths: set[str] = set()
    for suite in suites:
        paths.update((*MEASURING, f"bench/cases/{suite}.py", *CASES.get(suite, ()), *LIBRARY.get(suite, MODEL)))
    files = {file for path in paths for file in _files(root, path)}
    return {str(file.relative_to(root)): blob(file) for file in sorted(files)}


def _files(root: Path, path: str) -> list[Path]:
    whole = root / path
    if whole.is_file():
        return [whole]
    found = [file for file in whole.rglob("*") if file.suffix in (".py", ".cpp", ".cu", ".h", ".hpp", ".cuh")]
    if path != "mirasol":
        return found
    return [file for file in found if file.relative_to(whole).parts[0] not in NOT_THE_MODEL]


def blob(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()[:10]


def changed(code: dict[str, str], now: dict[str, str]) -> list[str]:
    """Files that are not what they were, new and removed ones included."""
    return sorted(path for path in code.keys() | now.keys() if code.get(path) != now.get(path))


def again(code: dict[str, str], root: Path = REPOSITORY) -> dict[str, str]:
    """The same files as they are now; those that are gone are left out."""
    return {path: blob(root / path) for path in code if (root / path).is_file()}


def commit() -> dict[str, Any]:
    """The commit at hand and what of the code that matters is not committed; None where git cannot say."""
    try:
        at = _git("rev-parse", "HEAD").strip()
        # the results themselves are what a run writes
        found = _git("status", "--porcelain", "-uall", "--", *MATTERS, ":(exclude)bench/results").splitlines()
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None, "uncommitted": None}
    return {"commit": at[:10], "dirty": bool(found), "uncommitted": [line[3:] for line in found]}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


def state(run: dict[str, Any], now: dict[str, str] | None = None) -> tuple[State, str]:
    """What a stored run is worth today, and why.

    Args:
        run: what stands above the rows in its file.
        now: the code at hand; None: read it.
    """
    machine = run.get("machine", {})
    if machine.get("dirty"):
        return "uncommitted code", ", ".join(machine.get("uncommitted") or ["which, it does not say"])
    if not machine.get("commit") or not run.get("code"):
        return "unknown", "no record of its code" if machine.get("commit") else "git could not say which commit"
    if now is None:
        now = code_of(run["settings"]["suites"])
    other = changed(run["code"], now)
    if other:
        return "older than its code", f"{len(other)} files changed: {', '.join(other[:3])}"
    return "current", ""


def refusal(file: Path, run: dict[str, Any]) -> str:
    """Why a run may not be kept at `file`; empty where it may. `bench/results` takes whole runs of committed code."""
    if not file.resolve().is_relative_to(RESULTS):
        return ""
    machine, settings = run["machine"], run["settings"]
    if settings["effort"] == "quick" or settings["filter"]:
        return "bench/results takes whole runs: leave out --quick and --filter, or name another --out"
    if machine["commit"] is None:
        return "bench/results takes results of a commit only, and git does not say which this is"
    if machine["dirty"]:
        return f"bench/results takes results of committed code only; not committed: {', '.join(machine['uncommitted'])}"
    return ""
