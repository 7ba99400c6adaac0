"""The model that comes with the package: a run of the study, with its world and its card."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from safetensors.torch import save_file

from learning import queue
from learning.data import draw_stage, draw_test, types
from learning.report import HELD_OUT, TEST, WORDINGS
from learning.rows import BASE, ROWS, Row
from mirasol import EMBEDDED, Model
from mirasol.data import read_table
from mirasol.data.worlds import Look, floors
from mirasol.data.worlds.spec import HELD_OUT as KINDS
from mirasol.embedded import WORLD

CANNOT = (
    "It knows generated clips only: of a film, a photograph or speech it understands nothing.",
    "It knows the types of questions above: what sounded while something was seen, how many there were, where, which"
    " way, or whether something never was, it was not taught.",
    "It has learned from clips of one length, and is asked at their end: in the middle of one it counts chunks from"
    " where the end would be.",
    "Objects and sounds that were never shown, and words that it never met, it gets wrong more often: see the tables.",
)


def embed(run: dict[str, Any], work: Path, out: Path = EMBEDDED) -> Path:
    """Put the trained model of a run of the study into a folder, with what `world` needs and its card.

    Args:
        run: a result of the study.
        work: folder in which the study trained it.
    """
    row = ROWS[run["row"]]
    folder = queue.work_of(queue.Job(row, run["seed"]), work) / f"chunks-{row.chunks}"
    model = Model.from_pretrained(folder)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, out / name)
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, out / "model.safetensors")
    (out / "model.safetensors").chmod(0o644)
    told = {
        "chunks": row.chunks,
        "events": run["events"],
        "types": list(types(row.chunks, row.families)),
        "look": asdict(Look.of(model.config)),
    }
    (out / WORLD).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card(run, row, model, (out / "model.safetensors").stat().st_size), encoding="utf-8")
    return out


def card(run: dict[str, Any], row: Row, model: Model, size: int) -> str:
    """The model's card, in Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    last = row.stages[-1]
    names = {"test": TEST, "held_out": HELD_OUT, "wordings": WORDINGS}
    return environment.get_template("card.md.jinja").render(
        name="A small model of a generated world",
        preset="tiny",
        combiner=row.says,
        commit=run["machine"]["commit"],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=size,
        data=_data(row, run["seed"], model.config.seconds_per_chunk),
        training={
            "steps": run["steps"], "batch": last.batch, "seed": run["seed"], "seconds": run["seconds"],
            "machine": f"one thread of {run['machine']['cpu']}", "command": f"python bench/learn.py --only {row.name}",
        },
        tables={name: _table(run, row, table) for name, table in names.items()},
        cannot=CANNOT,
    )  # fmt: skip


def _data(row: Row, seed: int, seconds_per_chunk: float) -> dict[str, Any]:
    stages = (BASE, *row.stages)
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in stages:
            draw_stage(stage, row.families, seed, row.chunks, Path(folder) / "table.csv")
            tables.append(read_table(Path(folder) / "table.csv"))
    return {
        "clips": sum(len({example.clip for example in table}) for table in tables),
        "questions": sum(map(len, tables)),
        "lengths": [stage.chunks for stage in stages],
        "chunks": row.chunks,
        "events": row.stages[-1].events,
        "seconds_per_chunk": seconds_per_chunk,
        "types": types(row.chunks, row.families),
        "held_out_kinds": [" ".join(kind) for kinds in asdict(KINDS).values() for kind in kinds],
        "settings": "`draw_stage` of bench/learning/data.py",
        "seed": seed,
    }


def _table(run: dict[str, Any], row: Row, table: str) -> dict[str, dict[str, float]]:
    worlds, tables = draw_test(row.chunks, run["events"], row.families)
    right = {name: {"accuracy": good / count} for name, (good, count) in run["right"][table].items()}
    return {name: own | right[name] for name, own in floors(worlds, tables[table]).items()}
