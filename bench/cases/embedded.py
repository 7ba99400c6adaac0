"""The model that comes with the package, asked again about clips that are drawn anew: files, read as anybody's are."""

from __future__ import annotations

import random
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from core.harness import one_line
from core.rows import Case, Row, Settings
from report.console import Table
from report.tables import percent

SUITE = "embedded"
CLIPS, QUICK, TOGETHER = 200, 10, 20
SEED = 9_000_000
"""Of the clips: far from those that the study draws."""
PER_TYPE = 0.5
DEVIATIONS = 4
"""Standard deviations that a share may lie below the card's before it counts as a failure."""


def cases(settings: Settings) -> list[Case]:
    clips = QUICK if settings.effort == "quick" else CLIPS
    return [Case(f"{clips} new clips", partial(_ask, clips))]


def _ask(clips: int, settings: Settings) -> list[Row]:
    """Answers to questions about new clips of the world that the model has learned, by type."""
    case = f"{clips} new clips"
    try:
        right, floors, seconds = _measured(clips, str(settings.device))
    except ImportError as error:
        return [Row(SUITE, case, "all", status="SKIP", reason=one_line(error))]
    promised = card_share()
    rows = []
    for kind, (good, count) in right.items():
        guessed = max(floors[kind]["majority"], floors[kind]["question"])
        detail: dict[str, Any] = dict(right=good, count=count, share=good / count, guessed=guessed)
        rows.append(Row(SUITE, case, kind, mode="count", role="ours", device=str(settings.device), detail=detail))
    whole = rows[-1]
    whole.detail |= dict(card=promised, seconds=round(seconds, 1))
    least = promised - DEVIATIONS * (promised * (1 - promised) / whole.detail["count"]) ** 0.5
    if whole.detail["share"] < least:
        said = f"{whole.detail['share']:.1%} right, the card says {promised:.1%}"
        whole.status, whole.reason = "FAIL", said
    return rows


def _measured(clips: int, device: str) -> tuple[dict[str, tuple[int, int]], dict[str, dict[str, float]], float]:
    """By type of question, "all" last: how many answers are exactly right, of how many; the floors; seconds taken."""
    from mirasol import EMBEDDED
    from mirasol.data import Example, collate, load_clip
    from mirasol.data.worlds import floors
    from mirasol.data.worlds.questions import Question, asks, choose
    from mirasol.data.worlds.spec import LEARNED, draw_world
    from mirasol.data.worlds.write import write_clip
    from mirasol.embedded import learned_world
    from mirasol.evaluation.answer import Answerer
    from mirasol.evaluation.options import AnswerOptions

    began = time.perf_counter()
    world, answerer = learned_world(EMBEDDED), Answerer(EMBEDDED, AnswerOptions(device=device, max_new_tokens=8))
    generator = random.Random(SEED)
    worlds = [draw_world(generator, world["chunks"], world["events"]) for _ in range(clips)]
    pools = [[(ask, key) for ask, key in asks(one, LEARNED) if ask.type in world["types"]] for one in worlds]
    questions = choose(pools, PER_TYPE, generator)
    right: dict[str, list[bool]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        for first in range(0, clips, TOGETHER):
            read = []
            for one in worlds[first : first + TOGETHER]:
                write_clip(file, one, world["look"])
                read.append(load_clip(Example(str(file)), answerer.model.config, answerer.max_chunks))
            own: list[Question] = [question for question in questions if first <= question.clip < first + TOGETHER]
            rows = [question.clip - first for question in own]
            said = answerer.generate(answerer.encode(collate(read)), [question.text for question in own], rows)
            for question, answer in zip(own, said, strict=True):
                right.setdefault(question.ask.type, []).append(answer == question.answer)
    counted = {kind: (sum(values), len(values)) for kind, values in sorted(right.items())}
    counted["all"] = (sum(good for good, _ in counted.values()), sum(count for _, count in counted.values()))
    return counted, floors(worlds, questions), time.perf_counter() - began


def card_share() -> float:
    """Which share of answers is right, by the model's card."""
    from mirasol import EMBEDDED

    found = re.search(r"it answers\s+([\d.]+) % right", (EMBEDDED / "README.md").read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"the card in {EMBEDDED} does not say how many answers are right")
    return float(found[1]) / 100


def tables(rows: list[Row]) -> list[Table]:
    lines = [
        [row.impl, str(row.detail["count"]), percent(100 * row.detail["share"]), percent(100 * row.detail["guessed"])]
        for row in rows
        if row.detail
    ]
    title = f"The model in the package on {rows[0].case}"
    notes = [f"its card says {percent(100 * rows[-1].detail['card'])}"] if lines else [rows[0].reason]
    return [Table(title, ["question", "asked", "right", "can be guessed"], lines, notes=notes)]


def headline(rows: list[Row]) -> str:
    whole = next((row for row in rows if row.impl == "all" and row.detail), None)
    if whole is None:
        return ""
    share, count = percent(100 * whole.detail["share"]), whole.detail["count"]
    return f"The model in the package answers {share} of {count} questions right"
