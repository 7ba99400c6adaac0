"""What happens in a clip of a generated world, measured on the decoded file: nearest templates for what is seen, the
spectrum and the loudness for what is heard."""

from itertools import groupby, product

import numpy as np

import mirasol
from mirasol.data.worlds.picture import GREY, RGB, draw_chunk
from mirasol.data.worlds.sound import HERTZ, OVERTONES
from mirasol.data.worlds.spec import DIRECTIONS, PLACES, SHAPES, Event, Picture, Sound, World
from mirasol.data.worlds.write import Look


def read_world(path, chunks: int, look: Look, size: int = 32) -> World:
    """The events of a file, from pictures of `size` pixels."""
    clip = mirasol.load(
        path,
        chunks=chunks,
        frames_per_chunk=look.frames_per_chunk,
        size=size,
        samples_per_chunk=look.samples_per_chunk,
        sample_rate=look.sample_rate,
    )
    frames = clip.video.numpy().transpose(1, 2, 3, 0).reshape(chunks, look.frames_per_chunk, size, size, 3)
    sounds = clip.audio.numpy().reshape(chunks, look.samples_per_chunk)
    read = [(see(own), hear(sound, look.sample_rate)) for own, sound in zip(frames, sounds, strict=True)]
    events, start = [], 0
    for (seen, heard), same in groupby(read):
        end = start + len(list(same))
        events.append(Event(start, end, seen, heard))
        start = end
    return World(tuple(events))


def see(frames: np.ndarray) -> Picture:
    """uint8 [F, size, size, 3]."""
    size = frames.shape[1]
    lit = (np.abs(frames.astype(float) - GREY).max(3) > 90).astype(float)
    middle = size // 2
    corners = [lit[:, :middle, :middle], lit[:, :middle, middle:], lit[:, middle:, :middle], lit[:, middle:, middle:]]
    places = tuple(place for place, corner in zip(PLACES, corners, strict=True) if corner.sum() > 5 * len(frames))
    rows, columns = np.indices((size, size))
    x, y = ((lit * axis).sum((1, 2)) / lit.sum((1, 2)) for axis in (columns, rows))
    right, down = x[-1] - x[0], y[-1] - y[0]
    if abs(right) > abs(down):
        direction = "right" if right > 0 else "left"
    else:
        direction = "down" if down > 0 else "up"
    assert direction in DIRECTIONS

    def distance(kind: tuple[str, str]) -> float:
        template = draw_chunk(Picture(*kind, direction, places), len(frames), size)
        return float(np.abs(template.astype(float) - frames).sum())

    return Picture(*min(product(RGB, SHAPES), key=distance), direction, places)


def hear(sound: np.ndarray, rate: int) -> Sound:
    """float32 [S]."""
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 4 * len(sound)))

    def strength(hertz: float) -> float:
        near = hertz * 4 * len(sound) / rate
        reach = 4 * len(sound) * 20 // rate
        return float(spectrum[int(near) - reach : int(near) + reach + 1].max())

    def found(kind: tuple[str, str]) -> float:
        pitch, instrument = kind
        own = np.array([strength(HERTZ[pitch] * multiple) for multiple in (1, 2, 3)])
        expected = np.array([multiple in OVERTONES[instrument] for multiple in (1, 2, 3)], dtype=float)
        return float(own @ expected / np.linalg.norm(expected))

    pitch, instrument = max(product(HERTZ, OVERTONES), key=found)
    loud = np.sqrt(np.square(sound[: len(sound) // 80 * 80]).reshape(-1, 80).mean(1))  # of 5 ms each
    quiet = loud < 0.3 * loud.max()
    turns = np.abs(np.diff(quiet[1:-1].astype(int))).sum() / (len(sound) / rate)
    rhythm = "fast" if turns > 25 else "slow" if quiet.mean() > 0.3 else "steady"
    return Sound(pitch, instrument, rhythm)
