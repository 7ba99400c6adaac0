"""Spans as tensors: how many chunks, what lies in them, what a file without sound or picture gives."""

import re
import shutil

import av
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clips import TONES, frame_numbers, tone, write_clip
from mirasol.config import Config
from mirasol.data import ClipTensors, Example, clip_chunks, load_clip
from mirasol.media import load

CONFIG = Config.preset("tiny")  # 0.16 s a chunk: 4 frames, 2560 samples
SIZE = dict(frames_per_chunk=4, size=32, samples_per_chunk=2560)


@given(st.integers(1, 400), st.integers(1, 50))
def test_a_span_of_whole_chunks_has_as_many_up_to_the_limit(chunks, most):
    config = Config.preset("base")
    piece = config.samples_per_chunk / config.sample_rate
    for span in (chunks * piece, chunks * piece + 0.0009, (chunks - 1) * piece + 0.0011):
        assert clip_chunks(span, config, most) == min(chunks, most)


@pytest.mark.parametrize(
    ("span", "most", "name"), [(0.0, 1, "span_seconds"), (float("nan"), 1, "span"), (1.0, 0, "max")]
)
def test_spans_and_limits_that_cannot_be(span, most, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        clip_chunks(span, CONFIG, most)


def test_a_whole_file_is_what_load_reads(media):
    clip, alone = load_clip(Example(str(media / "4.mp4")), CONFIG, 16), load(media / "4.mp4", chunks=5, **SIZE)
    assert clip.chunks == 5
    assert clip.video_present
    assert clip.audio_present
    assert torch.equal(clip.video, alone.video)
    assert torch.equal(clip.audio, alone.audio)
    assert clip.video.dtype == torch.uint8
    assert clip.audio.dtype == clip.times.dtype == torch.float32
    torch.testing.assert_close(clip.times, torch.arange(5) * 0.16)


def test_a_span_ends_where_it_says(media):
    clip = load_clip(Example(str(media / "long.mp4"), start=0.5, end=0.9), CONFIG, 16)
    assert clip.chunks == 3
    # 4 frames in 0.16 s are asked for at 0.52, 0.56, ...; the file has 25 a second: 13, 14, ... 22, and 22 stays
    assert frame_numbers(clip.video) == [13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 22, 22]
    heard = tone(TONES, 2.0, 16000)[8000:14400].float()
    assert (clip.audio[:6400] - heard).abs().max() < 0.1
    assert clip.audio[6400:].abs().max() == 0
    beyond = load_clip(Example(str(media / "long.mp4"), start=1.9, end=99.0), CONFIG, 16)
    assert beyond.chunks == 1


def test_a_longer_span_is_read_as_chunks_spread_over_it(media):
    path, piece = media / "long.mp4", 0.16
    clip = load_clip(Example(str(path), start=0.2, end=1.8), CONFIG, 4)
    assert clip.chunks == 4
    torch.testing.assert_close(clip.times, torch.linspace(0, 1.6 - piece, 4))
    for t, start in enumerate(clip.times.double() + 0.2):
        alone = load(path, chunks=1, start=float(start), **SIZE)
        assert torch.equal(clip.video[:, 4 * t : 4 * t + 4], alone.video)
        assert (clip.audio[2560 * t : 2560 * (t + 1)] - alone.audio).abs().max() < 1e-2


def test_a_span_shorter_than_a_frame_has_one(media):
    clip = load_clip(Example(str(media / "long.mp4"), start=1.0, end=1.001), CONFIG, 16)
    assert clip.chunks == 1
    assert len(set(frame_numbers(clip.video))) == 1
    assert clip.audio[:16].abs().max() > 0
    assert clip.audio[16:].abs().max() == 0


def test_files_without_sound_or_picture_say_so(media):
    silent, sound = (load_clip(Example(str(media / name)), CONFIG, 16) for name in ("silent.mp4", "sound.wav"))
    assert (silent.video_present, silent.audio_present, silent.audio) == (True, False, None)
    assert (sound.video_present, sound.audio_present, sound.video) == (False, True, None)
    assert (silent.chunks, sound.chunks) == (3, 4)


def test_a_track_that_has_ended_before_the_span_is_absent(tmp_path):
    path = write_clip(tmp_path / "x.mkv", seconds=1.0, sound_from=0.6, tones=(300.0,), width=32, height=32)
    clip = load_clip(Example(str(path), start=0.0, end=0.4), CONFIG, 16)
    assert (clip.video_present, clip.audio_present) == (True, False)


@pytest.mark.parametrize("name", ["still.png", "still.jpg"])
def test_an_image_is_a_chunk_that_stands_still(media, tmp_path, name):
    from PIL import Image

    Image.open(media / "still.png").save(tmp_path / name)
    clip = load_clip(Example(str(tmp_path / name)), CONFIG, 16)
    assert (clip.chunks, clip.video_present, clip.audio_present) == (1, True, False)
    assert clip.video.shape == (3, 4, 32, 32)
    assert (clip.video.float() - torch.tensor([200.0, 30.0, 90.0])[:, None, None, None]).abs().max() <= 4


def test_a_file_that_does_not_tell_its_duration_is_measured_by_its_packets(tmp_path):
    path = write_clip(tmp_path / "x.mkv", seconds=0.8, options={"live": "1"}, width=32, height=32)
    with av.open(str(path)) as container:
        assert container.duration is None
    assert load_clip(Example(str(path)), CONFIG, 16).chunks == 5 + 1  # the encoder's padding of the sound


def test_what_cannot_be_read_is_named(media, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"clip must be a media file, was .*none\.mp4"):
        load_clip(Example(str(tmp_path / "none.mp4")), CONFIG, 4)
    with pytest.raises(ValueError, match=r"start must lie before the end of .*0\.mp4 at 0\.4"):
        load_clip(Example(str(media / "0.mp4"), start=0.5), CONFIG, 4)
    (tmp_path / "text.mp4").write_text("nothing to see here")
    with pytest.raises(ValueError, match=re.escape("text.mp4")):
        load_clip(Example(str(tmp_path / "text.mp4")), CONFIG, 4)


@pytest.mark.filterwarnings("ignore:.* cannot be decoded:UserWarning")
def test_damaged_files_give_a_clip_or_a_named_error(media, tmp_path):
    good = (media / "4.mp4").read_bytes()
    random = torch.Generator().manual_seed(0)
    outcomes = {"clip": 0, "error": 0}
    for _ in range(60):
        bad = bytearray(good)
        for place in torch.randint(0, len(bad), (40,), generator=random).tolist():
            bad[place] ^= 0xFF
        path = tmp_path / "bad.mp4"
        path.write_bytes(bad[: int(torch.randint(100, len(bad), (), generator=random))])
        try:
            clip = load_clip(Example(str(path)), CONFIG, 8)
        except (OSError, ValueError) as error:
            outcomes["error"] += "bad.mp4" in str(error)
        else:
            assert 1 <= clip.chunks <= 8
            outcomes["clip"] += 1
    shutil.copy(media / "4.mp4", tmp_path / "bad.mp4")
    assert load_clip(Example(str(tmp_path / "bad.mp4")), CONFIG, 8).chunks == 5
    assert min(outcomes.values()) > 0
    assert sum(outcomes.values()) == 60, outcomes


def test_present_is_what_is_given_unless_it_is_said():
    assert not ClipTensors(torch.zeros(1), audio=torch.zeros(4)).video_present
    assert ClipTensors(torch.zeros(1), video_features=torch.zeros(1, 2, 3)).video_present
    assert not ClipTensors(torch.zeros(1), video_features=torch.zeros(1, 2, 3), video_present=False).video_present
