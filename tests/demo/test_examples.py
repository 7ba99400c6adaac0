"""Clips that the page offers."""

import json

import pytest

from mirasol.data.worlds import Look, write_world
from mirasol.demo.examples import SEEDS, find_examples
from mirasol.demo.page import _suggested


@pytest.fixture
def run(tmp_path):
    """A folder that tells of a world; examples are made without its model."""
    world = dict(chunks=4, events=2, types=["what-heard", "what-seen"], look=dict(frames_per_chunk=2))
    (tmp_path / "world.json").write_text(json.dumps(world))
    return tmp_path


def test_clips_of_the_learned_world_are_made_with_questions_and_their_answers(run, tmp_path):
    found = find_examples(run, None)
    assert list(found) == [f"world-{seed}.mp4" for seed in SEEDS]
    for seed, offered in zip(SEEDS, found.values(), strict=True):
        again = tmp_path / offered.path.name
        questions = write_world(
            again, seed, chunks=4, events=2, types=["what-heard", "what-seen"], look=Look(frames_per_chunk=2)
        )
        assert offered.questions == tuple(questions)
        assert len(questions) == 2
        assert offered.path.read_bytes() == again.read_bytes()
    shown = _suggested(offered.questions)
    assert shown.choices == [(f"{question} ({answer})", question) for question, answer in questions]
    assert shown.visible


def test_a_folder_of_clips_comes_first_and_without_both_nothing_is_offered(run, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("b.MP4", "a.webm", "notes.txt"):
        (clips / name).touch()
    found = find_examples(run, clips)
    assert list(found) == ["a.webm", "b.MP4"]
    assert all(offered.path.is_absolute() and not offered.questions for offered in found.values())
    assert not _suggested(()).visible
    (run / "world.json").unlink()
    assert find_examples(run, None) == {}
