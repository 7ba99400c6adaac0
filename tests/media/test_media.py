"""Files into clips: the right frames, the right sound, at the right time, whatever the file is like."""

from __future__ import annotations

import gc
import sys
from bisect import bisect_right
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("av")

import av

from clips import TONES, frame_numbers, rotate_header, square_centres, tone, write_clip
from mirasol.encoders.mel import LogMel
from mirasol.media import clip as clip_module
from mirasol.media import load, reading
from mirasol.media.frames import FrameSampler, centre, make_picture, quarter_turns
from mirasol.media.sound import SoundTrack
from mirasol.media.source import open_source

RATE = 16000
NATIVE = {"size": (48, 64), "fit": "squash"}
PARTS = {"chunks": 4, "frames_per_chunk": 4, **NATIVE}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files that several tests read."""
    folder = tmp_path_factory.mktemp("clips")
    h264 = {"codec": "libx264", "b_frames": 2}
    return {
        "mp4": write_clip(folder / "a.mp4"),
        "h264": write_clip(folder / "b.mp4", **h264),
        "ts": write_clip(folder / "c.ts", **h264),
        "mkv": write_clip(folder / "d.mkv", **h264, rate=48000),
        "silent": write_clip(folder / "e.mp4", tones=None),
        "sound": write_clip(folder / "f.m4a", width=0),
        "wav": write_clip(folder / "g.wav", width=0, audio_codec="pcm_s16le", rate=RATE),
    }


def instants(chunks, frames, duration, start=0.0):
    return [start + (i + 0.5) * duration / (chunks * frames) for i in range(chunks * frames)]


def on_screen(stamps, times):
    return [max(bisect_right(stamps, time + 1e-6) - 1, 0) for time in times]


def lag(audio, expected, most=160):
    """Samples by which `audio` comes after `expected`: where their difference is least."""
    middle = slice(most, len(expected) - most)
    errors = [(audio.roll(-shift)[middle] - expected[middle]).square().mean() for shift in range(-most, most + 1)]
    return int(torch.stack(errors).argmin()) - most


def pitch(samples):
    spectrum = torch.fft.rfft(samples * torch.hann_window(len(samples))).abs()
    return spectrum.argmax().item() * RATE / len(samples)


@pytest.mark.parametrize("kind", ["mp4", "h264", "ts", "mkv"])
def test_frames_and_sound_are_where_they_must_be(files, kind):
    clip = load(files[kind], **PARTS, samples_per_chunk=8000)
    assert clip.video.shape == (3, 16, 48, 64)
    assert clip.video.dtype == torch.uint8
    assert clip.video.is_contiguous()
    assert clip.audio.shape == (32000,)
    assert clip.audio.dtype == torch.float32
    assert (clip.sample_rate, clip.start, clip.duration) == (RATE, 0.0, 2.0)
    wanted = instants(4, 4, 2.0)
    numbers = on_screen([i / 25 for i in range(50)], wanted)
    assert frame_numbers(clip.video) == numbers
    assert clip.times.shape == clip.video_valid.shape == (4, 4)
    assert torch.allclose(clip.times.flatten(), torch.tensor(numbers, dtype=torch.float64) / 25, atol=1e-3)
    assert clip.video_valid.all()
    assert clip.audio_valid[:31000].all()  # some containers end the sound a little before the picture
    seen, side = square_centres(clip.video), 12 / 64
    expected = torch.tensor(numbers) / 25 / 2.0 * (1 - side) + side / 2
    assert (seen - expected).abs().max() < 1.5 / 64
    for chunk, hz in zip(clip.audio.view(4, 8000), TONES, strict=True):
        assert abs(pitch(chunk) - hz) <= 2
        assert abs(pitch(chunk[:1600]) - hz) <= 10
        assert abs(pitch(chunk[-1600:]) - hz) <= 10
    assert abs(lag(clip.audio, tone(TONES, 2.0, RATE).float())) <= 16


def test_the_spectrogram_of_each_chunk_holds_its_tone(files):
    clip = load(files["mp4"], **PARTS, samples_per_chunk=8000)
    mel = LogMel()(clip.audio[None])
    assert mel.shape == (1, 128, 200)
    loudest = mel[0].view(128, 4, 50)[:, :, 3:].argmax(0)
    assert all(len(part.unique()) == 1 for part in loudest)
    assert len(loudest[:, 0].unique()) == 4


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate(tmp_path, suffix):
    stamps = np.cumsum([0, *np.random.default_rng(1).choice([0.01, 0.04, 0.2], 28)]).round(3).tolist()
    file = write_clip(tmp_path / f"v.{suffix}", seconds=2.0, stamps=stamps, codec="libx264", b_frames=2)
    clip = load(file, chunks=2, frames_per_chunk=16, duration=2.0, **NATIVE)
    numbers = on_screen(stamps, instants(2, 16, 2.0))
    assert len(set(numbers)) < 32
    assert frame_numbers(clip.video) == numbers
    assert torch.allclose(clip.times.flatten(), torch.tensor(stamps, dtype=torch.float64)[numbers], atol=1e-3)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_is_applied(files, tmp_path, turns):
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(files["mp4"].read_bytes())
    upright = load(files["mp4"], chunks=1, frames_per_chunk=2, size=(48, 64), fit="squash").video
    size = (64, 48) if turns % 2 else (48, 64)
    video = load(rotate_header(turned, turns), chunks=1, frames_per_chunk=2, size=size).video
    assert torch.equal(video, upright.rot90(turns, (2, 3)))


@pytest.mark.parametrize(
    ("degrees", "turns"), [(0, 0), (90, 1), (180, 2), (-180, 2), (-90, 3), (6, 0), (-2147483648, 0)]
)
def test_quarter_turns_of_a_rotation(degrees, turns):
    assert quarter_turns(degrees) == turns


def test_a_rotation_by_a_matrix_without_size_is_none(files, tmp_path):
    data = bytearray(files["mp4"].read_bytes())
    matrix = data.find(b"tkhd") + 44
    data[matrix : matrix + 20] = bytes(20)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data)
    assert torch.equal(load(broken, **PARTS).video, load(files["mp4"], **PARTS).video)


def test_frames_leave_the_memory_without_the_garbage_collector(files):
    def frames():
        return sum(type(thing) is av.VideoFrame for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = frames()
        load(files["mp4"], **PARTS)
        assert frames() == before
    finally:
        gc.enable()


@pytest.mark.parametrize(("width", "height"), [(67, 45), (33, 71)])
def test_odd_sizes_are_resized_as_torch_does(tmp_path, width, height):
    file = write_clip(tmp_path / "odd.mp4", seconds=0.4, width=width, height=height, tones=None)
    with av.open(str(file)) as container:
        frame = next(container.decode(video=0))
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)[None].float()
    assert pixels.shape[2:] == (height, width)

    squashed = load(file, chunks=1, frames_per_chunk=1, size=(20, 32), duration=0.05, fit="squash").video
    expected = F.interpolate(pixels, (20, 32), mode="bilinear", antialias=True)[0]
    assert (squashed[:, 0].float() - expected).abs().max() <= 1.0

    for size, (tall, wide) in ({24: (45, 45), (20, 30): (45, 67)} if width > height else {24: (33, 33)}).items():
        cropped = load(file, chunks=1, frames_per_chunk=1, size=size, duration=0.05).video
        top, left = (height - tall) // 2, (width - wide) // 2
        middle = pixels[:, :, top : top + tall, left : left + wide]
        expected = F.interpolate(middle, size, mode="bilinear", antialias=True)[0]
        assert (cropped[:, 0].float() - expected).abs().max() <= 1.0


def test_the_middle_has_the_shape_asked_for():
    assert centre((48, 64), (224, 224)) == (0, 8, 48, 48)
    assert centre((64, 48), (224, 224)) == (8, 0, 48, 48)
    assert centre((1080, 1920), (224, 448)) == (60, 0, 960, 1920)
    assert centre((1080, 1920), (1080, 1920)) == (0, 0, 1080, 1920)
    assert centre((1, 16384), (224, 224)) == (0, 8191, 1, 1)
    assert centre((16384, 1), (7, 31)) == (8191, 0, 1, 1)


def test_missing_tracks(files):
    silent = load(files["silent"], **PARTS)
    assert silent.audio is None
    assert silent.audio_valid is None
    assert silent.video.shape == (3, 16, 48, 64)
    for name in ("sound", "wav"):
        sound = load(files[name], **PARTS, samples_per_chunk=8000)
        assert sound.video is sound.times is sound.video_valid is None
        assert abs(lag(sound.audio, tone(TONES, 2.0, RATE).float())) <= 1
    assert (sound.audio - tone(TONES, 2.0, RATE).float()).abs().max() < 1e-4


def test_a_cover_picture_is_no_video(tmp_path):
    file = write_clip(tmp_path / "cover.mp4", width=0, cover=True)
    with av.open(str(file)) as container:
        assert len(container.streams.video) == 1
    assert load(file, **PARTS).video is None


def test_a_clip_is_shown_by_its_shapes(files):
    assert repr(load(files["silent"], **PARTS)) == (
        "Clip(video=[3, 16, 48, 64] uint8 on cpu, audio=None, 0 .. 2 s, sample_rate=16000)"
    )


def test_the_span_defaults_to_the_whole_file(files):
    clip = load(files["mp4"], chunks=3, frames_per_chunk=2, **NATIVE)
    assert clip.audio.shape == (3 * 10667,)
    assert clip.duration == pytest.approx(2.0, abs=1e-4)
    later = load(files["ts"], chunks=3, frames_per_chunk=2, start=0.5, **NATIVE)
    assert later.audio.shape == (24000,)
    assert load(files["sound"], **PARTS).audio.shape == (32000,)


def test_a_span_within_the_file(files):
    clip = load(files["mp4"], chunks=2, frames_per_chunk=3, start=0.7, duration=0.6, sample_rate=8000, **NATIVE)
    assert clip.audio.shape == (4800,)
    assert frame_numbers(clip.video) == on_screen([i / 25 for i in range(50)], instants(2, 3, 0.6, 0.7))
    assert abs(lag(clip.audio, tone(TONES, 2.0, 8000).float()[5600:10400])) <= 8


def test_past_the_end(files):
    clip = load(files["mp4"], chunks=4, frames_per_chunk=4, samples_per_chunk=16000, **NATIVE)
    assert clip.duration == 4.0
    assert clip.video_valid.flatten().tolist() == [True] * 8 + [False] * 8
    assert frame_numbers(clip.video)[8:] == [49] * 8
    assert torch.equal(clip.times[2:], torch.full((2, 4), 1.96, dtype=torch.float64))
    assert clip.audio_valid[:31000].all()
    assert not clip.audio_valid[33000:].any()
    assert (clip.audio[~clip.audio_valid] == 0).all()


def test_start_past_the_end(files):
    for options in ({"duration": 1.0}, {"samples_per_chunk": 1600}, {}):
        for name in ("mp4", "ts", "silent", "sound"):
            with pytest.raises(ValueError, match="start must lie before the end of"):
                load(files[name], **PARTS, start=30.0, **options)


SEEKS = {
    "mp4": {"codec": "libx264", "b_frames": 2, "key_every": 60},
    "ts": {"codec": "libx264", "b_frames": 2, "key_every": 60},
    "mkv": {"codec": "libx264", "b_frames": 2, "key_every": 60},
    "mpg": {"codec": "mpeg2video", "audio_codec": "mp2", "b_frames": 2, "key_every": 60},
    "mpeg4 without keys.ts": {"codec": "mpeg4", "key_every": 120},
    "h264 without keys.mp4": {"codec": "libx264", "b_frames": 2, "key_every": 1000},
}


@pytest.mark.parametrize("kind", SEEKS)
def test_seeking_changes_nothing(tmp_path, monkeypatch, kind):
    """Whatever the container's index is worth: exact frames, and sound to the precision of its timestamps."""
    file = write_clip(tmp_path / f"long.{kind.split('.')[-1]}", seconds=8.0, **SEEKS[kind])
    starts = (2.9, 4.6, 5.3)  # shortly after and before key frames, and in between
    options = {**PARTS, "duration": 2.0}
    sought = [load(file, start=start, **options) for start in starts]
    monkeypatch.setattr(reading, "SEEK_MARGINS", (1e9,))
    sound = tone(TONES, 8.0, RATE).float()
    for start, clip in zip(starts, sought, strict=True):
        plain = load(file, start=start, **options)
        assert frame_numbers(plain.video) == on_screen([i / 25 for i in range(200)], instants(4, 4, 2.0, start))
        assert torch.equal(clip.video, plain.video)
        assert torch.equal(clip.times, plain.times)
        for audio in (clip.audio, plain.audio):
            assert abs(lag(audio, sound[round(start * RATE) :][:32000])) <= 16
        assert clip.audio_valid.all()


