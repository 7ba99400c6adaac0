"""What happens in a clip: a list of timed events, drawn before anything is rendered."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow")
PLACES = ("top left", "top right", "bottom left", "bottom right")
DIRECTIONS = ("left", "right", "up", "down")
NUMBERS = ("one", "two", "three", "four")
PITCHES = ("low", "middle", "high", "shrill")
INSTRUMENTS = ("flute", "organ", "clarinet", "violin")
RHYTHMS = ("steady", "slow", "fast")
VALUES = {
    "colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS, "number": NUMBERS, "place": PLACES,
    "pitch": PITCHES, "instrument": INSTRUMENTS, "rhythm": RHYTHMS,
}  # fmt: skip
"""What every property of a picture or a sound can be."""
PALETTE = 8
"""Kinds of objects, and kinds of sounds, among which the events of one clip choose: some are always absent."""

Kind = tuple[str, str]
"""(colour, shape) of an object, or (pitch, instrument) of a sound."""


@dataclass(frozen=True)
class Picture:
    """One to four copies of an object that move the same way, each in its own quarter of the picture."""

    colour: str
    shape: str
    direction: str
    places: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        return self.colour, self.shape

    @property
    def number(self) -> str:
        return NUMBERS[len(self.places) - 1]

    @property
    def place(self) -> str | None:
        """Where the object is, if there is only one."""
        return self.places[0] if len(self.places) == 1 else None


@dataclass(frozen=True)
class Sound:
    pitch: str
    instrument: str
    rhythm: str

    @property
    def kind(self) -> Kind:
        return self.pitch, self.instrument


@dataclass(frozen=True)
class Event:
    """What is seen and heard from chunk `start` to before chunk `end`."""

    start: int
    end: int
    seen: Picture
    heard: Sound


@dataclass(frozen=True)
class World:
    """A clip: events that follow each other. Neighbours differ in the kind of the object and in that of the sound."""

    events: tuple[Event, ...]

    @property
    def chunks(self) -> int:
        """T."""
        return self.events[-1].end

    def track(self, sense: str) -> list[Any]:
        """What is "seen" in each event, or "heard"."""
        return [getattr(event, sense) for event in self.events]

    def at(self, chunk: int) -> int:
        """The event that a chunk belongs to."""
        return next(i for i, event in enumerate(self.events) if event.start <= chunk < event.end)


@dataclass(frozen=True)
class Kinds:
    """Of what kinds the objects and the sounds of a set are."""

    seen: tuple[Kind, ...]
    heard: tuple[Kind, ...]


def _pairs(first: Sequence[str], second: Sequence[str], held_out: bool | None) -> tuple[Kind, ...]:
    """All pairs, or those whose places differ by 2 (or not): of every value as many, so that values stay balanced."""
    return tuple(
        (a, b)
        for i, a in enumerate(first)
        for j, b in enumerate(second)
        if held_out is None or ((j - i) % len(second) == 2) == held_out
    )


def _kinds(held_out: bool | None) -> Kinds:
    return Kinds(_pairs(COLOURS, SHAPES, held_out), _pairs(PITCHES, INSTRUMENTS, held_out))


ALL, LEARNED, HELD_OUT = _kinds(None), _kinds(False), _kinds(True)
"""12 of 16 kinds each are learned from; 4 are held out. Every colour, shape, pitch and instrument is learned."""


def draw_world(generator: random.Random, chunks: int, events: int, kinds: Kinds = LEARNED) -> World:
    """Draw a clip of T chunks. What is seen, what is heard and when it changes are independent of each other.

    Kinds of a clip are drawn from a palette of 8, each as likely but for the one before; all other properties
    uniformly. Borders are any `events - 1` of the chunks'.
    """
    borders = [0, *sorted(generator.sample(range(1, chunks), events - 1)), chunks]
    seen = [
        Picture(*kind, generator.choice(DIRECTIONS), _places(generator))
        for kind in _walk(generator, kinds.seen, events)
    ]
    heard = [Sound(*kind, generator.choice(RHYTHMS)) for kind in _walk(generator, kinds.heard, events)]
    return World(tuple(map(Event, borders, borders[1:], seen, heard)))


def _walk(generator: random.Random, kinds: Sequence[Kind], length: int) -> list[Kind]:
    palette = generator.sample(kinds, PALETTE)
    walk = [generator.choice(palette)]
    while len(walk) < length:
        walk.append(generator.choice([kind for kind in palette if kind != walk[-1]]))
    return walk


def _places(generator: random.Random) -> tuple[str, ...]:
    drawn = generator.sample(PLACES, generator.randint(1, len(PLACES)))
    return tuple(sorted(drawn, key=PLACES.index))
