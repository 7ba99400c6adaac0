"""How well a set can be answered without watching, without listening, and without both.

Who is told one track of a clip only (and when events change, which either track shows) knows exactly how likely each
answer is, since the tracks are drawn independently: `belief`. Its floor is what the likeliest answer scores on the set;
where several are as likely, its share of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from .questions import Ask, Question, answer, find
from .spec import PALETTE, World

FLOORS = ("majority", "question", "video", "sound")


def floors(worlds: Sequence[World], questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """By type of question, and for "all": how many there are and which share of them is answered

    - majority: by the type's most common answer;
    - question: by the answer that is the most common for the wording and what it asks for (of two that are named, the
      first or the second);
    - video, sound: by the best that can be done with one track alone, see `belief`.
    """
    by_type: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_type[question.ask.type].append(question)
    out = {}
    for name, own in sorted(by_type.items()):
        wordings: dict[tuple[str, str, int], Counter[int]] = defaultdict(Counter)
        for question in own:
            wordings[question.ask.words, question.ask.noun, question.wording][question.key] += 1
        right = {
            "majority": max(Counter(question.answer for question in own).values()),
            "question": sum(max(keys.values()) for keys in wordings.values()),
            "video": sum(_score(question, worlds, "seen") for question in own),
            "sound": sum(_score(question, worlds, "heard") for question in own),
        }
        out[name] = {"count": len(own), **{floor: right[floor] / len(own) for floor in FLOORS}}
    if questions:
        total = {floor: sum(row["count"] * row[floor] for row in out.values()) / len(questions) for floor in FLOORS}
        out["all"] = {"count": len(questions), **total}
    return out


def belief(ask: Ask, world: World, told: str) -> list[float]:
    """How likely each choice is to one who is told what is "seen" in a clip, or what is "heard"; they sum to 1."""
    senses = {sense for sense, _ in ask.cues} | {ask.sense}
    if senses == {told}:
        key = answer(ask, world)
        return [float(choice == key) for choice in range(len(ask.choices))]
    count = len(world.events)
    weights = [0.0] * len(ask.choices)
    if told in senses and ask.noun == "order":  # the cue that is known comes first or second in the question
        place = next(i for i, (sense, _) in enumerate(ask.cues) if sense == told)
        known = find(world, *ask.cues[place], "first")
        assert known is not None
        for event, likely in enumerate(when(count, "first")):
            if event != known:
                weights[int((known > event) == (place == 0))] += likely
    elif told == ask.sense:
        for event, likely in enumerate(when(count, ask.side)):
            weights[ask.choices.index(getattr(world.track(told)[event], ask.noun))] += likely
    else:
        weights = [1.0] * len(ask.choices)
    return [weight / sum(weights) for weight in weights]


def when(events: int, side: str) -> list[float]:
    """How likely each event is the first (or the last) with some kind that does come, for one who knows no more.

    A walk over K = 8 kinds that never stays is as likely at each of them at every step, and avoids one for j steps on
    from it with ((K - 2) / (K - 1))^(j - 1), forwards as backwards.
    """
    stay_away = (PALETTE - 2) / (PALETTE - 1)
    weights = [1.0, *(stay_away**before for before in range(events - 1))]
    weights = [weight / sum(weights) for weight in weights]
    return weights if side == "first" else weights[::-1]


def _score(question: Question, worlds: Sequence[World], told: str) -> float:
    """The chance to be right: the share that the true answer has of the likeliest ones."""
    beliefs = belief(question.ask, worlds[question.clip], told)
    best = [choice for choice, likely in enumerate(beliefs) if likely > max(beliefs) - 1e-9]
    return (question.key in best) / len(best)
