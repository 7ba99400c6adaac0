"""Pieces of any size into chunks: what `load` cuts from a file, to the bit, and sane chunks of streams that limp."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch.testing import assert_close

pytest.importorskip("av")

from clips import write_clip
from mirasol.media import load
from mirasol.media.frames import make_picture
from mirasol.media.source import open_source
from mirasol.streaming.clock import LEAP
from mirasol.streaming.cutter import Cutter

RATE, SIZE, FRAMES, SAMPLES = 8000, 16, 4, 2000
SECONDS = SAMPLES / RATE
SHAPE = dict(frames_per_chunk=FRAMES, samples_per_chunk=SAMPLES, sample_rate=RATE)


def cutter(**changes) -> Cutter:
    return Cutter(**{**SHAPE, "image_size": SIZE, **changes})


def numbered(numbers) -> torch.Tensor:
    """Frames that each hold their number."""
    values = torch.tensor([number % 256 for number in numbers], dtype=torch.uint8)
    return values.view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE)


def shown(chunk) -> list[int] | None:
    return None if chunk.video is None else chunk.video[0, :, 0, 0].tolist()


def offered(cut: Cutter, pieces) -> list:
    """The chunks of pieces (kind, time of the first, material, times of frames), asked for after each."""
    chunks = []
    for kind, time, material, times in pieces:
        if kind == "video":
            cut.frames(material, times)
        else:
            cut.samples(material, time)
        chunks += cut.ready()
    return [*chunks, *cut.finish()]


def in_pieces(rng: random.Random, frames, times, sounds):
    """Frames and sounds (time, samples) in pieces of random sizes, in the order in which they end."""
    pieces, first = [], 0
    while first < len(times):
        count = rng.randint(1, 6)
        pieces.append((times[min(first + count, len(times)) - 1], "video", first, count))
        first += count
    for number, (time, samples) in enumerate(sounds):
        first = 0
        while first < len(samples):
            count = min(rng.choice([1, 160, rng.randint(1, RATE)]), len(samples) - first)
            pieces.append((time + (first + count) / RATE, "audio", (number, first), count))
            first += count
    for _, kind, first, count in sorted(pieces, key=lambda piece: piece[0]):
        if kind == "video":
            yield kind, None, frames[first : first + count], times[first : first + count]
        else:
            number, begin = first
            time, samples = sounds[number]
            told = time + begin / RATE if begin == 0 or rng.random() < 0.5 else None
            yield kind, told, samples[begin : begin + count], None


def expect_same(chunks, others) -> None:
    assert [(chunk.index, chunk.start) for chunk in chunks] == [(chunk.index, chunk.start) for chunk in others]
    for chunk, other in zip(chunks, others, strict=True):
        for name in ("video", "audio"):
            ours, theirs = getattr(chunk, name), getattr(other, name)
            assert (ours is None) == (theirs is None), (chunk.index, name)
            assert ours is None or torch.equal(ours, theirs), (chunk.index, name)


FILES = {
    "plain.mp4": {},
    "b-frames.ts": dict(codec="libx264", b_frames=2),
    "variable.mkv": dict(stamps=[0, 0.01, 0.05, 0.5, 0.51, 1.1, 1.15, 1.2, 1.7, 2.3, 2.9, 2.95], seconds=3.0),
    "holes.mkv": dict(audio_codec="pcm_s16le", silence=(0.5, 1.6), seconds=3.0),
    "late sound.mkv": dict(audio_codec="pcm_s16le", sound_from=0.83, rate=16000),
    "silent.mp4": dict(tones=None),
    "sound alone.wav": dict(width=0, audio_codec="pcm_s16le", rate=RATE),
    "short sound.mkv": dict(sound_seconds=1.1, audio_codec="pcm_s16le"),
    "short picture.mkv": dict(seconds=1.0, sound_seconds=2.2, audio_codec="pcm_s16le"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_cut_as_load_cuts_it(tmp_path, name):
    file = write_clip(tmp_path / name, **FILES[name])
    frames, times = [], []
    with open_source(file, 1) as source:
        for kind, frame in source.decode(lambda kind: kind == "video", math.inf):
            assert kind == "video"
            frames.append(make_picture(frame, (SIZE, SIZE), "crop"))
            times.append(source.time_of(frame))
    whole = load(file, chunks=1, frames_per_chunk=1, size=SIZE, samples_per_chunk=4 * RATE, sample_rate=RATE)
    sounds = []
    if whole.audio is not None:
        borders = [0, *((whole.audio_valid[1:] != whole.audio_valid[:-1]).nonzero().flatten() + 1).tolist(), 4 * RATE]
        spans = [(first, last) for first, last in itertools.pairwise(borders) if whole.audio_valid[first]]
        sounds = [(first / RATE, whole.audio[first:last]) for first, last in spans]

    frames = torch.stack(frames) if frames else torch.empty(0, 3, SIZE, SIZE, dtype=torch.uint8)
    chunks = offered(cutter(), in_pieces(random.Random(name), frames, times, sounds))
    expected = load(file, chunks=len(chunks), size=SIZE, **SHAPE)
    end = max([sound[0] + len(sound[1]) / RATE for sound in sounds] + [time + 0.04 for time in times])
    assert len(chunks) == pytest.approx(end / SECONDS, abs=1.0)
    for t, chunk in enumerate(chunks):
        assert (chunk.index, chunk.start) == (t, t * SECONDS)
        video = None if expected.video is None else expected.video[:, t * FRAMES : (t + 1) * FRAMES]
        if video is not None and expected.video_valid[t].any():
            assert torch.equal(chunk.video, video)
            assert chunk.video.is_contiguous()
        else:
            assert chunk.video is None
        samples = slice(t * SAMPLES, (t + 1) * SAMPLES)
        if expected.audio is not None and expected.audio_valid[samples].any():
            assert torch.equal(chunk.audio, expected.audio[samples])
        else:
            assert chunk.audio is None


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), offset=st.sampled_from([0.0, -0.02, 1.7e9]), data=st.data())
def test_pieces_of_any_size_give_the_same_chunks(seed, offset, data):
    rng = random.Random(seed)
    gaps = data.draw(st.lists(st.sampled_from([0.001, 0.033, 0.04, 0.3]), min_size=1, max_size=60))
    times = [offset + sum(gaps[:i]) for i in range(len(gaps))]
    frames = torch.randint(0, 256, (len(times), 3, SIZE, SIZE), dtype=torch.uint8)
    hole = data.draw(st.sampled_from([0.0, 0.004, 0.1, 0.9]))
    sounds = [(offset, torch.rand(rng.randint(1, 2 * RATE)))]
    sounds.append((offset + len(sounds[0][1]) / RATE + hole, torch.rand(rng.randint(1, RATE))))
    patient = dict(patience=10.0)
    whole = [("video", None, frames, times), *(("audio", time, samples, None) for time, samples in sounds)]
    pieces = list(in_pieces(rng, frames, times, sounds))
    expect_same(offered(cutter(**patient), pieces), offered(cutter(**patient), whole))

    # stopped anywhere and restored, in the middle of a chunk
    cut, chunks = cutter(**patient), []
    for kind, time, material, told in pieces:
        cut.frames(material, told) if kind == "video" else cut.samples(material, time)
        chunks += cut.ready()
        if rng.random() < 0.3:
            state, cut = load_tensors(save_tensors(cut.state_dict())), cutter(**patient)
            cut.load_state_dict(state)
    expect_same([*chunks, *cut.finish()], offered(cutter(**patient), whole))


def test_a_dropped_frame_leaves_the_one_before():
    cut = cutter()
    cut.samples(torch.zeros(3 * SAMPLES), 0.0)
    times = [i / 16 for i in range(12)]
    kept = [i for i in range(12) if i not in (2, 5, 6, 7)]
    cut.frames(numbered(kept), [times[i] for i in kept])
    chunks = [*cut.ready(), *cut.finish()]
    assert [shown(chunk) for chunk in chunks] == [[0, 1, 1, 3], [4, 4, 4, 4], [8, 9, 10, 11]]


def test_frames_too_many_late_or_without_a_time_are_passed_over():
    cut = cutter()
    cut.samples(torch.zeros(SAMPLES), 0.0)
    times = [0.0, math.nan, 0.02, 0.04, 0.01, 0.07, math.inf, 0.14, 0.2, 0.3]
    cut.frames(numbered(range(10)), times)
    (chunk,) = cut.ready()
    assert shown(chunk) == [2, 5, 7, 8]  # looked at at 1/32, 3/32, 5/32, 7/32


def test_a_chunk_waits_for_both_kinds_and_no_longer_than_patience():
    cut = cutter(patience=0.5)
    cut.frames(numbered(range(8)), [i / 16 for i in range(8)])
    assert not list(cut.ready())
    cut.samples(torch.ones(SAMPLES), 0.0)
    assert [chunk.index for chunk in cut.ready()] == [0]
    cut.frames(numbered(range(8, 24)), [i / 16 for i in range(8, 24)])  # up to 23 / 16, sound up to 4 / 16
    chunks = list(cut.ready())
    assert [chunk.index for chunk in chunks] == [1, 2, 3, 4]
    assert all(chunk.audio is None and chunk.video is not None for chunk in chunks)
    cut.samples(torch.ones(6 * SAMPLES), None)  # comes too late, but for what lies in the chunks to come
    chunks = list(cut.finish())
    assert [chunk.index for chunk in chunks] == [5, 6]
    assert (chunks[0].audio == 1).all()
    assert shown(chunks[0]) == [20, 21, 22, 23]
    assert shown(chunks[1]) is None


@pytest.mark.parametrize("dies", ["video", "audio", "never video", "never audio"])
def test_a_kind_that_dies_is_missing_and_comes_back(dies):
    cut, chunks, waits = cutter(), [], []
    gone = range(0 if "never" in dies else 100, 400)
    for i in range(480):  # sixteenths of a second
        if not ("video" in dies and i in gone):
            cut.frames(numbered([i]), [i / 16])
        if not ("audio" in dies and i in gone):
            cut.samples(torch.full((RATE // 16,), 1.0 + i), i / 16)
        new = list(cut.ready())
        chunks += new
        waits.append((i + 1) / 16 - (len(chunks) * SECONDS))
    assert max(waits) <= 2.0 + 2 * SECONDS
    assert sum(waits[150:390]) / 240 < SECONDS  # nothing is waited for that stays away
    present = [chunk.video is not None if "video" in dies else chunk.audio is not None for chunk in chunks]
    assert present == [4 * t not in gone for t in range(len(chunks))]
    other = [chunk.audio is not None if "video" in dies else chunk.video is not None for chunk in chunks]
    assert all(other)
    assert len(chunks) >= 118


def test_partly_present_sound_is_zeros_elsewhere():
    cut = cutter()
    cut.samples(torch.ones(500), 0.05)
    cut.samples(torch.ones(500), 0.15)
    cut.frames(numbered([0]), [0.0])
    (chunk,) = cut.finish()
    expected = torch.zeros(SAMPLES)
    expected[400:900] = expected[1200:1700] = 1
    assert torch.equal(chunk.audio, expected)


def test_clocks_that_drift_apart():
    """A sound card that gives 8016 samples a second, 0.2 % too many: the sound stays within 5 ms of its times."""

    def sound(rate: int) -> torch.Tensor:
        time = torch.arange(40 * rate, dtype=torch.float64) / rate
        return sum((2 * math.pi * hz * time).sin() for hz in (97.0, 211.0, 353.0, 457.0)).float()

    cut, chunks, block, given, count = cutter(), [], 167, sound(8016), 0
    for i in range(40 * 16):
        cut.frames(numbered([i]), [i / 16])
        while (count + block) / 8016 <= (i + 1) / 16:
            cut.samples(given[count : count + block], count / 8016)
            count += block
        chunks += cut.ready()
    assert len(chunks) >= 158
    heard, true = torch.cat([chunk.audio for chunk in chunks]), sound(RATE)
    for at in range(RATE, 38 * RATE, RATE):
        shifts = range(-100, 101)
        errors = [(heard[at + shift :][:800] - true[at:][:800]).square().mean() for shift in shifts]
        assert abs(shifts[int(torch.stack(errors).argmin())]) <= 0.005 * RATE + 2, at / RATE


def test_small_noise_of_timestamps_moves_no_sample():
    cut, rng, sound = cutter(), random.Random(1), torch.rand(4 * SAMPLES)
    for first in range(0, len(sound), 100):
        cut.samples(sound[first : first + 100], first / RATE + rng.uniform(-0.0015, 0.0015) * (first > 0))
    chunks = list(cut.finish())
    assert torch.equal(torch.cat([chunk.audio for chunk in chunks]), sound)


@pytest.mark.parametrize("start", [0.0, 1.7e9, -5e5])
def test_a_camera_that_restarts_is_followed(start):
    """Its clock begins at 0 again, pictures a little before the sound; both stay together and the stream goes on."""
    cut, chunks = cutter(), []
    for i in range(320):
        clock = start + i / 16 if i < 160 else (i - 160) / 16
        cut.frames(numbered([i]), [clock])
        cut.samples(torch.full((RATE // 16,), float(i)), clock)
        chunks += cut.ready()
    assert len(chunks) >= 78
    for chunk in chunks:
        pictures = torch.tensor(shown(chunk))
        heard = chunk.audio.view(FRAMES, -1)[:, RATE // 32] % 256
        assert (pictures - heard).abs().max() <= 1
        assert abs(pictures[0] - 4 * chunk.index % 256) <= 2


def test_one_clock_set_anew_does_not_stop_the_other():
    cut, chunks = cutter(), []
    for i in range(480):
        cut.frames(numbered([i]), [i / 16 if i < 100 else 1e6 + i / 16])
        cut.samples(torch.ones(RATE // 16), i / 16)
        chunks += cut.ready()
    assert len(chunks) >= 118
    assert all(chunk.audio is not None and chunk.video is not None for chunk in chunks)
    assert all(abs(shown(chunk)[0] - 4 * chunk.index % 256) <= 2 for chunk in chunks)


def test_a_pause_is_a_hole_and_a_leap_is_not():
    for seconds, expected in ((10.0, 40), (LEAP + 10, 0)):
        cut = cutter()
        for begin in (0.0, 1.0 + seconds):
            cut.frames(numbered(range(16)), [begin + i / 16 for i in range(16)])
            cut.samples(torch.ones(RATE), begin)
        chunks = [*cut.ready(), *cut.finish()]
        assert len(chunks) == 8 + expected
        assert sum(chunk.audio is None for chunk in chunks) == expected


@settings(deadline=None, max_examples=100)
@given(
    pieces=st.lists(
        st.tuples(st.booleans(), st.floats(allow_nan=True, allow_infinity=True, width=32), st.integers(0, 3 * SAMPLES)),
        max_size=40,
    )
)
def test_whatever_the_times_are_it_neither_fails_nor_grows(pieces):
    cut = cutter()
    for is_video, time, count in pieces:
        if is_video:
            cut.frames(numbered([count]), [time])
        else:
            cut.samples(torch.ones(count), time)
        before = -1
        for chunk in cut.ready():
            assert chunk.index > before
            before = chunk.index
        held = cut.state_dict()
        assert len(held["sound"]) <= 2.0 / SECONDS + 2
        assert len(held["pictures"]) <= 2.0 / SECONDS * FRAMES + FRAMES


def test_what_is_kept_is_its_own():
    """Frames and samples may be written over after they are given, as a camera's buffer is."""
    cut = cutter()
    frames, samples = numbered(range(2)).clone(), torch.ones(SAMPLES // 2)
    cut.frames(frames, [0.0, 0.1])
    cut.samples(samples, 0.0)
    frames.zero_().add_(77)
    samples.zero_()
    state = cut.state_dict()
    cut.frames(frames, [0.2, 0.3])
    cut.samples(torch.ones(SAMPLES), None)
    (chunk,) = cut.ready()
    assert shown(chunk) == [0, 0, 1, 77]
    assert (chunk.audio == 1).all()
    other = cutter()
    other.load_state_dict(state)
    assert shown(next(other.finish())) == [0, 0, 1, 1]


def test_nothing_gives_nothing():
    assert not list(cutter().ready())
    assert not list(cutter().finish())
    cut = cutter()
    cut.frames(numbered([7]), [0.0])
    assert [shown(chunk) for chunk in cut.finish()] == [[7] * FRAMES]


def test_mistakes_are_named():
    for name in SHAPE:
        with pytest.raises(ValueError, match=f"{name} must be at least 1, was 0"):
            cutter(**{name: 0})
    with pytest.raises(ValueError, match="patience must be seconds, at least 0, was -1"):
        cutter(patience=-1)
    cut = cutter()
    with pytest.raises(ValueError, match=r"frames must be \[N, 3, image_size, image_size\] = \[1, 3, 16, 16\]"):
        cut.frames(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [0.0])
    with pytest.raises(ValueError, match="times must hold a time for each of 2 frames"):
        cut.frames(numbered([1, 2]), [0.0])
    with pytest.raises(TypeError, match="samples must be of dtype float32"):
        cut.samples(torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="state must hold counts, position"):
        cut.load_state_dict({})
    with pytest.raises(ValueError, match=r"state\['shown'\] must be of a cutter with these sizes"):
        cut.load_state_dict(cutter(image_size=8).state_dict())
    assert_close(cut.state_dict(), cutter().state_dict(), equal_nan=True)
