"""Media files in tar archives of the WebDataset layout, with an index by which each clip is one seek away."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mirasol.config import Config
from mirasol.kernels.core.checks import expect, expect_int

from .clips import ClipTensors, read_span
from .table import Example, read_rows

INDEX = "index.jsonl"
COPY_BYTES = 2**20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """Where the bytes of a clip lie: `size` bytes from `offset` on in the archive `shard`; `sha256` of them."""

    key: str
    suffix: str
    shard: str
    offset: int
    size: int
    sha256: str


def write_shards(
    examples: Sequence[Example], out: str | Path, *, shard_bytes: int = 2**30, bad_share: float = 0.05
) -> list[tuple[str, str]]:
    """Copy the clips of a table, each once, into shard-000000.tar, shard-000001.tar, ... of a folder.

    Each clip is two members, `KEY.mp4` (or what its suffix is), its file as it was, and `KEY.json`, a list of what is
    asked of it in the columns of `read_table`. So any tool for WebDataset reads them. Keys are the files' names without
    the suffix, dots replaced, numbered where two are the same. index.jsonl, written last, says where each clip lies.

    Args:
        examples: their clips are media files.
        out: a folder, made where it is missing, that holds no shards.
        shard_bytes: at which a shard is full; a clip is not divided.
        bad_share: files that may be missing or unreadable, as a share; they are logged and left out.
    Returns:
        (clip, reason) of what was left out.
    Raises:
        FileExistsError: `out` holds shards.
        ValueError: an argument out of range, or too many missing files; it lists them. Nothing is written then.
    """
    out = Path(out)
    expect_int("shard_bytes", shard_bytes)
    expect(len(examples) > 0, "examples", "hold at least one example", examples)
    if next(out.glob("shard-*.tar*"), None) is not None or (out / INDEX).exists():
        raise FileExistsError(f"out must hold no shards, was {str(out)!r}")
    asked: dict[str, list[Example]] = {}
    for example in examples:
        asked.setdefault(example.clip, []).append(example)
    missing = [clip for clip in asked if not (os.path.isfile(clip) and os.access(clip, os.R_OK))]
    if len(missing) > bad_share * len(asked):
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        must = f"be files, at most a share of {bad_share:g} missing"
        raise ValueError(f"clips must {must}, {len(missing)} of {len(asked)} were: {', '.join(missing[:10])}{more}")
    for clip in missing:
        log.warning("%s is left out: no such file", clip)
        del asked[clip]
    out.mkdir(parents=True, exist_ok=True)
    keys = _keys(list(asked))
    lines: list[dict[str, Any]] = []
    for name, clips in _divide(list(asked), shard_bytes):
        part = out / f"{name}.part"
        with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
            for clip in clips:
                _add(tar, keys[clip], clip, asked[clip])
        lines += _index(part, name)
        os.replace(part, out / name)
    index = out / f"{INDEX}.part"
    index.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    os.replace(index, out / INDEX)
    return [(clip, "no such file") for clip in missing]


class Shards:
    """Clips in the folder that `write_shards` wrote; a `ClipSource` for examples whose `clip` is a key.

        shards = Shards(folder)
        Loader(shards.examples, config, tokenizer, batch_clips=8, source=shards)

    Attributes:
        examples: of the table that was written, their clips named by keys.
        entries: where each clip lies, by key.
    Raises:
        FileNotFoundError: no index in the folder.
        ValueError: an index that cannot be read, by line.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.examples: list[Example] = []
        self.entries: dict[str, Entry] = {}
        path = self.folder / INDEX
        if not path.is_file():
            raise FileNotFoundError(f"folder must hold {INDEX}, as write_shards writes it, was {str(folder)!r}")
        for place, row in read_rows(path):
            try:
                asked = row.pop("examples")
                entry = Entry(**row)
                self.examples += [_example(entry.key, one) for one in asked]
            except (KeyError, TypeError) as error:
                raise ValueError(f"{place}: must be a line that write_shards wrote: {error}") from error
            self.entries[entry.key] = entry

    def __call__(self, example: Example, config: Config, max_chunks: int) -> ClipTensors:
        """The span of an example, as `load_clip` reads it."""
        with self.open(example.clip) as file:
            return read_span(file, example, config, max_chunks)

    def open(self, key: str) -> BinaryIO:
        """The bytes of a clip, as a file to be read.

        Raises:
            FileNotFoundError: no clip of that key, or its shard is gone.
        """
        entry = self._entry(key)
        return io.BufferedReader(_Range(self.folder / entry.shard, entry))

    def fingerprint(self, clip: str) -> str:
        """Of a clip's content."""
        return self._entry(clip).sha256

    def _entry(self, key: str) -> Entry:
        if key not in self.entries:
            raise FileNotFoundError(f"clip must be a key in {self.folder / INDEX}, was {key!r}")
        return self.entries[key]


