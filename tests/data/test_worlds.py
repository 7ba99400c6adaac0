"""The generated set: its files show what its tables say, nothing tells an answer but what must, floors are exact."""

import json
import random
import re
from collections import Counter, defaultdict
from itertools import pairwise, product

import pytest
from worlds_reader import read_world

from mirasol.__main__ import main
from mirasol.config import Config
from mirasol.data import read_table
from mirasol.data.worlds import TABLES, Look, floors, write_world, write_worlds
from mirasol.data.worlds.floors import belief, when
from mirasol.data.worlds.questions import Ask, answer
from mirasol.data.worlds.spec import (
    ALL,
    HELD_OUT,
    LEARNED,
    PALETTE,
    RHYTHMS,
    VALUES,
    Event,
    Picture,
    Sound,
    World,
    draw_world,
)  # fmt: skip
from mirasol.data.worlds.wordings import WORDINGS
from mirasol.data.worlds.write import draw_set, render, write_clip

LEARN, TEST, HELD, WORDS = TABLES


@pytest.fixture(scope="module")
def drawn():
    """What happens in 150 clips of 16 chunks, and their questions."""
    return draw_set(150, 3, chunks=16, events=8, per_type=2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("worlds") / "set"
    write_worlds(path, clips=10, seed=1, chunks=8)
    return path


def test_every_answer_is_read_from_the_files_alone(folder):
    worlds, tables = draw_set(10, 1, chunks=8, events=4, per_type=1.0)
    read = [read_world(folder / f"clips/{index:05d}.mp4", 8, Look()) for index in range(10)]
    right = asked = 0
    for file, questions in tables.items():
        rows = read_table(folder / file)
        for row, question in zip(rows, questions, strict=True):
            assert (row.question, row.type) == (question.text, question.ask.type)
            found = answer(question.ask, read[question.clip])
            asked, right = asked + 1, right + (found is not None and question.ask.choices[found] == row.answer)
    assert asked > 400
    assert right >= 0.99 * asked
    assert read == worlds


def test_long_clips_and_the_chunks_of_larger_models_are_as_legible(tmp_path):
    assert Look.of(Config.preset("tiny")) == Look()
    world = draw_world(random.Random(1), 64, 32, ALL)
    write_clip(tmp_path / "long.mp4", world, Look())
    assert read_world(tmp_path / "long.mp4", 64, Look()) == world
    look = Look.of(Config.preset("small"))
    assert (look.seconds_per_chunk, look.frames_per_chunk, look.size) == (1.92, 8, 112)
    world = draw_world(random.Random(0), 6, 6, ALL)
    write_clip(tmp_path / "clip.mp4", world, look)
    assert read_world(tmp_path / "clip.mp4", 6, look) == world


def naive(kind: str, text: str, world: World) -> str:
    """An answer from the words of a question and what each chunk holds."""
    chunks = {
        sense: [getattr(event, sense) for event in world.events for _ in range(event.start, event.end)]
        for sense in ("seen", "heard")
    }
    places = {
        (sense, pair): text.index(" ".join(pair))
        for sense in chunks
        for pair in getattr(ALL, sense)
        if " ".join(pair) in text
    }
    named = sorted(places, key=places.get)
    when = [[t for t, thing in enumerate(chunks[sense]) if thing.kind == pair] for sense, pair in named]
    if kind.startswith("ever"):
        return "yes" if bool(when[0]) != bool(re.search(" no | never | without ", text)) else "no"
    if kind == "order-both":
        seen, heard = (when[[sense for sense, _ in named].index(track)][0] for track in chunks)
        return "before" if seen < heard else "after"
    if kind.startswith("order"):
        return " ".join(named[0 if when[0][0] < when[1][0] else 1][1])
    if "-ago-" in kind:
        time = world.chunks - 1 - int(re.search(r"(\d+) chunks?\b", text)[1])
    else:
        end = 0 if "first" in text else -1
        assert ("first" in text) != ("last" in text)
        time = when[0][end] if named else range(world.chunks)[end]
    own = {"where": "place", "which-way": "direction", "how-many": "number", "what-rhythm": "rhythm"}
    noun = own.get(kind) or next(noun for noun in VALUES if re.search(rf"\b{noun}\b", text))
    return getattr(chunks["heard" if noun in ("pitch", "instrument", "rhythm") else "seen"][time], noun)


@pytest.mark.parametrize("chunks", [4, 16, 64, 100])
def test_answers_follow_from_the_words_and_what_each_chunk_holds(chunks):
    worlds, tables = draw_set(20, chunks, chunks=chunks, events=chunks // 2, per_type=1.0)
    ago = set()
    for questions in tables.values():
        for question in questions:
            assert question.answer == naive(question.ask.type, question.text, worlds[question.clip]), question.text
            ago.add(question.ask.ago)
            if question.ask.ago > 1:
                first, last = map(int, question.ask.type.split("-")[2:])
                assert first <= question.ask.ago <= last
    assert max(ago) > chunks * 0.9 - 2


def test_in_each_learned_wording_every_answer_comes_as_often(drawn):
    tables = drawn[1]
    for file in (LEARN, TEST, HELD):
        counts: dict[tuple, Counter] = defaultdict(Counter)
        for question in tables[file]:
            ask = question.ask
            counts[ask.type, ask.words, ask.noun, len(ask.choices), question.wording][question.key] += 1
        assert {key[1] for key in counts} == set(WORDINGS)
        for (*_, choices, _), keys in counts.items():
            assert (
                len(keys) == choices or file == HELD
            )  # 30 clips, a quarter of their kinds: some answer may be missing
            assert len(set(keys.values())) == 1, keys
    found = Counter(question.ask.type for question in tables[LEARN])
    assert min(found.values()) >= 150  # of 90 clips, 2 each; an answer that is rare bounds a type
    assert len(found) == 13 + 2 * 4
    assert len(set(tables[LEARN])) == len(tables[LEARN])


def test_nothing_that_a_question_names_tells_its_answer():
    """Chi-squared of answers by what is named, for each property that a type asks for: 5 standard deviations."""
    _, tables = draw_set(500, 0, chunks=8, events=4, per_type=12.0)
    counts: dict[tuple, Counter] = defaultdict(Counter)
    for question in tables[LEARN]:
        ask = question.ask
        if ask.side != "last":  # often the first as well
            about = [(sense, place, value) for sense, kind in ask.cues for place, value in enumerate(kind)]
            for named in (*ask.cues, *about, ask.ago):
                counts[ask.type, ask.noun, len(ask.choices)][named, question.key] += 1
    assert len(counts) > 30
    for (kind, noun, choices), found in counts.items():
        named = {named for named, _ in found}
        excess = degrees = 0.0
        for own in ([found[name, key] for key in range(choices)] for name in named):
            expected = sum(own) / choices
            excess += sum((count - expected) ** 2 / expected for count in own)
            degrees += choices - 1
        assert excess < degrees + 5 * (2 * degrees) ** 0.5, (kind, noun, excess, degrees)


def test_held_out_kinds_and_wordings_are_never_learned(drawn):
    worlds, tables = drawn
    held = [" ".join(kind) for kinds in (HELD_OUT.seen, HELD_OUT.heard) for kind in kinds]
    assert len(held) == 8
    for sense, first, second in (("seen", "colour", "shape"), ("heard", "pitch", "instrument")):
        learned = set(getattr(LEARNED, sense))
        assert len(learned) == 12
        assert not learned & set(getattr(HELD_OUT, sense))
        assert ({a for a, _ in learned}, {b for _, b in learned}) == (set(VALUES[first]), set(VALUES[second]))
    for file in (LEARN, TEST):
        for question in tables[file]:
            assert not any(name in question.text for name in held)
            world = worlds[question.clip]
            assert {thing.kind for thing in world.track("seen")} <= set(LEARNED.seen)
            assert {thing.kind for thing in world.track("heard")} <= set(LEARNED.heard)
    for question in tables[HELD]:
        world, ask = worlds[question.clip], question.ask
        time = world.at(world.chunks - 1 - ask.ago) if ask.ago else 0 if ask.side == "first" else -1
        about = " ".join(world.track(ask.sense)[time].kind)
        assert any(name in (question.text if ask.cues else about) for name in held)
    clips = [{question.clip for question in tables[file]} for file in (LEARN, TEST, HELD)]
    assert [len(own) for own in clips] == [90, 30, 30]
    assert len(set.union(*clips)) == 150

    def pattern(wording: str) -> str:
        return re.sub(r"\\{\w+\\}", ".+", re.escape(wording))

    new = re.compile("|".join(pattern(wordings[-1]) for wordings in WORDINGS.values()))
    assert not [
        question.text for file in (LEARN, TEST, HELD) for question in tables[file] if new.fullmatch(question.text)
    ]
    for old, question in zip(tables[TEST], tables[WORDS], strict=True):
        assert new.fullmatch(question.text)
        assert (question.clip, question.ask, question.answer) == (old.clip, old.ask, old.answer)


def walks(length: int) -> list[tuple[int, ...]]:
    """All ways through the kinds of a palette in which neighbours differ: each is as likely."""
    return [w for w in product(range(PALETTE), repeat=length) if all(a != b for a, b in pairwise(w))]


@pytest.mark.parametrize("side", ["first", "last"])
def test_when_something_comes_is_as_likely_as_counted(side):
    found = [i for w in walks(4) if (i := (w if side == "first" else w[::-1]).index(0) if 0 in w else None) is not None]
    times = Counter(found if side == "first" else [3 - i for i in found])
    assert when(4, side) == pytest.approx([times[i] / len(found) for i in range(4)])


def test_beliefs_are_what_counting_all_clips_gives():
    """Of all clips with what is told in one track, those that the question can be asked of, counted by its answer."""
    kinds = {"seen": LEARNED.seen[:PALETTE], "heard": LEARNED.heard[:PALETTE]}

    def clip(seen, heard) -> World:
        pictures = [Picture(*kinds["seen"][i], "left", ("top left",)) for i in seen]
        sounds = [Sound(*kinds["heard"][i], RHYTHMS[t % 3]) for t, i in enumerate(heard)]
        return World(tuple(Event(t, t + 1, *both) for t, both in enumerate(zip(pictures, sounds, strict=True))))

    shown, sounded = (0, 5, 0, 1), (2, 6, 2, 7)
    seen, heard = ("seen", kinds["seen"][0]), ("heard", kinds["heard"][2])
    cases = [
        Ask("", "while", "heard", noun, VALUES[noun], side, cues=(seen,))
        for noun in ("pitch", "instrument", "rhythm")
        for side in ("first", "last")
    ]
    cases.append(Ask("", "order-both", "seen", "order", ("before", "after"), cues=(seen, heard)))
    for ask in cases:
        counted = Counter(answer(ask, clip(walk, sounded)) for walk in walks(4))
        del counted[None]
        expected = [counted[key] / counted.total() for key in range(len(ask.choices))]
        assert belief(ask, clip(shown, sounded), "heard") == pytest.approx(expected), ask
    counted = Counter(answer(cases[-1], clip(shown, walk)) for walk in walks(4))
    expected = [counted[key] / (counted[0] + counted[1]) for key in range(2)]
    assert belief(cases[-1], clip(shown, sounded), "seen") == pytest.approx(expected)
    # The sounds of 4 events among 12 kinds, of which 8 come in a clip: none is likelier, whatever is seen
    assert belief(cases[0], clip(shown, sounded), "seen") == [0.25] * 4


def test_floors_are_known_and_reached_by_nobody_who_is_told_less(drawn):
    worlds, tables = drawn
    found = floors(worlds, tables[LEARN])
    for name, row in found.items():
        if name == "all":
            continue
        own = [question for question in tables[LEARN] if question.ask.type == name]
        chance = sum(1 / len(question.ask.choices) for question in own) / len(own)
        assert row["question"] == pytest.approx(chance)
        assert row["majority"] <= chance + 1e-9
        for track, sense in (("video", "seen"), ("sound", "heard")):
            mean = sum(max(belief(question.ask, worlds[question.clip], sense)) for question in own) / len(own)
            assert abs(row[track] - mean) < 4 * (mean * (1 - mean) / len(own)) ** 0.5 + 1e-9  # beliefs are calibrated
            if name.endswith(sense) or f"{sense}-ago" in name:
                assert row[track] == 1.0 or "while" in name
    for name, track in (("heard-while-seen", "sound"), ("seen-while-heard", "video")):
        assert 0.25 < found[name][track] < 0.6
    for name in ("where", "which-way", "how-many"):
        assert (found[name]["video"], found[name]["sound"]) == (1.0, 0.25)
    assert found["all"]["count"] == len(tables[LEARN])


def test_a_seed_gives_one_set_and_other_files_are_left_alone(folder, tmp_path):
    write_worlds(tmp_path / "again", clips=10, seed=1, chunks=8)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(names) == 10 + 5
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    write_worlds(tmp_path / "again", clips=10, seed=2, chunks=8)
    assert (folder / LEARN).read_bytes() != (tmp_path / "again" / LEARN).read_bytes()
    told = json.loads((folder / "worlds.json").read_text())
    assert (told["seed"], told["chunks"], told["events"], told["frames_per_chunk"]) == (1, 8, 4, 4)
    assert set(told["floors"]) == set(TABLES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"was '.*mine' with 'thesis.txt'"):
        write_worlds(tmp_path / "mine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(clips=4), "clips must be at least 5, was 4"),
        (dict(seed=-1), "seed must be at least 0, was -1"),
        (dict(chunks=3), "chunks must be at least 4, was 3"),
        (dict(events=1), "events must be at least 2, was 1"),
        (dict(chunks=8, events=9), "events must be at most chunks = 8, was 9"),
        (dict(per_type=0), "per_type must be above 0, was 0"),
    ],
)
def test_arguments_that_cannot_be_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        write_worlds(tmp_path / "set", **arguments)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(seconds_per_chunk=0.1), "seconds_per_chunk must be at least 0.16, was 0.1"),
        (dict(frames_per_chunk=1), "frames_per_chunk must be at least 2, was 1"),
        (dict(size=31), "size must be at least 32, was 31"),
        (dict(size=33), "size must be even, was 33"),
        (dict(sample_rate=8000), "sample_rate must be at least 16000, was 8000"),
        (dict(seconds_per_chunk=0.2000625, frames_per_chunk=5), "seconds_per_chunk must make a frame a multiple"),
    ],
)
def test_looks_that_cannot_be_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Look(**arguments)


