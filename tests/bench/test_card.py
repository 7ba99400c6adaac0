"""The card of the model in the package says what it was made from, how often it is right, and what it cannot do."""

import copy
import re
from pathlib import Path

import jinja2
import pytest

TEMPLATE = Path(__file__).resolve().parents[2] / "bench" / "learning" / "card.md.jinja"


def row(count: int, accuracy: float) -> dict[str, float]:
    return dict(count=count, accuracy=accuracy, majority=0.25, question=0.251, video=0.5, sound=0.301)


FIELDS = dict(
    name="mirasol-tiny-world",
    preset="tiny",
    combiner="ttm",
    commit="0123abc",
    parameters=812_345,
    bytes=3_288_784,
    data=dict(
        clips=4096,
        seed=11,
        questions=54_321,
        chunks=16,
        lengths=[4, 16],
        events=8,
        seconds_per_chunk=0.16,
        types=["where", "what-seen"],
        held_out_kinds=["red cross", "low bell"],
        settings="`python -m mirasol worlds set/ --clips 4096`",
    ),
    training=dict(steps=20_000, batch=32, seed=5, seconds=600.0, machine="one GPU", command="python bench/learn.py"),
    tables=dict(
        test={"where": row(300, 0.912), "what-seen": row(301, 0.873), "all": row(601, 0.892)},
        wordings={"where": row(302, 0.612), "all": row(302, 0.612)},
        held_out={"where": row(303, 0.512), "all": row(303, 0.512)},
    ),
    cannot=["It reads no text.", "It knows no real video."],
)


def render(**fields: object) -> str:
    settings = dict(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return jinja2.Environment(**settings).from_string(TEMPLATE.read_text(encoding="utf-8")).render(**fields)


def test_everything_that_the_study_tells_stands_on_the_card():
    card = render(**FIELDS)
    told = ["# mirasol-tiny-world", "`tiny`", "`ttm`", "812,345 parameters", "3.3 MB", "89.2 %", "commit 0123abc"]
    told += [
        "4,096 generated clips of 4, 16 chunks (0.16 s each) with up to 8 events, 54,321 questions",
        "where, what-seen",
    ]
    told += ["clips of 16 chunks with 8 events"]
    told += ["`python -m mirasol worlds set/ --clips 4096`, seed 11", "red cross, low bell"]
    told += ["20,000 steps of 32 clips, seed 5, 10 minutes on one GPU", "`python bench/learn.py`"]
    for text in [*told, *FIELDS["cannot"]]:
        assert text in card
    for rows in FIELDS["tables"].values():
        for type, told in rows.items():
            cells = [f"{100 * told[name]:.1f} %" for name in ("majority", "question", "video", "sound")]
            name = "**all**" if type == "all" else type
            line = f"| {name} | {told['count']} | **{100 * told['accuracy']:.1f} %** | {' | '.join(cells)} |"
            assert line in card.splitlines()
    for heading in ("What it has learned from", "How often it is right", "What it cannot do"):
        assert f"\n## {heading}\n" in card


def test_a_table_is_one_block_and_a_paragraph_stands_alone():
    card = render(**FIELDS)
    assert not re.search(r"\n\n\n", card)
    assert not re.search(r"[ \t]\n", card)
    for block in re.split(r"\n\n+", card.strip()):
        starts = {line.startswith("|") for line in block.splitlines()}
        assert len(starts) == 1, block
    assert card.count("|---|---|---|---|---|---|---|") == 3


@pytest.mark.parametrize("name", ["commit", "cannot", "data.seed", "tables.held_out", "training.machine"])
def test_what_is_missing_is_told(name):
    fields = copy.deepcopy(FIELDS)
    *outer, last = name.split(".")
    place = fields[outer[0]] if outer else fields
    del place[last]
    with pytest.raises(jinja2.UndefinedError, match=last):
        render(**fields)