class _Range(io.RawIOBase):
    """A clip's bytes in its shard. `name` is what errors tell."""

    def __init__(self, path: Path, entry: Entry) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - `close` closes it
        self._start, self._size, self._at = entry.offset, entry.size, 0
        self.name = f"{path}:{entry.key}{entry.suffix}"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence], 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        want = max(min(len(buffer), self._size - self._at), 0)
        self._file.seek(self._start + self._at)
        got = self._file.readinto(memoryview(buffer)[:want]) or 0
        self._at += got
        return got

    def close(self) -> None:
        self._file.close()
        super().close()


def _keys(clips: list[str]) -> dict[str, str]:
    """A key for each clip: WebDataset takes what stands before the first dot of a member's name."""
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for clip in clips:
        stem = key = re.sub(r"[^\w-]", "_", Path(clip).stem) or "clip"
        number = 1
        while key in taken:
            number += 1
            key = f"{stem}-{number}"
        taken.add(key)
        keys[clip] = key
    return keys


def _divide(clips: list[str], shard_bytes: int) -> Iterator[tuple[str, list[str]]]:
    """Names of shards and their clips, in order."""
    number, size = 0, 0
    together: list[str] = []
    for clip in clips:
        more = os.path.getsize(clip)
        if together and size + more > shard_bytes:
            yield f"shard-{number:06d}.tar", together
            number, size, together = number + 1, 0, []
        together.append(clip)
        size += more
    if together:
        yield f"shard-{number:06d}.tar", together


def _add(tar: tarfile.TarFile, key: str, clip: str, examples: list[Example]) -> None:
    with open(clip, "rb") as file:
        info = tarfile.TarInfo(key + (Path(clip).suffix.lower() or ".media"))
        info.size = os.fstat(file.fileno()).st_size
        tar.addfile(info, file)
    rows = [
        {name: value for name, value in asdict(example).items() if name != "clip" and value not in (None, "", ())}
        for example in examples
    ]
    text = json.dumps(rows, ensure_ascii=False).encode()
    info = tarfile.TarInfo(f"{key}.json")
    info.size = len(text)
    tar.addfile(info, io.BytesIO(text))


def _example(key: str, row: dict[str, Any]) -> Example:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Example(**{**values, "clip": key})


def _index(path: Path, shard: str) -> Iterator[dict[str, Any]]:
    """The lines of the index for a shard, as it lies on the disk."""
    with tarfile.open(path) as tar:
        members = iter(tar)
        for media, asked in zip(members, members, strict=True):
            key, suffix = media.name.split(".")[0], Path(media.name).suffix
            digest = hashlib.sha256()
            content = tar.extractfile(media)
            text = tar.extractfile(asked)
            assert content is not None
            assert text is not None
            while block := content.read(COPY_BYTES):
                digest.update(block)
            entry = Entry(key, suffix, shard, media.offset_data, media.size, digest.hexdigest())
            yield {**asdict(entry), "examples": json.loads(text.read())}