def test_the_commands_write_a_set_and_a_clip(tmp_path, capsys):
    assert main(["worlds", str(tmp_path / "set"), "--clips", "5", "--chunks", "4", "--seed", "2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == [TEST, "questions", "majority", "question", "video", "sound"]
    assert lines[-2][:2] == ["all", str(len(read_table(tmp_path / "set" / TEST)))]
    told = json.loads((tmp_path / "set" / "worlds.json").read_text())["floors"][TEST]
    assert {line[0] for line in lines[1:-1]} == set(told)
    assert lines[-1] == [str(tmp_path / "set")]

    Config.preset("tiny").save(tmp_path / "config.json")
    assert main(["world", "--seed", "7", str(tmp_path / "clip.mp4"), "--chunks", "8", "--run", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()[1::2]
    again = write_world(tmp_path / "again.mp4", 7, chunks=8)
    assert printed == [f"    {answer}" for _, answer in again]
    assert (tmp_path / "clip.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()
    assert len(printed) == 13 + 2 * 3


def test_some_types_of_questions_only(tmp_path):
    types = ("what-seen", "heard-ago-2-3")
    write_worlds(tmp_path / "set", clips=10, chunks=8, types=types)
    for file in (LEARN, TEST, HELD):
        assert {row.type for row in read_table(tmp_path / "set" / file)} == set(types)
    assert json.loads((tmp_path / "set" / "worlds.json").read_text())["types"] == sorted(types)
    with pytest.raises(ValueError, match="types must name types of questions"):
        write_worlds(tmp_path / "none", clips=10, chunks=8, types=("what",))


def test_a_clip_in_memory_is_what_its_file_shows(tmp_path):
    import mirasol

    look, world = Look(size=64), draw_world(random.Random(3), 6, 3)
    pictures, sound = render(world, look)
    assert pictures.shape == (24, 64, 64, 3)
    assert sound.shape == (6 * 2560,)
    write_clip(tmp_path / "clip.mp4", world, look)
    rate = look.sample_rate
    read = mirasol.load(
        tmp_path / "clip.mp4", chunks=6, frames_per_chunk=4, size=64, samples_per_chunk=2560, sample_rate=rate
    )
    shown = read.video.permute(1, 2, 3, 0).numpy().astype(int)
    assert abs(shown - pictures).mean() < 10 < abs(shown - pictures[::-1]).mean()
    assert abs(read.audio.numpy() - sound).mean() < 0.05 < abs(read.audio.numpy() - sound[::-1]).mean()
