"""Clips and tables of questions about them, written to a folder."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Collection
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mirasol.config import Config
from mirasol.kernels.core.checks import expect, expect_int, expect_number
from mirasol.media.tracks import _import_av

from .floors import floors
from .picture import draw_chunk
from .questions import Ask, Question, asks, choose
from .sound import play
from .spec import ALL, HELD_OUT, LEARNED, Kinds, World, draw_world

TABLES = ("questions.csv", "questions-test.csv", "questions-heldout.csv", "questions-wordings.csv")
"""What is learned from; new clips; new clips about kinds that are held out; the test's questions in new words."""
SHARE = 0.2
"""Of the clips that are for the test, and as many for the kinds that are held out."""
MOST_TICKS = 65535
"""Of a second, that MPEG-4 can count."""
COLUMNS = ("clip", "type", "question", "answer", "id")


@dataclass(frozen=True)
class Look:
    """How clips are rendered.

    Attributes:
        seconds_per_chunk: how long a chunk lasts, rounded to whole samples: that of the model's configuration. At least
            0.16, a slow pulse with its silence.
        frames_per_chunk: F.
        size: pixels of the picture's side, even.
        sample_rate: Hz.
    """

    seconds_per_chunk: float = 0.16
    frames_per_chunk: int = 4
    size: int = 64
    sample_rate: int = 16000

    def __post_init__(self) -> None:
        seconds = expect_number("seconds_per_chunk", self.seconds_per_chunk)
        expect(seconds >= 0.16, "seconds_per_chunk", "be at least 0.16", seconds)
        expect_int("frames_per_chunk", self.frames_per_chunk, minimum=2)
        expect_int("size", self.size, minimum=32)
        expect(self.size % 2 == 0, "size", "be even", self.size)
        expect_int("sample_rate", self.sample_rate, minimum=16000)
        ticks = self.pictures_per_second.numerator
        must = f"make a frame a multiple of 1 / {MOST_TICKS} s, as MPEG-4 counts them"
        expect(ticks <= MOST_TICKS, "seconds_per_chunk", must, seconds)

    @classmethod
    def of(cls, config: Config) -> Look:
        """Chunks as a model of this configuration cuts them, pictures as large as it takes, at least 64 pixels."""
        return cls(config.seconds_per_chunk, config.frames_per_chunk, max(config.image_size, 64), config.sample_rate)

    @property
    def pictures_per_second(self) -> Fraction:
        return Fraction(self.frames_per_chunk * self.sample_rate, self.samples_per_chunk)

    @property
    def samples_per_chunk(self) -> int:
        """S."""
        return round(self.seconds_per_chunk * self.sample_rate)