def test_seeking_saves_decoding(tmp_path, monkeypatch):
    file = write_clip(tmp_path / "long.mp4", seconds=8.0, codec="libx264", key_every=25)
    decoded = []
    original = FrameSampler.offer
    monkeypatch.setattr(FrameSampler, "offer", lambda self, frame: (decoded.append(1), original(self, frame)))
    load(file, **PARTS, start=6.0, duration=1.0)
    assert len(decoded) < 80


def test_only_frames_that_are_taken_are_converted(files, monkeypatch):
    converted = []
    monkeypatch.setattr(clip_module, "make_picture", lambda *args: (converted.append(1), make_picture(*args))[1])
    load(files["mp4"], chunks=2, frames_per_chunk=4, **NATIVE)
    assert len(converted) == 8


def test_sound_with_holes_is_placed_by_its_timestamps(tmp_path):
    file = write_clip(tmp_path / "holes.mkv", audio_codec="pcm_s16le", sound_from=0.2, silence=(0.5, 1.0))
    clip = load(file, **PARTS, samples_per_chunk=8000)
    valid, sound = clip.audio_valid, tone(TONES, 2.0, RATE).float()
    borders = (valid[1:] != valid[:-1]).nonzero().flatten() / RATE
    assert torch.allclose(borders, torch.tensor([0.2, 0.5, 1.0]), atol=1024 / 44100 + 0.001)
    assert (clip.audio[~valid] == 0).all()
    assert abs(lag(clip.audio[4000:8000], sound[4000:8000], most=50)) <= 16
    assert abs(lag(clip.audio[17000:], sound[17000:])) <= 16


