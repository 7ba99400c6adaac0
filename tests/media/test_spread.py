"""Chunks spread over a long span: each is what its own span would be, and what lies between is not decoded."""

from __future__ import annotations

import time

import pytest
import torch

pytest.importorskip("av")

from clips import TONES, frame_numbers, tone, write_clip
from mirasol.media import load, reading
from mirasol.media.frames import FrameSampler
from mirasol.media.source import Source

RATE = 16000
SHAPE = {"frames_per_chunk": 2, "size": (48, 64), "fit": "squash", "samples_per_chunk": 4000}
KINDS = {
    "mp4": {"codec": "libx264", "b_frames": 2, "key_every": 50},
    "ts": {"codec": "libx264", "b_frames": 2, "key_every": 50},
    "mkv": {"codec": "mpeg4", "key_every": 25, "audio_codec": "pcm_s16le"},
    "avi": {"codec": "mpeg4", "key_every": 25, "audio_codec": "pcm_s16le"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """24 seconds of 10 frames each: the numbers that the frames show stay below 256."""
    folder = tmp_path_factory.mktemp("spread")
    return {kind: write_clip(folder / f"a.{kind}", seconds=24.0, fps=10, **changes) for kind, changes in KINDS.items()}


def expect_each_chunk_to_be_its_own_clip(file, clip, chunks):
    for chunk in range(chunks):
        start = clip.start + clip.chunk_times[chunk].item()
        alone = load(file, chunks=1, start=start, **SHAPE)
        frames, samples = slice(chunk * 2, chunk * 2 + 2), slice(chunk * 4000, chunk * 4000 + 4000)
        assert torch.equal(clip.video[:, frames], alone.video)
        assert torch.equal(clip.times[chunk], alone.times[0])
        assert torch.equal(clip.video_valid[chunk], alone.video_valid[0])
        assert torch.equal(clip.audio_valid[samples], alone.audio_valid)
        # A lossy decoder warms up from where it began; MPEG-TS tells times anew after each seek, to a sample or so.
        shifts = (-1, 0, 1) if file.suffix == ".ts" else (0,)
        heard, expected = clip.audio[samples][1:-1], alone.audio
        assert min((heard - expected.roll(shift)[1:-1]).abs().max() for shift in shifts) < 2e-3
        assert frame_numbers(alone.video) == [int((start + part * 0.25) * 10 + 1e-6) for part in (0.25, 0.75)]


@pytest.mark.parametrize("seekable", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_each_chunk_is_its_own_clip(files, monkeypatch, kind, seekable):
    if not seekable:
        monkeypatch.setattr(Source, "seek", lambda self, time: self.reopen())
    for chunks, span in ((4, {}), (3, {"start": 2.3, "duration": 21.0}), (6, {"start": 7.0, "duration": 9.0})):
        clip = load(files[kind], chunks=chunks, spread=True, **span, **SHAPE)
        way = clip.duration - 0.25
        expected = torch.tensor([t * way / (chunks - 1) for t in range(chunks)], dtype=torch.float64)
        assert torch.allclose(clip.chunk_times, expected, rtol=0, atol=1e-9)
        assert clip.chunk_times.dtype == torch.float64
        assert clip.duration == pytest.approx(span.get("duration", 24.0), abs=0.03)
        expect_each_chunk_to_be_its_own_clip(files[kind], clip, chunks)


def test_the_sound_is_not_stretched(files):
    clip = load(files["avi"], chunks=5, spread=True, **SHAPE)
    whole = tone(TONES, 24.0, RATE).float()
    for chunk, start in enumerate(clip.chunk_times.tolist()):
        heard, first = clip.audio[chunk * 4000 : chunk * 4000 + 4000], round(start * RATE)
        valid = clip.audio_valid[chunk * 4000 : chunk * 4000 + 4000]
        assert valid[:3900].all()
        assert (heard[:3900] - whole[first : first + 3900]).abs().max() < 0.1  # half a sample of 470 Hz is 0.05


def test_a_single_chunk_lies_in_the_middle(files):
    clip = load(files["mkv"], chunks=1, spread=True, start=2.0, duration=11.25, **SHAPE)
    assert clip.chunk_times.tolist() == [5.5]
    assert (clip.start, clip.duration) == (2.0, 11.25)
    assert torch.equal(clip.audio, load(files["mkv"], chunks=1, start=7.5, **SHAPE).audio)


def test_a_short_span_has_contiguous_chunks(files):
    close = load(files["mp4"], chunks=8, start=3.0, **SHAPE)
    assert close.chunk_times.tolist() == [t * 0.25 for t in range(8)]
    for duration in (0.1, 1.9, 2.0):
        spread = load(files["mp4"], chunks=8, start=3.0, duration=duration, spread=True, **SHAPE)
        assert torch.equal(spread.video, close.video)
        assert torch.equal(spread.audio, close.audio)
        assert torch.equal(spread.chunk_times, close.chunk_times)
        assert spread.duration == 2.0


def test_a_track_that_ends_early(tmp_path):
    """Frames that the decoder holds back come out even where the pass ends before the file does."""
    sound = {"audio_codec": "pcm_s16le", "rate": 8000, "sound_seconds": 60.0}
    file = write_clip(tmp_path / "a.mkv", seconds=3.0, codec="libx264", b_frames=2, **sound)
    clip = load(file, chunks=3, spread=True, duration=50.0, **SHAPE)
    assert frame_numbers(clip.video) == [1, 4, 74, 74, 74, 74]
    assert clip.video_valid.tolist() == [[True, True], [False, False], [False, False]]
    assert clip.audio_valid.all()


def test_samples_per_chunk_is_required(files):
    shape = {**SHAPE, "samples_per_chunk": None}
    with pytest.raises(ValueError, match="samples_per_chunk must be given with spread, was None"):
        load(files["mkv"], chunks=2, spread=True, **shape)


def test_long_gaps_are_not_decoded(files, monkeypatch):
    offered = []
    original = FrameSampler.offer
    monkeypatch.setattr(FrameSampler, "offer", lambda self, frame: (offered.append(1), original(self, frame)))
    load(files["avi"], chunks=3, spread=True, **SHAPE)
    sought = len(offered)
    monkeypatch.setattr(reading, "LONG_GAP", 1e9)
    offered.clear()
    load(files["avi"], chunks=3, spread=True, **SHAPE)
    assert sought < 120
    assert len(offered) >= 235


@pytest.mark.slow
def test_an_hour_takes_seconds(tmp_path):
    sound = {"audio_codec": "pcm_s16le", "rate": 8000}
    file = write_clip(tmp_path / "hour.mkv", seconds=3600.0, fps=2, key_every=20, **sound)
    begun = time.perf_counter()
    clip = load(file, chunks=16, spread=True, **SHAPE)
    assert time.perf_counter() - begun < 8
    assert clip.video_valid.all()
    numbers = [int((start + part * 0.25) * 2 + 1e-6) % 256 for start in clip.chunk_times for part in (0.25, 0.75)]
    assert frame_numbers(clip.video) == numbers
