"""Where examples come from: a table, a folder of shards or a published set."""

from __future__ import annotations

from pathlib import Path

from mirasol.kernels.core.checks import expect

from .clips import ClipSource
from .sets import SETS
from .shards import Shards
from .table import Example, read_table


def read_examples(table: str | Path) -> tuple[list[Example], ClipSource | None]:
    """The examples that a name on the command line stands for, and what reads their clips: None for media files.

    Args:
        table: a file that `read_table` reads; a folder that `write_shards` wrote; or a published set as
            NAME:SPLIT:FOLDER:VIDEOS, "nextqa-mc:val:NExT-QA/dataset:videos", a name of `mirasol.data.sets.SETS`.
    Raises:
        FileNotFoundError, ValueError: what is not there or cannot be read, by name.
    """
    name, *rest = str(table).split(":")
    if name in SETS and rest:
        expect(len(rest) == 3, "table", "be NAME:SPLIT:FOLDER:VIDEOS for a published set", str(table))
        split, folder, videos = rest
        return SETS[name](folder, split, videos), None
    if Path(table).is_dir():
        shards = Shards(table)
        return shards.examples, shards
    return read_table(table), None
