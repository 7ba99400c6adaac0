"""A visitor with a real stream: a clip, a recording, questions, stops and mistakes."""

import time

import pytest
import torch

import mirasol
from clips import write_clip
from mirasol.demo import view
from mirasol.demo.visitor import CAMERA, Visitor
from mirasol.tokenizer import ByteTokenizer

WINDOW, SINKS = 4, 2
CHUNKS, SECONDS = 10, 1.6


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return mirasol.Model.from_preset("tiny").eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "a.mp4", seconds=SECONDS, sound_seconds=SECONDS - 0.03)


@pytest.fixture
def visitor(model):
    def new_stream():
        return model.stream(tokenizer=ByteTokenizer(), memory=WINDOW, sinks=SINKS)

    visitor = Visitor(new_stream, WINDOW, SINKS, max_new_tokens=12)
    yield visitor
    visitor.stop()


def wait(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def test_a_clip_is_seen_at_its_pace_and_the_chunks_in_memory_are_told(visitor, clip):
    begun = time.monotonic()
    visitor.play(clip)
    wait(lambda: not visitor.running)
    assert visitor.failure == ""
    assert time.monotonic() - begun > SECONDS - 0.1
    assert visitor.stream.chunks == [CHUNKS]
    seen = list(range(SINKS)) + list(range(CHUNKS - WINDOW, CHUNKS))
    assert [report.chunk for report in visitor.reports] == seen
    *_, exchange = visitor.ask("Who?")
    assert sorted(exchange.attention) == seen, "what the strip shows is what the answer looks at"
    assert exchange.first_token > 0
    assert exchange.time == pytest.approx(SECONDS)
    assert visitor.seconds == pytest.approx(SECONDS)
    assert sum(cell.share for cell in view.cells(visitor)) == pytest.approx(1)


def test_questions_are_answered_while_the_stream_goes_on_each_about_its_moment(visitor, clip):
    with pytest.raises(ValueError, match="nothing to ask about yet"):
        next(visitor.ask("Who?"))
    visitor.play(clip)
    wait(lambda: len(visitor.reports) >= 1)
    early = visitor.ask("Who?")
    next(early)
    wait(lambda: not visitor.running)
    *_, exchange = early
    *_, later = visitor.ask("What?")
    assert max(exchange.attention) < max(later.attention) == CHUNKS - 1
    assert [asked.question for asked in visitor.exchanges] == ["Who?", "What?"]
    assert exchange.text == visitor.exchanges[0].text
    visitor.start_over()
    assert visitor.exchanges == visitor.reports == []
    assert visitor.stream.chunks == [0]


def test_what_a_browser_records_is_seen_as_it_comes(visitor, clip, tmp_path):
    recorded = write_clip(tmp_path / "a.webm", seconds=2.0, codec="libvpx", audio_codec="libopus", rate=48000)
    data = recorded.read_bytes()
    key = visitor.open_camera()
    assert visitor.key == key
    assert visitor.source == CAMERA
    for first in range(0, len(data), 4096):
        assert visitor.receive(data[first : first + 4096])
    wait(lambda: visitor.reports)
    assert not visitor.receive(b"", "the browser gave no camera")
    assert visitor.failure == "the browser gave no camera"
    assert visitor.key is None
    assert not visitor.running
    assert not visitor.receive(data)
    assert visitor.open_camera() != key
    assert visitor.failure == ""
    assert not visitor.receive(bytes(2**23)), "more than may wait"
    assert "takes longer" in visitor.failure


def test_a_clip_that_cannot_be_read_is_told_in_a_sentence(visitor, tmp_path, clip):
    wrong = tmp_path / "notes.mp4"
    wrong.write_text("no film")
    visitor.play(wrong)
    wait(lambda: not visitor.running)
    assert "notes.mp4" in visitor.failure
    assert "Watching ended" in view.status(visitor)
    visitor.play(clip)
    wait(lambda: visitor.reports)
    assert visitor.failure == ""
