"""Files that are damaged, odd or hostile: they load, or a ValueError names them and says why; memory stays bounded."""

from __future__ import annotations

import os
import re
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")

import av

from clips import frame_numbers, write_clip
from mirasol.media import load, sound
from mirasol.media.boxes import claimed_samples
from mirasol.media.source import Source, _Bytes
from mirasol.media.tracks import MAX_PIXELS

PARTS = {"chunks": 4, "frames_per_chunk": 4, "size": (48, 64), "fit": "squash"}
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("faults") / "a.mp4")


def memory(what: str) -> int:
    """Bytes: "VmRSS", what this process holds, or "VmHWM", the most that it held."""
    return int(re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.fixture
def loads_within(skip_loudly):
    """Load a file, or fail to; check that it took less than so many bytes on top; what the error said comes back."""

    def run(path: Path, most: int, **options) -> str:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the most that was held
        except OSError as error:
            skip_loudly("the memory that loading takes", str(error))
        before, said = memory("VmRSS"), ""
        try:
            load(path, **options)
        except ValueError as error:
            said = str(error)
        assert memory("VmHWM") - before < most
        return said

    return run


def write_raw_avi(path: Path, width: int, height: int, frames: int = 2) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            frame = av.VideoFrame(width, height, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([40 * index + 60]) * plane.buffer_size)
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_tags_that_are_not_utf8(tmp_path, mp4):
    file = tmp_path / "latin1.mp4"
    data = bytearray(write_clip(file, title="Xxxx").read_bytes())
    place = data.index(b"Xxxx")
    data[place : place + 4] = "Café".encode("latin-1")
    file.write_bytes(data)
    assert torch.equal(load(file, **PARTS).video, load(mp4, **PARTS).video)


@pytest.mark.parametrize("name", ["12:30.mp4", "clip%03d.mp4", "a*{b}?.mp4", "concat:a|b.mp4", "http:x.mp4", "-i.mp4"])
def test_a_name_is_only_a_name(tmp_path, monkeypatch, mp4, name):
    (tmp_path / name).write_bytes(mp4.read_bytes())
    monkeypatch.chdir(tmp_path)
    for path in (name, tmp_path / name):
        assert frame_numbers(load(path, **PARTS).video)[0] == 1


def test_a_picture_named_as_a_pattern_is_one_picture(tmp_path):
    for index in (1, 2):
        image = np.full((48, 64, 3), 80 * index, np.uint8)
        with av.open(str(tmp_path / f"a{index}.png"), "w", format="image2", options={"update": "1"}) as container:
            stream = container.add_stream("png", rate=1)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
    file = tmp_path / "a%d.png"
    with pytest.raises(FileNotFoundError, match="path must be a file"):
        load(file, **PARTS, duration=1.0)
    file.write_bytes((tmp_path / "a2.png").read_bytes())
    clip = load(file, **PARTS, duration=1.0)
    assert (clip.video == 160).all()
    assert clip.times.unique().tolist() == [0.0]


PLAYLISTS = {
    "endless.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\nendless.m3u8\n",
    "live.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1.0,\na.mp4\n",
    "self.ffconcat": "ffconcat version 1.0\nfile self.ffconcat\n",
    "other.txt": "ffconcat version 1.0\nfile a.mp4\n",
    "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "manifest.mpd": '<?xml version="1.0"?><MPD type="dynamic"><Period></Period></MPD>',
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_playlists_are_refused(tmp_path, mp4, name):
    (tmp_path / "a.mp4").write_bytes(mp4.read_bytes())
    (tmp_path / name).write_text(PLAYLISTS[name])
    with pytest.raises(ValueError, match=f"path must be a file that FFmpeg reads, .* was .*{name}"):
        load(tmp_path / name, **PARTS, duration=1.0)


def test_a_file_opens_no_other_file(tmp_path, monkeypatch, mp4):
    """An MP4 whose data lie, by its header, in another file."""
    data = bytearray(mp4.read_bytes())
    (tmp_path / "a.mp4").write_bytes(data)
    box = data.index(b"url \x00\x00\x00\x01")
    data[box + 7] = 0  # "not in this file"; the address is empty
    (tmp_path / "outside.mp4").write_bytes(data)
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *args, **options: (opened.append(args[0]), real(*args, **options))[1])
    try:
        load(tmp_path / "outside.mp4", **PARTS)
    except ValueError as error:
        assert "outside.mp4" in str(error)  # noqa: PT017
    assert opened == []


def test_a_clip_that_ends_before_the_first_instant(tmp_path):
    file = write_clip(tmp_path / "short.mp4", seconds=0.04, tones=None)
    clip = load(file, **PARTS, samples_per_chunk=16000)
    assert frame_numbers(clip.video) == [0] * 16
    assert not clip.video_valid.any()
    assert (clip.times == 0).all()
    with pytest.raises(ValueError, match=r"start must lie before the end of short\.mp4, was 0\.5"):
        load(file, **PARTS, samples_per_chunk=16000, start=0.5)


def test_a_thin_picture_needs_little_memory(tmp_path, loads_within):
    file = write_raw_avi(tmp_path / "thin.avi", 16384, 1)
    for fit in ("crop", "squash"):
        said = loads_within(file, 100 * MEGABYTE, chunks=1, frames_per_chunk=1, size=224, fit=fit)
        assert said == ""


def test_pictures_without_end_are_refused(tmp_path, loads_within):
    wide = write_raw_avi(tmp_path / "wide.avi", 16400, 2)
    with pytest.raises(ValueError, match=r"wide\.avi'.*pictures of 16400 x 2 pixels are not taken, at most 16777216"):
        load(wide, **PARTS)
    assert MAX_PIXELS < 4208 * 4000
    large = write_clip(tmp_path / "large.mkv", codec="mpeg4", seconds=0.04, width=4208, height=4000, tones=None)
    said = loads_within(large, 100 * MEGABYTE, **PARTS)
    assert "large.mkv" in said
    assert "(pictures of more than 16777216 pixels are not taken)" in said


@pytest.mark.parametrize("suffix", ["mpg", "flv"])
def test_formats_without_a_header_decode_no_large_picture_to_open(tmp_path, loads_within, suffix):
    codec = "mpeg2video" if suffix == "mpg" else "flv"
    file = write_clip(tmp_path / f"large.{suffix}", codec=codec, seconds=0.04, width=4080, height=4800, tones=None)
    said = loads_within(file, 100 * MEGABYTE, **PARTS, duration=1.0)
    assert "(pictures of more than 16777216 pixels are not taken)" in said


def test_a_claimed_duration_takes_no_memory(tmp_path, loads_within):
    data = bytearray(write_clip(tmp_path / "a.mkv").read_bytes())
    place = data.index(b"\x44\x89\x88") + 3  # the segment's duration, in milliseconds
    assert 1900 < struct.unpack_from(">d", data, place)[0] < 2100
    struct.pack_into(">d", data, place, 90e6)
    long = tmp_path / "claims.mkv"
    long.write_bytes(data)
    said = loads_within(long, 100 * MEGABYTE, **PARTS)
    assert "samples_per_chunk must be given, for claims.mkv says that it lasts 90000 s" in said
    assert frame_numbers(load(long, **PARTS, samples_per_chunk=8000).video)[-1] == 48
    spread = load(long, **PARTS, samples_per_chunk=8000, spread=True)
    assert spread.video_valid.any(1).tolist() == [True, False, False, False]


def claims(data: bytes, name: bytes, *numbers: int) -> bytes:
    """An MP4 whose first box of a name holds other numbers, after its version and flags."""
    place = data.index(name) + 8
    return data[:place] + struct.pack(f">{len(numbers)}I", *numbers) + data[place + 4 * len(numbers) :]


def test_samples_that_an_mp4_only_claims_take_no_memory(tmp_path, loads_within):
    """FFmpeg's index of ten million samples takes 700 MB, though the file has two kilobytes."""
    data = write_clip(tmp_path / "plain.mp4", tones=None, seconds=1.0).read_bytes()
    count = 10_000_000
    one_size = claims(claims(claims(data, b"stsz", 1, count), b"stsc", 1, 1, count), b"stts", 1, count, 1)
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    moof = write_clip(tmp_path / "fragments.mp4", tones=None, seconds=1.0, options=fragments).read_bytes()
    without_flags = moof[: moof.index(b"trun") + 5] + bytes(3) + moof[moof.index(b"trun") + 8 :]
    edits = claims(claims(data, b"stsz", 1, 4000), b"elst", 2000)
    for name, content in {"a": one_size, "b": claims(without_flags, b"trun", count), "c": edits}.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
        said = loads_within(tmp_path / f"{name}.mp4", 20 * MEGABYTE, **PARTS, samples_per_chunk=4000)
        assert f"of at most 4194304 samples (frames, packets of sound), was '{tmp_path}/{name}.mp4'" in said


def test_samples_of_plain_sound_are_many(tmp_path):
    """Each tick is a sample of the file, but not of FFmpeg's index."""
    file = write_clip(tmp_path / "pcm.mov", width=0, audio_codec="pcm_s16le", seconds=100.0)
    with open(file, "rb") as opened:
        assert claimed_samples(opened) < 10_000
    assert load(file, **PARTS, samples_per_chunk=8000, start=90.0).audio_valid.all()
    with open(write_clip(tmp_path / "aac.mp4", seconds=4.0), "rb") as opened:
        assert claimed_samples(opened) == 100 + 174  # frames, and packets of 1024 samples


def write_wav(path: Path, rate: int, samples: int, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((1000 * np.ones(samples * channels)).astype("<i2").tobytes())
    return path


@pytest.mark.parametrize("rate", [1, 2, 4_000_000, 500_009])
def test_rates_that_no_sound_has(tmp_path, loads_within, rate):
    said = loads_within(
        write_wav(tmp_path / "odd.wav", rate, 1_000_000), 100 * MEGABYTE, **PARTS, samples_per_chunk=8000
    )
    assert f"odd.wav'; audio track 0 (pcm_s16le) cannot be decoded: {rate} Hz are not resampled" in said


@pytest.mark.parametrize("rate", [1000, 384_000])
def test_the_extreme_rates_that_are_taken(tmp_path, rate):
    clip = load(write_wav(tmp_path / "extreme.wav", rate, 2 * rate), **PARTS, samples_per_chunk=8000)
    assert clip.audio_valid.all()
    assert (clip.audio[1000:-1000] - 1000 / 2**15).abs().max() < 1e-4


def test_long_frames_are_resampled_in_blocks(tmp_path, monkeypatch):
    file = write_clip(tmp_path / "a.mkv", width=0, audio_codec="flac", rate=44100)
    whole = load(file, **PARTS, samples_per_chunk=8000).audio
    monkeypatch.setattr(sound, "BLOCK", 100)
    assert (load(file, **PARTS, samples_per_chunk=8000).audio - whole).abs().max() < 1e-6


def without_decoder(path: Path, tag: bytes, count: int = 1) -> Path:
    """Give the first tracks of a codec a name that nothing decodes."""
    data = path.read_bytes()
    assert tag in data
    path.write_bytes(data.replace(tag, tag[:2] + b"Z" * (len(tag) - 2), count))
    return path


def test_a_track_without_a_decoder_is_passed_over(tmp_path):
    good = write_clip(tmp_path / "good.mkv")
    silent = without_decoder(write_clip(tmp_path / "sound.mkv"), b"A_AAC")
    with pytest.warns(UserWarning, match=r"sound\.mkv: audio track 1 \(.*\) cannot be decoded: "):
        clip = load(silent, **PARTS)
    assert clip.audio is None
    assert torch.equal(clip.video, load(good, **PARTS).video)
    dark = without_decoder(write_clip(tmp_path / "video.mkv"), b"V_MPEG4")
    with pytest.warns(UserWarning, match=r"video\.mkv: video track 0 \(.*\) cannot be decoded: "):
        clip = load(dark, **PARTS, samples_per_chunk=8000)
    assert clip.video is None
    assert torch.equal(clip.audio, load(good, **PARTS, samples_per_chunk=8000).audio)
    without_decoder(dark, b"A_AAC")
    with pytest.raises(ValueError, match=r"path must hold a video or an audio track to decode, was .*video track 0 "):
        load(dark, **PARTS)


def test_the_next_track_that_can_be_decoded_is_taken(tmp_path):
    """Two tracks of each kind; the first of each is named falsely."""
    file = tmp_path / "four.mkv"
    with av.open(str(file), "w") as container:
        video = [container.add_stream("mpeg4", rate=25) for _ in range(2)]
        audio = [container.add_stream("aac", rate=16000, layout="mono") for _ in range(2)]
        for stream in video:
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(25):
            for stream, grey in zip(video, (50, 200), strict=True):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey, np.uint8), format="rgb24")
                frame.pts = index
                container.mux(stream.encode(frame))
        for stream, level in zip(audio, (0.0, 0.25), strict=True):
            wave = level * np.sin(np.arange(16384) * 0.2, dtype=np.float32)
            for first in range(0, 16384, 1024):
                frame = av.AudioFrame.from_ndarray(wave[None, first : first + 1024], format="fltp", layout="mono")
                frame.rate, frame.pts = 16000, first
                container.mux(stream.encode(frame))
        for stream in (*video, *audio):
            container.mux(stream.encode(None))
    first = load(file, **PARTS)
    assert 40 < first.video.float().mean() < 60
    assert first.audio.abs().max() < 0.01
    without_decoder(without_decoder(file, b"V_MPEG4"), b"A_AAC")
    with pytest.warns(UserWarning, match=r"four\.mkv: .* cannot be decoded") as told:
        clip = load(file, **PARTS)
    tracks = [re.search(r"(video|audio) track \d", str(warning.message))[0] for warning in told]
    assert tracks == ["video track 0", "audio track 2"]
    assert 190 < clip.video.float().mean() < 210
    assert clip.audio.abs().max() > 0.2


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_a_track_whose_packets_are_all_broken_is_passed_over(tmp_path, monkeypatch, kind):
    """One that its header describes well: only decoding tells. Also after a seek, and whatever the error is."""
    file = write_clip(tmp_path / "long.mp4", seconds=4.0)
    good, frames = load(file, **PARTS, start=2.5, samples_per_chunk=4000), Source._frames
    for error in (av.error.PatchWelcomeError(1, "later"), MemoryError(), UnicodeDecodeError("utf-8", b"x", 0, 1, "")):

        def broken(self, stream, packet, error=error):
            if stream.type != kind:
                yield from frames(self, stream, packet)
            self.faults[stream.type] = repr(error)

        monkeypatch.setattr(Source, "_frames", broken)
        with pytest.warns(UserWarning, match=rf"long\.mp4: {kind} track . \(.*\) cannot be decoded"):
            clip = load(file, **PARTS, start=2.5, samples_per_chunk=4000)
        other = "audio" if kind == "video" else "video"
        assert getattr(clip, kind) is None
        assert torch.equal(getattr(clip, other), getattr(good, other))


