"""A small model that comes with the package, and the generated world that it has learned from.

    model, tokens = mirasol.Model.from_pretrained(mirasol.EMBEDDED), mirasol.load_tokenizer(mirasol.EMBEDDED)

README.md in its folder is its card: what it has learned from, how often it is right, what it cannot do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

EMBEDDED = Path(__file__).parent
"""Folder of the model in the package, for whatever takes that of a run."""

WORLD = "world.json"
"""File of a model's folder that tells the generated world which it has learned."""


def learned_world(folder: str | Path) -> dict[str, Any]:
    """Arguments for `mirasol.data.worlds.write_world` that make clips, and ask questions, such as a model has learned.

    They stand in the file `WORLD` of its folder: {"chunks", "events", "types", "look"}, the last one with the fields
    of `mirasol.data.worlds.Look`. Without it chunks and pictures are made to the model's measure and all is asked.

    Raises:
        FileNotFoundError: a folder without a model.
        TypeError, ValueError: a broken file, by its name.
    """
    from mirasol import atomic
    from mirasol.config import Config
    from mirasol.data.worlds import Look
    from mirasol.kernels.core.checks import expect

    file = Path(folder) / WORLD
    if not file.is_file():
        config = Path(folder) / "config.json"
        if not config.is_file():
            raise FileNotFoundError(f"folder must hold {config.name}, was {str(folder)!r}, which holds none")
        return dict(chunks=16, events=None, types=None, look=Look.of(Config.load(config)))
    told = atomic.read_json(file)
    names = ["chunks", "events", "look", "types"]
    expect(sorted(told) == names, str(file), f"hold {', '.join(names)}", sorted(told))
    return {**told, "look": Look(**told["look"])}


def learned_chunks(folder: str | Path) -> int:
    """Most chunks of the clips that a run was trained with, as its folder tells; else what training takes by itself.

    Raises:
        TypeError, ValueError: a broken file, by its name.
    """
    from mirasol import atomic
    from mirasol.kernels.core.checks import expect_int
    from mirasol.training.options import TrainOptions

    for name, key in (("options.json", "max_chunks"), (WORLD, "chunks")):
        if (Path(folder) / name).is_file():
            return expect_int(f"{key} in {Path(folder) / name}", atomic.read_json(Path(folder) / name).get(key))
    return TrainOptions.max_chunks