def test_the_end_of_a_span_is_no_end_of_the_sound(tmp_path):
    file = write_clip(tmp_path / "pcm.mkv", audio_codec="pcm_s16le", rate=32000)  # 20 blocks of 1024 are 0.64 s
    whole, part = (load(file, **PARTS, duration=duration).audio for duration in (1.0, 0.64))
    assert torch.equal(part, whole[:10240])


def test_sound_whose_kind_changes():
    """Other rates, layouts and formats, a gap and an overlap, in one track."""
    source = SimpleNamespace(time_of=lambda frame: float(frame.pts * frame.time_base))
    track = SoundTrack(source, 1.0, RATE, torch.zeros(RATE), torch.zeros(RATE, dtype=torch.bool))
    sound = tone(TONES, 3.0, 48000).float().numpy()
    kinds = [(0.8, 1.3, 48000, "fltp", "stereo"), (1.3, 1.5, 24000, "flt", "mono"), (1.7, 1.9, 16000, "fltp", "mono")]
    for first, last, rate, form, layout in [*kinds, (1.85, 2.4, 48000, "fltp", "stereo")]:
        piece = sound[round(first * 48000) : round(last * 48000) : 48000 // rate]
        planes = np.stack([piece, piece]) if layout == "stereo" else piece[None]
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(planes), format=form, layout=layout)
        frame.rate, frame.pts, frame.time_base = rate, round(first * rate), Fraction(1, rate)
        track.offer(frame)
    track.finish()
    borders = (track.valid[1:] != track.valid[:-1]).nonzero().flatten() + 1
    assert (borders - torch.tensor([8000, 11200])).abs().max() <= 1
    expected = tone(TONES, 3.0, RATE).float()[16000:32000]
    for first, last in ((0, 4700), (4900, 7900), (11300, 13500), (14500, 16000)):
        assert abs(lag(track.samples[first:last], expected[first:last], most=20)) <= 1