def write_worlds(
    folder: str | Path,
    clips: int = 64,
    seed: int = 0,
    *,
    chunks: int = 16,
    events: int | None = None,
    per_type: float = 1.0,
    types: Collection[str] | None = None,
    look: Look = Look(),
) -> dict[str, dict[str, dict[str, float]]]:
    """Write mp4 files into `folder`/clips, the `TABLES` of questions about them, and worlds.json.

    Three fifths of the clips are learned from; a fifth is for the test, a fifth shows kinds of objects and sounds that
    are held out. worlds.json holds these arguments and the floors.

    Args:
        clips: at least 5.
        seed: of what happens; the same seed gives the same set.
        chunks: T of a clip, at least 4.
        events: changes of what is seen and heard in a clip, its beginning included; default: T / 2.
        per_type: questions of each type, per clip, as near as the balance of answers allows.
        types: of the questions that are asked, as the tables tell them; default: all.
        look: how they are rendered.
    Returns:
        the floors of each table, as `mirasol.data.worlds.floors` tells them.
    Raises:
        ImportError: PyAV is not installed.
        FileExistsError: the folder holds other files.
        TypeError, ValueError: an argument that cannot be, by name.
    """
    expect_int("clips", clips, minimum=5)
    events = _events(chunks, events)
    expect_int("seed", seed, minimum=0)
    expect(expect_number("per_type", per_type) > 0, "per_type", "be above 0", per_type)
    folder = Path(folder)
    known = (*TABLES, "clips", "worlds.json")
    others = [path.name for path in folder.iterdir() if path.name not in known] if folder.exists() else []
    if others:
        raise FileExistsError(f"folder must be new, or one of an earlier set, was {str(folder)!r} with {others[0]!r}")
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    worlds, tables = draw_set(clips, seed, chunks=chunks, events=events, per_type=per_type, types=types)
    for index, world in enumerate(worlds):
        write_clip(folder / _name(index), world, look)
    measured = {}
    for file, questions in tables.items():
        rows = [(_name(q.clip), q.ask.type, q.text, q.answer, f"{q.clip}-{i}") for i, q in enumerate(questions)]
        with (folder / file).open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([COLUMNS, *rows])
        measured[file] = floors(worlds, questions)
    settings: dict[str, Any] = dict(clips=clips, seed=seed, chunks=chunks, events=events, per_type=per_type)
    settings |= {"types": types if types is None else sorted(types)}
    held_out = {sense: [" ".join(kind) for kind in kinds] for sense, kinds in asdict(HELD_OUT).items()}
    told = settings | asdict(look) | {"held_out": held_out, "floors": measured}
    (folder / "worlds.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return measured


def draw_set(
    clips: int,
    seed: int,
    *,
    chunks: int,
    events: int,
    per_type: float,
    types: Collection[str] | None = None,
) -> tuple[list[World], dict[str, list[Question]]]:
    """What happens in all clips of a set, and the questions of each of its `TABLES`; see `write_worlds`."""

    def pool(world: World, own: Kinds, about: Kinds) -> list[tuple[Ask, int]]:
        return [(ask, key) for ask, key in asks(world, own, about) if types is None or ask.type in types]

    generator = random.Random(seed)
    share = round(SHARE * clips)
    first_test, first_held_out = clips - 2 * share, clips - share
    kinds = [LEARNED if index < first_held_out else ALL for index in range(clips)]
    worlds = [draw_world(generator, chunks, events, own) for own in kinds]
    tables = []
    for first, end, own, about in (
        (0, first_test, LEARNED, LEARNED),
        (first_test, first_held_out, LEARNED, LEARNED),
        (first_held_out, clips, ALL, HELD_OUT),
    ):
        chosen = choose([pool(world, own, about) for world in worlds[first:end]], per_type, generator)
        expect(len(chosen) > 0, "types", "name types of questions that the clips can be asked", types)
        tables.append([Question(first + q.clip, q.ask, q.wording, q.key) for q in chosen])
    tables.append([question.new_words() for question in tables[1]])
    return worlds, dict(zip(TABLES, tables, strict=True))


def write_world(
    path: str | Path,
    seed: int = 0,
    *,
    chunks: int = 16,
    events: int | None = None,
    types: Collection[str] | None = None,
    look: Look = Look(),
) -> list[tuple[str, str]]:
    """Write one clip, and return a question of each type about it with its answer.

    Args:
        path: of the file; its suffix names the container.
        seed, chunks, events, types, look: as for `write_worlds`.
    """
    events = _events(chunks, events)
    generator = random.Random(expect_int("seed", seed, minimum=0))
    world = draw_world(generator, chunks, events)
    pool = [(ask, key) for ask, key in asks(world, LEARNED) if types is None or ask.type in types]
    expect(len(pool) > 0, "types", "name types of questions that the clip can be asked", types)
    generator.shuffle(pool)
    one_of_each = {ask.type: (ask, key) for ask, key in pool}
    questions = choose([one_of_each.values()], 1.0, generator)
    write_clip(path, world, look)
    return [(question.text, question.answer) for question in questions]


def render(world: World, look: Look) -> tuple[np.ndarray, np.ndarray]:
    """A clip as it is before a file keeps less of it: uint8 [T * F, size, size, 3] and float32 [T * S]."""
    lasting = [(event, event.end - event.start) for event in world.events]
    drawn = [draw_chunk(e.seen, look.frames_per_chunk, look.size) for e, chunks in lasting for _ in range(chunks)]
    played = [play(e.heard, chunks * look.samples_per_chunk, look.sample_rate) for e, chunks in lasting]
    return np.concatenate(drawn), np.concatenate(played)


def write_clip(path: str | Path, world: World, look: Look) -> None:
    """Render a clip into a file."""
    av = _import_av()
    rate = look.sample_rate
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=look.pictures_per_second)
        video.width, video.height, video.pix_fmt = look.size, look.size, "yuv420p"
        video.codec_context.qmin = video.codec_context.qmax = 3
        audio: Any = container.add_stream("aac", rate=rate, layout="mono")
        pictures, sound = render(world, look)
        for index, image in enumerate(pictures):
            picture = av.VideoFrame.from_ndarray(image, format="rgb24")
            picture.pts, picture.time_base = index, 1 / look.pictures_per_second
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        for first in range(0, len(sound), 1024):
            piece = av.AudioFrame.from_ndarray(sound[None, first : first + 1024], format="fltp", layout="mono")
            piece.rate, piece.pts, piece.time_base = rate, first, Fraction(1, rate)
            container.mux(audio.encode(piece))
        container.mux(audio.encode(None))


def _events(chunks: int, events: int | None) -> int:
    """The number of events, checked."""
    expect_int("chunks", chunks, minimum=4)
    if events is None:
        return chunks // 2
    expect_int("events", events, minimum=2)
    expect(events <= chunks, "events", f"be at most chunks = {chunks}", events)
    return events


def _name(index: int) -> str:
    return f"clips/{index:05d}.mp4"