def test_what_was_read_before_the_demultiplexer_fails_stays(mp4, monkeypatch):
    class Fails:
        def __init__(self, container):
            self._container, self._packets = container, 0

        def __getattr__(self, name):
            return getattr(self._container, name)

        def demux(self, tracks):
            for packet in self._container.demux(tracks):
                self._packets += 1
                if self._packets == 30 or self._packets > 45:
                    raise failure
                yield packet

    whole, opened = load(mp4, **PARTS), Source._open_container
    monkeypatch.setattr(Source, "_open_container", lambda self, *args, **options: Fails(opened(self, *args, **options)))
    failure = RuntimeError("PyAV's own")
    clip = load(mp4, **PARTS)
    assert 2 < clip.video_valid.sum() < 15
    assert torch.equal(clip.video[:, :2], whole.video[:, :2])
    failure = OSError(5, "Input/output error")
    with pytest.raises(ValueError, match=r"path must be a file to read, was .*a\.mp4': OSError: .*Input/output error"):
        load(mp4, **PARTS)


def test_a_place_before_the_file_is_none(mp4):
    file = _Bytes(mp4)
    assert file.seek(-5) < 0
    assert file.seek(0) == 0
    assert file.read(8)[4:] == b"ftyp"
    file.close()


@pytest.mark.parametrize(
    "error", [MemoryError(), OverflowError("int too large"), ZeroDivisionError(), RuntimeError("x")]
)
@pytest.mark.parametrize("where", ["open", "demux", "convert"])
def test_every_failure_names_the_file(mp4, monkeypatch, error, where):
    def fail(*args, **options):
        raise error

    if where == "open":
        monkeypatch.setattr(av, "open", fail)
    elif where == "demux":
        monkeypatch.setattr("mirasol.media.source.Source.time_of", fail)
    else:
        monkeypatch.setattr("mirasol.media.clip.make_picture", fail)
        monkeypatch.setattr("mirasol.media.sound.Mono._feed", fail)
    with pytest.raises(ValueError, match=r"path must .*a\.mp4'.*" + type(error).__name__):
        load(mp4, **PARTS)
