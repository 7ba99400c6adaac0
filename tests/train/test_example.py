"""The generated set shows and sounds what its answers say."""

import pytest
import torch

import mirasol
from mirasol.data import Example, read_table
from mirasol.data.example import BELL, COLOURS, PITCHES, SIZE, write_example


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp("set") / "set", clips=10, seed=1)


def seen_and_heard(clip: str) -> dict[str, str]:
    """The answers to all questions, by measuring the pixels and the spectrum of the decoded file."""
    loaded = mirasol.load(clip, chunks=3, frames_per_chunk=10, size=SIZE, samples_per_chunk=12800, sample_rate=16000)
    frames, sounds = loaded.video.float(), loaded.audio.view(3, -1)[:, 1000:9000]

    def square(index: int) -> tuple[str, torch.Tensor]:
        lit = (frames[:, index] - 40).abs().sum(0) > 100
        mean = frames[:, index][:, lit].mean(1)
        colour = min(COLOURS, key=lambda name: (torch.tensor(COLOURS[name]) - mean).square().sum().item())
        return colour, lit.nonzero().float().mean(0)

    (first, before), (last, after) = square(1), square(28)
    down, right = (after - before).tolist()
    way = ("right" if right > 0 else "left") if abs(right) > abs(down) else ("down" if down > 0 else "up")
    pitches = torch.fft.rfft(sounds).abs().argmax(1) * 16000 / sounds.shape[1]
    names = {**PITCHES, "bell": BELL}
    heard = [min(names, key=lambda name: abs(names[name] - pitch.item())) for pitch in pitches]
    bell = heard.index("bell")
    answers = {
        "Which way does the square move?": way,
        "What colour is the square at first?": first,
        "What sounded first?": heard[0],
        "What colour was the square when the bell sounded?": first if bell == 0 else last,
    }
    if bell > 0:
        answers["What sounded before the bell?"] = heard[bell - 1]
    if bell < 2:
        answers["What sounded after the bell?"] = heard[bell + 1]
    return answers


def test_every_answer_is_what_the_clip_shows_and_sounds(folder):
    answers = {}
    for file in ("questions.csv", "questions-test.csv"):
        for example in read_table(folder / file):
            if example.clip not in answers:
                answers[example.clip] = seen_and_heard(example.clip)
            assert answers[example.clip][example.question] == example.answer, example
    assert len(answers) == 10


def test_the_test_asks_of_other_clips_and_no_question_gives_its_answer_away(folder):
    learned, tested = read_table(folder / "questions.csv"), read_table(folder / "questions-test.csv")
    assert len({e.clip for e in learned}) == 8
    assert len({e.clip for e in tested}) == 2
    assert not {e.clip for e in learned} & {e.clip for e in tested}
    assert {e.type for e in learned} == {"picture", "sound", "order", "both"}
    answers: dict[str, set[str | None]] = {}
    for example in learned + tested:
        answers.setdefault(example.question, set()).add(example.answer)
    assert all(len(found) >= 3 for found in answers.values()), answers


def test_a_seed_gives_one_set_and_other_files_are_left_alone(folder, tmp_path):
    again = write_example(tmp_path / "again", clips=10, seed=1)
    other = write_example(tmp_path / "other", clips=10, seed=2)
    for file in ("questions.csv", "clips/0003.mp4"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()
    assert (other / "questions.csv").read_bytes() != (folder / "questions.csv").read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"was '.*mine' with 'thesis.txt'"):
        write_example(tmp_path / "mine")
    with pytest.raises(ValueError, match="clips must be at least 5, was 2"):
        write_example(tmp_path / "few", clips=2)
    assert isinstance(read_table(again / "questions.csv")[0], Example)