def test_broken_and_missing_files(tmp_path, files):
    with pytest.raises(FileNotFoundError, match=r"path must be a file, was .*absent"):
        load(tmp_path / "absent.mp4", **PARTS)
    with pytest.raises(FileNotFoundError, match="path must be a file"):
        load(tmp_path, **PARTS)
    cases = {
        "empty.mp4": b"",
        "text.mp4": b"not a film" * 100,
        "cut.mp4": files["mp4"].read_bytes()[:2000],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="path must be a file that FFmpeg reads"):
            load(tmp_path / name, **PARTS)
    write_clip(tmp_path / "cover.mp4", width=0, tones=None, cover=True)
    with pytest.raises(ValueError, match=r"path must hold a video or an audio track to decode, was .*cover\.mp4"):
        load(tmp_path / "cover.mp4", **PARTS)


def test_a_video_track_without_a_decodable_frame(tmp_path, files):
    data = bytearray(files["silent"].read_bytes())
    payload = data.find(b"mdat") + 4
    end = data.find(b"moov") - 4
    assert 0 < payload < end
    data[payload:end] = bytes(end - payload)
    (tmp_path / "zeros.mp4").write_bytes(data)
    with pytest.raises(ValueError, match=r"zeros\.mp4'; video track 0 \(mpeg4\) cannot be decoded: "):
        load(tmp_path / "zeros.mp4", **PARTS)


