"""A generated set to try everything with: squares that move, sounds of known pitch, questions about both.

No question can be answered from its words alone, those about the picture not from the sound and the other way round;
"What colour was the square when the bell sounded?" needs both, at the same time.
"""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mirasol.kernels.core.checks import expect_int

SIZE, FPS, RATE = 96, 25, 16000
PART = 0.8
"""Seconds that a sound lasts; three follow each other."""
COLOURS = {"red": (230, 40, 40), "green": (40, 200, 40), "blue": (50, 80, 240), "yellow": (230, 220, 40)}
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PITCHES = {"hum": 150.0, "horn": 450.0, "whistle": 2600.0}
BELL = 1200.0
"""Hz."""
FILES = ("questions.csv", "questions-test.csv")
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Scene:
    """A clip: the square's colours in the first and the second half and its way; three sounds, one of them the bell."""

    colours: tuple[str, str]
    way: str
    sounds: tuple[str, str, str]

    @property
    def seconds(self) -> float:
        return len(self.sounds) * PART

    def questions(self) -> list[tuple[str, str, str]]:
        """(type, question, answer) of each."""
        bell = self.sounds.index("bell")
        asked = [
            ("picture", "Which way does the square move?", self.way),
            ("picture", "What colour is the square at first?", self.colours[0]),
            ("sound", "What sounded first?", self.sounds[0]),
        ]
        if bell > 0:
            asked.append(("order", "What sounded before the bell?", self.sounds[bell - 1]))
        if bell < 2:
            asked.append(("order", "What sounded after the bell?", self.sounds[bell + 1]))
        if bell != 1:  # in the middle it rings in both halves
            asked.append(("both", "What colour was the square when the bell sounded?", self.colours[bell // 2]))
        return asked


def write_example(folder: str | Path, clips: int = 64, seed: int = 0) -> Path:
    """Write `clips` mp4 files of 2.4 s into `folder`/clips, questions.csv about four fifths of them and
    questions-test.csv about the others; -> `folder`.

    Args:
        clips: at least 5.
        seed: of what the clips show; the same seed gives the same set.
    Raises:
        ImportError: PyAV is not installed.
        FileExistsError: the folder holds other files.
    """
    expect_int("clips", clips, minimum=5)
    expect_int("seed", seed, minimum=0)
    folder = Path(folder)
    others = [path.name for path in folder.iterdir() if path.name not in (*FILES, "clips")] if folder.exists() else []
    if others:
        raise FileExistsError(f"folder must be new, or one of an earlier set, was {str(folder)!r} with {others[0]!r}")
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    header = ("clip", "type", "question", "answer")
    tables: tuple[list[tuple[str, ...]], ...] = ([header], [header])
    generator = random.Random(seed)
    first_of_test = clips - round(TEST_SHARE * clips)
    for index in range(clips):
        scene = _scene(generator)
        name = f"clips/{index:04d}.mp4"
        _write_clip(folder / name, scene, generator.random())
        tables[index >= first_of_test].extend((name, *question) for question in scene.questions())
    for file, rows in zip(FILES, tables, strict=True):
        with (folder / file).open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(rows)
    return folder


def _scene(generator: random.Random) -> Scene:
    colours = generator.sample(list(COLOURS), 2)
    sounds = ["bell", *generator.sample(list(PITCHES), 2)]
    generator.shuffle(sounds)
    return Scene((colours[0], colours[1]), generator.choice(list(WAYS)), (sounds[0], sounds[1], sounds[2]))


def _write_clip(path: Path, scene: Scene, across: float) -> None:
    """Args: across: where the square lies across its way, as a share of the room."""
    try:
        import av
    except ImportError as error:
        raise ImportError("clips are written by PyAV: pip install -e '.[media]'") from error
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=FPS)
        video.width, video.height, video.pix_fmt, video.bit_rate = SIZE, SIZE, "yuv420p", 400_000
        audio: Any = container.add_stream("aac", rate=RATE, layout="mono")
        count = round(scene.seconds * FPS)
        for index in range(count):
            picture = av.VideoFrame.from_ndarray(_picture(scene, index / count, across), format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, FPS)
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        sound = np.concatenate([_sound(name) for name in scene.sounds])
        for first in range(0, len(sound), 1024):
            piece = av.AudioFrame.from_ndarray(sound[None, first : first + 1024], format="fltp", layout="mono")
            piece.rate, piece.pts, piece.time_base = RATE, first, Fraction(1, RATE)
            container.mux(audio.encode(piece))
        container.mux(audio.encode(None))


def _picture(scene: Scene, time: float, across: float) -> np.ndarray:
    """uint8 [SIZE, SIZE, 3] at a share `time` of the clip."""
    image = np.full((SIZE, SIZE, 3), 40, dtype=np.uint8)
    side, room = SIZE // 3, SIZE - SIZE // 3
    x, y = (round(room * (across if step == 0 else time if step > 0 else 1 - time)) for step in WAYS[scene.way])
    image[y : y + side, x : x + side] = COLOURS[scene.colours[int(2 * time)]]
    return image


def _sound(name: str) -> np.ndarray:
    """float32 [PART * RATE] in -1..1: a steady tone, or the bell, which fades away."""
    t = np.arange(round(PART * RATE)) / RATE
    if name == "bell":
        wave = (np.sin(2 * np.pi * BELL * t) + 0.5 * np.sin(2 * np.pi * 2.76 * BELL * t)) * np.exp(-4 * t)
    else:
        wave = np.sin(2 * np.pi * PITCHES[name] * t)
    edge = np.minimum(np.minimum(t, PART - t) / 0.01, 1)  # 10 ms in and out, without a click
    return (0.5 * wave * edge).astype(np.float32)
