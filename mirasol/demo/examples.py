"""Clips that the page offers: those of a folder, or some of the world that the model has learned."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mirasol.data.worlds import write_world
from mirasol.embedded import WORLD, learned_world

CLIPS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".ts")
"""Suffixes of the files that a folder of examples is searched for."""

SEEDS = range(100, 106)
"""Of the clips that are made."""


@dataclass(frozen=True)
class Offered:
    """A clip, and questions that it can be asked, each with the true answer."""

    path: Path
    questions: tuple[tuple[str, str], ...] = ()


def find_examples(run: str | Path, folder: Path | None) -> dict[str, Offered]:
    """Examples by name: those of a folder; without one, new clips such as a model has learned from whose folder tells
    of its world, in a folder that goes when the process ends.

    Raises:
        ImportError: clips must be made, and PyAV is not installed.
    """
    if folder is not None:
        paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in CLIPS)
        return {path.name: Offered(path.resolve()) for path in paths}
    if not (Path(run) / WORLD).is_file():
        return {}
    made = Path(tempfile.mkdtemp(prefix="mirasol-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    told, found = learned_world(run), {}
    for seed in SEEDS:
        path = made / f"world-{seed}.mp4"
        found[path.name] = Offered(path, tuple(write_world(path, seed, **told)))
    return found