def test_damage_costs_only_what_it_hits(tmp_path, files):
    data = bytearray(files["ts"].read_bytes())
    cut = tmp_path / "cut.ts"
    cut.write_bytes(data[: len(data) // 2])
    clip = load(cut, **PARTS, duration=2.0)
    valid = clip.video_valid.flatten().tolist()
    assert 4 < sum(valid) < 13
    assert valid == sorted(valid, reverse=True)
    damaged = tmp_path / "damaged.ts"
    third = len(data) // 3
    data[third : third + 188 * 8] = np.random.default_rng(0).bytes(188 * 8)
    damaged.write_bytes(data)
    clip = load(damaged, **PARTS, duration=2.0)
    assert frame_numbers(clip.video)[:3] == [1, 4, 7]
    assert frame_numbers(clip.video)[-3:] == [42, 45, 48]


def test_a_file_that_does_not_tell_its_duration(tmp_path):
    file = write_clip(tmp_path / "live.mkv", seconds=1.0, options={"live": "1"})
    with pytest.raises(ValueError, match=r"duration must be given, for live\.mkv does not tell its own"):
        load(file, **PARTS)
    assert frame_numbers(load(file, **PARTS, duration=1.0).video)[-1] == 24


def test_pieces_have_whole_samples(files):
    options = {"chunks": 3, "frames_per_chunk": 1, **NATIVE}
    clip = load(files["mp4"], **options, duration=1.0)
    assert clip.audio.shape == (3 * 5333,)
    assert clip.duration == 3 * 5333 / RATE
    assert load(files["mp4"], **options, duration=1.0, samples_per_chunk=5333).duration == clip.duration
    with pytest.raises(ValueError, match=r"samples_per_chunk must be duration / chunks \* sample_rate = 5333"):
        load(files["mp4"], **options, duration=1.0, samples_per_chunk=5000)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"chunks": 0}, ValueError, "chunks must be at least 1, was 0"),
        ({"frames_per_chunk": 1.5}, TypeError, "frames_per_chunk must be an int"),
        ({"sample_rate": 0}, ValueError, "sample_rate must be at least 1"),
        ({"size": (32, 0)}, ValueError, "size must be at least 1"),
        ({"size": (32, 32, 3)}, ValueError, r"size must be an int or \(H, W\)"),
        ({"start": -0.1}, ValueError, "start must be a finite number of seconds, at least 0, was -0.1"),
        ({"start": float("nan")}, ValueError, "start must be a finite number"),
        ({"duration": 0}, ValueError, "duration must be a positive, finite number of seconds, was 0"),
        ({"duration": 1e-5}, ValueError, "duration must give each of 4 chunks of a.mp4 a sample"),
        ({"samples_per_chunk": 0}, ValueError, "samples_per_chunk must be at least 1"),
        ({"fit": "pad"}, ValueError, 'fit must be "crop" or "squash"'),
        ({"threads": 0}, ValueError, "threads must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(files, change, error, message):
    with pytest.raises(error, match=message):
        load(files["mp4"], **{**PARTS, **change})


def test_a_missing_pyav_is_named(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"PyAV, which is not installed: pip install -e '\.\[media\]'"):
        load(files["mp4"], **PARTS)


def test_decoder_threads(files, monkeypatch):
    def threads(given):
        with open_source(files["h264"], given) as source:
            return source.video.codec_context.thread_count

    assert threads(3) == 3
    assert threads(None) != 1
    expected = load(files["h264"], **PARTS, threads=1).video
    assert torch.equal(load(files["h264"], **PARTS, threads=3).video, expected)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=0))
    assert threads(None) == 1
