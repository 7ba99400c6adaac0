"""Which code a result was measured with, and whether it is still the code at hand.

A run writes down the contents of the files that its numbers depend on, as git names them: a result is older than its
code where one of them is another now, whatever became of the history. The commit says where they can be read.
"""

from __future__ import annotations

import ast
import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from core.machine import REPOSITORY

RESULTS = REPOSITORY / "bench" / "results"
MATTERS = ("mirasol", "src", "kernels", "csrc", "bench", "setup.py", "pyproject.toml")
"""What must be committed before a result may be kept."""
ROOMS = ("cases", "peers", "core")
"""Of bench/: where a suite's imports are followed. What a run leaves of its rows changes no number."""
ABOUT = ("machine.py", "provenance.py", "roofline.py")
"""Of bench/core: what says where and how fast a machine measured, and not what."""
NOT_THE_MODEL = ("__main__.py", "data", "demo", "evaluate.py", "evaluation", "media", "train.py", "training", "kernels")
MODEL = ("mirasol", "kernels", "csrc")
LIBRARY: dict[str, tuple[str, ...]] = {
    "attention": ("kernels/attention", "kernels/core", "bench/peers/tlx.py"),
    "combiner": ("kernels/combiner", "kernels/attention", "kernels/core", "mirasol/layers.py"),
    "ttm": ("kernels", "mirasol/combiner.py", "mirasol/ttm.py", "mirasol/layers.py", "mirasol/config.py"),
    "embedded": (
        "kernels",
        "csrc",
        "mirasol",
        "mirasol/embedded",
        "mirasol/data",
        "mirasol/media",
        "mirasol/evaluation",
    ),
    "tubes": ("kernels/tubes", "kernels/core", "csrc"),
    "traffic": ("kernels", "csrc", "tests/emulator"),
    "learn": (
        *("kernels", "csrc", "mirasol/data/worlds", "mirasol/data/loader.py", "mirasol/data/collate.py"),
        *(f"mirasol/{name}.py" for name in ("model", "config", "combiner", "ttm", "text", "layers", "audiovideo")),
        *(f"mirasol/{name}.py" for name in ("losses", "batch", "past", "train")),
        *("mirasol/encoders", "mirasol/training"),
        *(f"bench/learning/{name}.py" for name in ("data", "run")),  # each result tells its own recipe of `rows`
    ),
}
"""What a suite runs beside its cases and what these import of bench/; every other suite runs the whole model."""

State = Literal["current", "older than its code", "uncommitted code", "unknown"]


def code_of(suites: Iterable[str], root: Path = REPOSITORY) -> dict[str, str]:
    """Path and content, as git's blob name cut to ten digits, of the files that results of these suites depend on."""
    files: set[Path] = set()
    for suite in suites:
        files.update(file for path in LIBRARY.get(suite, MODEL) for file in _files(root, path))
        _follow(root / "bench" / "cases" / f"{suite}.py", root / "bench", files)
    return {str(file.relative_to(root)): blob(file) for file in sorted(files)}


def _follow(file: Path, bench: Path, found: set[Path]) -> None:
    """Add a file and what it imports from the rooms, wherever in it that is."""
    if file in found or not file.is_file() or (file.parent.name == "core" and file.name in ABOUT):
        return
    found.add(file)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ROOMS:
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                _follow(bench / f"{name.replace('.', '/')}.py", bench, found)


def _files(root: Path, path: str) -> list[Path]:
    whole = root / path
    if whole.is_file():
        return [whole]
    found = [
        file for file in whole.rglob("*") if file.suffix in (".py", ".cpp", ".cu", ".h", ".hpp", ".cuh", ".safetensors")
    ]
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
