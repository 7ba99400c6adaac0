"""A session: what its source gives becomes what `push` of the same chunks gives, whatever is asked meanwhile."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

pytest.importorskip("av")

from clips import write_clip
from mirasol import ByteTokenizer, Model
from mirasol.media import load
from mirasol.media.live import Picture, Sound, open_live
from mirasol.streaming import Session


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Model.from_preset("tiny", combiner="ttm").eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("session") / "a.mkv", seconds=1.6, audio_codec="pcm_s16le")


def a_stream(model):
    return model.stream(tokenizer=ByteTokenizer(), memory=8)


def opened(model, file, **options):
    return open_live(file, size=model.config.image_size, sample_rate=model.config.sample_rate, **options)


def run(session: Session) -> None:
    session.start()
    session.join(60)
    assert not session.running
    if session.failure is not None:
        raise session.failure


def expect_same_state(stream, other) -> None:
    ours, theirs = stream.state_dict(), other.state_dict()
    names = [name for name in ours if not name.startswith("cutter.")]
    assert names == [name for name in theirs if not name.startswith("cutter.")]
    assert all(torch.equal(ours[name], theirs[name]) for name in names)


def test_a_session_is_push_of_what_load_gives(model, file):
    config, reports, stream, pushed = model.config, [], a_stream(model), a_stream(model)
    choices = ("a bell", "a horn", "rain")
    with opened(model, file) as live:
        run(Session(stream, live, question="What?", choices=choices, on_report=reports.append))
    shape = dict(frames_per_chunk=config.frames_per_chunk, samples_per_chunk=config.samples_per_chunk)
    clip = load(file, chunks=10, size=config.image_size, sample_rate=config.sample_rate, **shape)
    assert stream.chunks == [10]
    assert [report.chunk for report in reports] == list(range(10))
    for t, report in enumerate(reports):
        frames = slice(t * config.frames_per_chunk, (t + 1) * config.frames_per_chunk)
        samples = slice(t * config.samples_per_chunk, (t + 1) * config.samples_per_chunk)
        pushed.push(clip.video[None, :, frames], clip.audio[None, samples])
        expected = torch.tensor(pushed.score("What?", choices), dtype=torch.float64).softmax(0)
        assert list(report.scores) == list(choices)
        assert torch.tensor(list(report.scores.values()), dtype=torch.float64).equal(expected)
        assert report.start == pytest.approx(t * config.seconds_per_chunk)
        assert (report.video, report.audio, report.lag) == (True, True, 0.0)
        assert report.memory == stream.nbytes
        assert report.process_memory > 50 * 2**20
        assert 0 < report.seconds < 20
    expect_same_state(stream, pushed)


def test_questions_change_nothing_and_are_answered_meanwhile(model, file):
    stream, alone = a_stream(model), a_stream(model)
    texts, failures = [], []
    with opened(model, file) as live:
        session = Session(stream, live)
        with pytest.raises(ValueError, match="row must have seen a chunk"):
            session.ask("Already?")
        session.start()
        assert session.wait_for_chunk(60)

        def ask():
            try:
                texts.append(session.ask("What moves?", max_new_tokens=6).read())
            except Exception as failure:
                failures.append(failure)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in [*threads, session]:
            thread.join(60)
    assert not failures
    assert session.failure is None
    assert len(texts) == 3
    with opened(model, file) as live:
        run(Session(alone, live))
    expect_same_state(stream, alone)
    assert session.ask("What moves?", max_new_tokens=6).read() == alone.ask("What moves?", max_new_tokens=6)


def test_a_missing_kind_is_reported_and_a_stream_goes_on(model):
    config, reports = model.config, []
    stream = a_stream(model)
    samples = torch.zeros(config.samples_per_chunk)
    sound = [Sound(t * config.seconds_per_chunk, samples) for t in range(20)]
    run(Session(stream, sound, on_report=reports.append))
    assert [(report.video, report.audio) for report in reports] == [(False, True)] * 20
    picture = torch.zeros(3, config.image_size, config.image_size, dtype=torch.uint8)
    again = [Picture(100 + t / 10, picture) for t in range(20)]
    run(Session(stream, again, on_report=reports.append))
    later = reports[20:]
    assert later[0].chunk == 20
    assert later[0].start == pytest.approx(20 * config.seconds_per_chunk)
    assert {(report.video, report.audio) for report in later} == {(True, False)}


def test_lag_is_told_for_what_comes_in_real_time(model, file):
    reports, stream = [], a_stream(model)

    def slow(report):
        reports.append(report)
        time.sleep(0.5 if report.chunk == 4 else 0)

    with opened(model, file, real_time=True) as live:
        run(Session(stream, live, on_report=slow))
    lags = [report.lag for report in reports]
    assert len(lags) == 10
    assert lags[5] > 0.25
    assert min(lags) < 1.0


def test_failures_are_kept(model, file):
    def broken():
        yield Sound(0.0, torch.zeros(10))
        raise ConnectionError("source must go on")

    session = Session(a_stream(model), broken())
    session.start()
    session.join(30)
    assert str(session.failure) == "source must go on"

    def wrong(report):
        raise ZeroDivisionError

    with opened(model, file) as live:
        session = Session(a_stream(model), live, on_report=wrong)
        session.start()
        session.join(30)
    assert isinstance(session.failure, ZeroDivisionError)
    with pytest.raises(ValueError, match="choices must differ from one another"):
        Session(a_stream(model), [], choices=("a", "a"))


def test_stop_is_prompt_and_leaves_the_stream_whole(model, tmp_path):
    file = write_clip(tmp_path / "long.mkv", seconds=30.0, fps=5)
    stream, before = a_stream(model), threading.active_count()
    with opened(model, file, real_time=True) as live:
        session = Session(stream, live)
        session.start()
        assert session.wait_for_chunk(60)
        session.stop()
    session.join(10)
    assert not session.running
    assert session.failure is None
    assert threading.active_count() == before
    assert 1 <= stream.chunks[0] < 30
    assert isinstance(stream.ask("What?", max_new_tokens=2), str)


def test_a_pipe_that_is_waited_for_holds_nobody_up(model, file):
    """Nobody writes into it any more, nor closes it."""
    reading, writing = os.pipe()
    data = file.read_bytes()
    with open(reading, "rb") as pipe, open(writing, "wb", buffering=0) as sink:
        threading.Thread(target=sink.write, args=(data[: len(data) // 2],), daemon=True).start()
        with opened(model, pipe) as live:
            session = Session(a_stream(model), live)
            session.start()
            assert session.wait_for_chunk(60)
            time.sleep(1)
            session.stop()
            begun = time.monotonic()
        assert 0.9 < time.monotonic() - begun < 3
        assert session.running
        sink.close()
        session.join(10)
        assert not session.running
    assert session.failure is None
