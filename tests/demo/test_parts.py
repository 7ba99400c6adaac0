"""The demo's parts that need no browser: recordings, clips for browsers, places, what the page says."""

import threading
from types import SimpleNamespace

import av
import pytest

from clips import write_clip
from mirasol.demo import view
from mirasol.demo.options import DemoOptions
from mirasol.demo.playable import playable
from mirasol.demo.source import MOST, Recording
from mirasol.demo.visitor import Exchange
from mirasol.demo.visitors import Visitors
from mirasol.streaming.session import Report


def test_a_recording_is_read_as_it_is_written_and_refuses_what_nobody_reads():
    recording = Recording()
    assert recording.write(b"abc")
    assert recording.read(2) == b"ab"
    assert recording.read() == b"c"
    threading.Timer(0.1, recording.write, [b"late"]).start()
    assert recording.read(100) == b"late"  # waits
    assert recording.write(bytes(MOST))
    assert not recording.write(b"x")
    recording.close()
    assert not recording.write(b"x")
    assert recording.read() == bytes(MOST)
    assert recording.read() == b""


@pytest.mark.parametrize(
    ("name", "codec", "sound", "kept"),
    [("a.mp4", "libx264", "aac", True), ("a.mp4", "mpeg4", "aac", False), ("a.mkv", "libx264", "aac", False)],
)
def test_a_clip_is_made_playable_where_it_is_not(tmp_path, name, codec, sound, kept):
    height = 49 if codec == "mpeg4" else 48  # H.264 takes even sides only
    path = write_clip(tmp_path / name, seconds=1, codec=codec, audio_codec=sound, width=66, height=height)
    found = playable(path, tmp_path / "out.mp4")
    assert found == (path if kept else tmp_path / "out.mp4")
    with av.open(str(found)) as clip:
        assert [stream.codec_context.codec.canonical_name for stream in clip.streams] == ["h264", "aac"]
        assert clip.duration / av.time_base == pytest.approx(1, abs=0.1)
        assert sum(1 for _ in clip.decode(video=0)) == 25


def test_clips_with_one_track_are_made_playable_and_others_are_told(tmp_path):
    silent = playable(write_clip(tmp_path / "a.avi", seconds=0.4, tones=None), tmp_path / "a.mp4")
    sound = playable(write_clip(tmp_path / "b.avi", seconds=0.4, width=0, audio_codec="mp3"), tmp_path / "b.mp4")
    for path, kinds in ((silent, ["video"]), (sound, ["audio"])):
        with av.open(str(path)) as clip:
            assert [stream.type for stream in clip.streams] == kinds
    wrong = tmp_path / "notes.mp4"
    wrong.write_text("no film")
    with pytest.raises(ValueError, match=r"notes\.mp4 cannot be played: Invalid data"):
        playable(wrong, tmp_path / "c.mp4")
    assert not (tmp_path / "c.mp4").exists()


def test_visitors_have_a_place_until_they_leave():
    stopped = []

    def new_visitor():
        one = SimpleNamespace(key=None)
        one.stop = lambda: stopped.append(one)
        return one

    visitors = Visitors(new_visitor, 2)
    first, second = visitors.enter("a"), visitors.enter("b")
    assert visitors.enter("a") is first
    with pytest.raises(RuntimeError, match="All 2 places are taken"):
        visitors.enter("c")
    assert visitors.find("c") is None
    second.key = "secret"
    assert visitors.by_key("secret") is second
    assert visitors.by_key("") is None
    visitors.leave("a")
    visitors.leave("nobody")
    assert stopped == [first]
    assert visitors.enter("c") not in (first, second)
    assert len(visitors) == 2


def visitor(chunks, exchanges=(), **more):
    """What the view asks of a visitor whose chunks are (number, picture, sound)."""
    told = dict(lag=0.2, seconds=0.0125, memory=2_100_000, process_memory=612_000_000, scores={})
    reports = [Report(chunk=c, start=c / 2, video=video, audio=audio, **told) for c, video, audio in chunks]
    stream = SimpleNamespace(config=SimpleNamespace(seconds_per_chunk=0.5), nbytes=2_100_000)
    seconds = reports[-1].start + 0.5 if reports else 0.0
    plain = dict(source="clip.mp4", failure="", running=True)
    return SimpleNamespace(
        reports=reports, exchanges=list(exchanges), stream=stream, seconds=seconds, **{**plain, **more}
    )


def test_the_strip_shows_what_is_in_memory_and_where_the_answer_looks():
    asked = Exchange("Who <b>sang</b>?", 3.0, "Two", {0: 0.1, 5: 0.3, 6: 0.6}, 0.02)
    here = visitor([(0, True, True), (5, True, False), (6, False, True), (7, False, False)], [asked])
    cells = view.cells(here)
    assert [cell.chunk for cell in cells] == [0, 5, 6, 7]
    assert [cell.after_gap for cell in cells] == [False, True, False, False]
    assert [(cell.video, cell.audio) for cell in cells] == [(True, True), (True, False), (False, True), (False, False)]
    assert [cell.share for cell in cells] == [0.1, 0.3, 0.6, 0]
    assert [cell.height for cell in cells] == pytest.approx([1 / 6, 0.5, 1, 0])
    strip = view.strip(here)
    assert strip.count("looked-at") == 3
    assert strip.count("missing") == 4
    assert strip.count('class="gap"') == 1
    assert "at most 60 % in one chunk" in strip
    assert "<b>" not in strip
    assert "&lt;b&gt;sang" in strip
    assert "Here each chunk" in view.strip(None)


def test_figures_and_sentences():
    here = visitor([(0, True, True)], [Exchange("Who?", 61.0, "", {}, 0.0213)])
    figures = view.figures(here)
    for value in ("2.1 MB", "612 MB", "12.5 ms", "200 ms", "21.3 ms", "0:00.5 of stream"):
        assert value in figures, value
    assert view.figures(None).count("–") >= 5
    assert view.messages(here) == [
        {"role": "user", "content": "1:01  Who?"},
        {"role": "assistant", "content": "…"},
    ]
    assert "Nothing is being watched" in view.status(None)
    assert "Watching and listening to clip.mp4: 0:00.5" in view.status(here)
    assert "Waiting for the first chunk" in view.status(visitor([]))
    assert "Saw 0:00.5 of clip.mp4" in view.status(visitor([(0, True, True)], running=False))
    failed = view.status(visitor([], failure="<i>broken</i>"))
    assert "failed" in failed
    assert "&lt;i&gt;broken" in failed


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00.0"), (7.45, "0:07.4"), (59.99, "0:59.9"), (751, "12:31"), (3723, "1:02:03")]
)
def test_clock(seconds, text):
    assert view.clock(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(912, "912 B"), (1000, "1 kB"), (999_600, "1 MB"), (1_270_000, "1.27 MB"), (3e15, "3e+03 TB")]
)
def test_size(count, text):
    assert view.size(count) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": 0}, "memory must be"),
        ({"visitors": 0}, "visitors must be"),
        ({"port": 70000}, "port must be below 65536, was 70000"),
        ({"examples": "nowhere"}, "examples must be a folder of clips, was 'nowhere'"),
        ({"host": ""}, "host must be"),
    ],
)
def test_options_that_cannot_work_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        DemoOptions(**change)
