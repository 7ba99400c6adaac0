"""All questions that a clip can be asked, and which of them a set asks so that no answer is likelier than another."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product

from .spec import ALL, VALUES, Kind, Kinds, World
from .wordings import WORDINGS

SIDES = ("first", "last")
YES_NO = ("no", "yes")
ASKED = {"seen": ("colour", "shape", "direction"), "heard": ("pitch", "instrument", "rhythm")}
"""What is asked of an event that is told by its time, or by what else is sensed meanwhile."""
OWN = {
    "where": ("seen", "place"), "which-way": ("seen", "direction"), "how-many": ("seen", "number"),
    "what-rhythm": ("heard", "rhythm"),
}  # fmt: skip
"""What is asked of an object or a sound that is named."""


@dataclass(frozen=True)
class Ask:
    """A question before it is worded.

    Attributes:
        type: the type of the question, as the table tells it.
        words: its key in `WORDINGS`.
        sense: "seen" or "heard": the track that is asked about.
        noun: the property that is asked for; "order", "presence" or "absence".
        choices: all answers, each as likely as the others.
        side: "first" or "last", where it is about such an event.
        ago: chunks back from the last one.
        cues: the kinds that it names, each with the track that they are of.
    """

    type: str
    words: str
    sense: str
    noun: str
    choices: tuple[str, ...]
    side: str = ""
    ago: int = 0
    cues: tuple[tuple[str, Kind], ...] = ()

    def text(self, wording: int) -> str:
        """The question in one of the wordings of its list."""
        thing = {"seen": "object", "heard": "sound"}[self.sense]
        words = {"noun": self.noun, "side": self.side, "thing": thing, "sensed": self.sense}
        words["ago"] = f"{self.ago} chunk{'s' * (self.ago > 1)}"
        for name, (sense, kind) in zip(("cue", "other"), self.cues, strict=False):
            words |= {name: " ".join(kind), f"{name}_sensed": sense}
        return WORDINGS[self.words][wording].format(**words)


def find(world: World, sense: str, kind: Kind, side: str) -> int | None:
    """The first or the last event with such an object or sound; None where there is none."""
    found = [i for i, thing in enumerate(world.track(sense)) if thing.kind == kind]
    return (found[0] if side == "first" else found[-1]) if found else None


def moment(ask: Ask, world: World) -> int | None:
    """The event that a question for a property is about."""
    if ask.cues:
        return find(world, *ask.cues[0], ask.side)
    if ask.ago:
        return world.at(world.chunks - 1 - ask.ago)
    return 0 if ask.side == "first" else len(world.events) - 1


def answer(ask: Ask, world: World) -> int | None:
    """Which of the choices is true of a clip; None where the question makes no sense."""
    if ask.noun in ("presence", "absence"):
        return int((find(world, *ask.cues[0], "first") is not None) == (ask.noun == "presence"))
    if ask.noun == "order":
        one, other = (find(world, *cue, "first") for cue in ask.cues)
        return None if one is None or other is None or one == other else int(one > other)
    event = moment(ask, world)
    value = None if event is None else getattr(world.track(ask.sense)[event], ask.noun)
    return None if value is None else ask.choices.index(value)


def asks(world: World, kinds: Kinds, about: Kinds = ALL) -> Iterator[tuple[Ask, int]]:
    """All questions that make sense for a clip, each with the place of its answer among the choices.

    Args:
        kinds: that the clip was drawn from; others are not named.
        about: a question is about one of these kinds: it names one, or asks for what has one where it names none.
    """
    for ask in _possible(world, kinds):
        event = moment(ask, world) if not ask.cues else None
        told = ask.cues if event is None else ((ask.sense, world.track(ask.sense)[event].kind),)
        key = answer(ask, world)
        if key is not None and any(kind in getattr(about, sense) for sense, kind in told):
            yield ask, key


def _possible(world: World, kinds: Kinds) -> Iterator[Ask]:
    named = {sense: sorted({thing.kind for thing in world.track(sense)}) for sense in ASKED}
    for sense, nouns in ASKED.items():
        other = "heard" if sense == "seen" else "seen"
        for noun in nouns:
            values = VALUES[noun]
            for side in SIDES:
                yield Ask(f"what-{sense}", "what", sense, noun, values, side)
                for kind in named[other]:
                    yield Ask(f"{sense}-while-{other}", "while", sense, noun, values, side, cues=((other, kind),))
            for ago in range(1, world.chunks):
                yield Ask(f"{sense}-ago-{how_far(ago)}", "ago", sense, noun, values, ago=ago)
        for one, two in permutations(named[sense], 2):
            choices = (" ".join(one), " ".join(two))
            yield Ask(f"order-{sense}", "order", sense, "order", choices, cues=((sense, one), (sense, two)))
        for kind in getattr(kinds, sense):
            for noun in ("presence", "absence"):
                yield Ask(f"ever-{sense}", noun, sense, noun, YES_NO, cues=((sense, kind),))
    for name, (sense, noun) in OWN.items():
        for kind, side in product(named[sense], SIDES):
            yield Ask(name, name, sense, noun, VALUES[noun], side, cues=((sense, kind),))
    for one, two in product(named["seen"], named["heard"]):
        choices = ("before", "after")
        yield Ask("order-both", "order-both", "seen", "order", choices, cues=(("seen", one), ("heard", two)))


def how_far(ago: int) -> str:
    """The range that so many chunks are in, 1, 2-3, 4-7, 8-15, ...: memory is measured by how far it reaches."""
    first = 1 << (ago.bit_length() - 1)
    return f"{first}-{2 * first - 1}" if first > 1 else "1"


@dataclass(frozen=True)
class Question:
    """A question that a set asks: about which of its clips, in which wording, and the place of its answer."""

    clip: int
    ask: Ask
    wording: int
    key: int

    @property
    def text(self) -> str:
        return self.ask.text(self.wording)

    @property
    def answer(self) -> str:
        return self.ask.choices[self.key]

    def new_words(self) -> Question:
        """The same question in the wording that is held out."""
        return Question(self.clip, self.ask, len(WORDINGS[self.ask.words]) - 1, self.key)


def choose(pools: Sequence[Iterable[tuple[Ask, int]]], per_type: float, generator: random.Random) -> list[Question]:
    """Choose among the questions of all clips as many of each answer.

    Of one property asked for by one type of question, all answers come equally often in each wording that is learned.
    Whether a question is kept depends on its answer alone, so that nothing else tells the answer. An answer that no
    clip gives has none.

    Args:
        pools: of each clip the questions that can be asked, as `asks` gives them.
        per_type: questions of each type, per clip, as near as balance allows.
    """
    found: dict[str, dict[str, dict[int, list[tuple[int, Ask]]]]]
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for clip, pool in enumerate(pools):
        for ask, key in pool:
            found[ask.type][ask.noun][key].append((clip, ask))
    chosen = []
    for nouns in found.values():
        for answers in nouns.values():
            wanted = math.ceil(per_type * len(pools) / len(nouns) / len(answers))
            count = min(wanted, *map(len, answers.values()))
            for key, candidates in answers.items():
                for place, (clip, ask) in enumerate(generator.sample(candidates, count)):
                    chosen.append(Question(clip, ask, place % (len(WORDINGS[ask.words]) - 1), key))
    generator.shuffle(chosen)
    return sorted(chosen, key=lambda question: question.clip)
