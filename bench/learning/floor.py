"""What can be answered by who has seen and heard the last chunk only, and knows nothing of when that began."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from mirasol.data.worlds.questions import Question
from mirasol.data.worlds.spec import World


def last_chunk(worlds: Sequence[World], questions: Sequence[Question]) -> dict[str, list[float]]:
    """By type of question, and for "all": how many answers are right where what the last chunk shows is always said,
    and of how many.

    Of two things, what it shows came last; a question about neither is a coin's toss. Questions of other families than
    "what", "ago" and "order" do not count.
    """
    right: dict[str, list[float]] = defaultdict(list)
    for question in questions:
        share = _right(worlds[question.clip], question)
        if share is not None:
            right[question.ask.type].append(share)
            right["all"].append(share)
    return {kind: [sum(shares), len(shares)] for kind, shares in right.items()}


def _right(world: World, question: Question) -> float | None:
    ask = question.ask
    if ask.words in ("what", "ago"):
        shown = getattr(world.track(ask.sense)[-1], ask.noun)
        return float(shown == question.answer)
    if ask.words != "order":
        return None
    shown = world.track(ask.sense)[-1].kind
    named = [kind for _, kind in ask.cues]
    return float(question.key != named.index(shown)) if shown in named else 0.5
