"""A checkpoint's folder, whose content is replaced in one step while others read it and whatever dies on the way.

A save writes into a hidden folder, `.save-<id>`, and moves its weights, which have names of their own, out of it. The
one rename of `model.safetensors.index.json`, which names the weights' files and the save's id, makes it the checkpoint.
While the hidden folder of that id exists, it is read in place of what lies beside it (config.json, the tokenizer): this
is copied up after the switch, and the hidden folder goes last. What no checkpoint names is removed by the next save.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

INDEX = "model.safetensors.index.json"
LM_CONFIG = Path("text_decoder", "config.json")
_ID = "[0-9a-f]{12}"
_SHARD = r"(-\d{5}-of-\d{5})?\.safetensors"
# Replaced together: one that a new tokenizer lacks would be read as a part of it.
_TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja"),
)
_Read = TypeVar("_Read")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a JSON object, by the file's name.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, was {type(value).__name__}")
    return value


def weight_map(folder: Path) -> dict[str, str]:
    """Which file holds each weight, by the index of a folder; empty where there is no index."""
    if not (folder / INDEX).is_file():
        return {}
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
        raise ValueError(f"{folder / INDEX} must hold a weight_map from weights to names of files beside it")
    return files


def consistent(folder: Path, read: Callable[[Path], _Read]) -> _Read:
    """`read(root)`, again where a save switched meanwhile; all files but the weights and the index lie in `root`."""
    while True:
        before = _state(folder)
        try:
            result = read(before[1])
        except Exception:
            if _state(folder) == before:
                raise
        else:
            if _state(folder) == before:
                return result


@contextmanager
def replacing(folder: Path) -> Iterator[tuple[Path, str]]:
    """Replace the checkpoint in `folder`: yields the folder to write it to, and how the weights' names must begin.

    The index, which must be written too, is what switches; an error on the way leaves the old checkpoint. One save
    after the other, across processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # Some network file systems have no locks: there, saves must not be concurrent.
            fcntl.flock(lock, fcntl.LOCK_EX)
        _settle(folder)
        save = uuid4().hex[:12]
        staged = folder / f".save-{save}"
        staged.mkdir()
        try:
            yield staged, f"model-{save}"
            index = read_json(staged / INDEX)
            index["metadata"] = {**index.get("metadata", {}), "save": save}
            (staged / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            for path in (*staged.rglob("*"), staged):
                _sync(path)
            for path in staged.glob(f"model-{save}*"):
                path.chmod((staged / INDEX).stat().st_mode)  # safetensors would let nobody else read it
                os.rename(path, folder / path.name)
            _sync(folder)
            os.replace(staged / INDEX, folder / INDEX)
            _sync(folder)
        finally:
            _settle(folder)
    finally:
        os.close(lock)


def _state(folder: Path) -> tuple[str | None, Path]:
    """The id of the save that is the checkpoint (None: not one of ours), and where its files but the weights lie."""
    if not (folder / INDEX).is_file():
        return None, folder
    metadata = read_json(folder / INDEX).get("metadata")
    save = metadata.get("save") if isinstance(metadata, dict) else None
    if not isinstance(save, str) or not re.fullmatch(_ID, save):
        return None, folder
    staged = folder / f".save-{save}"
    return save, staged if staged.is_dir() else folder


def _settle(folder: Path) -> None:
    """Bring a switch to its end, however far it came, and remove what belongs to no checkpoint."""
    save, root = _state(folder)
    if root != folder:
        done = folder / f".done-{save}"
        done.mkdir(exist_ok=True)
        files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
        for file in files:
            shutil.copyfile(root / file, done / "file")
            _sync(done / "file")
            (folder / file).parent.mkdir(exist_ok=True)
            os.replace(done / "file", folder / file)
        replaced = [LM_CONFIG]
        if Path(_TOKENIZER_FILES[0]) in files:
            replaced += map(Path, _TOKENIZER_FILES)
        for file in replaced:
            if file not in files:
                (folder / file).unlink(missing_ok=True)
        for place in {folder, *((folder / file).parent for file in files)}:
            _sync(place)
        os.rename(root, done / "staged")
    used = set(weight_map(folder).values())
    unused = f"model(-{_ID})?{_SHARD}" if save is not None else f"model-{_ID}{_SHARD}"
    for path in folder.iterdir():
        if re.fullmatch(rf"\.(save|done)-{_ID}", path.name):
            shutil.rmtree(path)
        elif re.fullmatch(unused, path.name) and path.name not in used:
            path.unlink()


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
