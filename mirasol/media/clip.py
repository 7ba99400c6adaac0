"""The clip that the model takes, and how a file becomes one."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch

from mirasol.kernels.core.checks import describe, expect, expect_int

from .frames import FrameSampler, make_picture
from .reading import Reader
from .sound import SoundTrack
from .source import Source, open_source
from .timing import instant
from .tracks import TrackFailure

MAX_TOLD_SAMPLES = 2**26
"""Of sound, where the file alone says how long it is: 70 minutes at 16 kHz, 320 MB with the mask."""


@dataclass(frozen=True, eq=False, repr=False)
class Clip:
    """T chunks of F frames and S samples, cut at the same borders: chunk t lasts S / sample_rate from its time on.

    video: uint8 [3, T * F, H, W], RGB; frames t F .. (t + 1) F belong to chunk t. None without a video track.
    audio: float32 [T * S], mono, in -1 .. 1; samples t S .. (t + 1) S belong to chunk t. None without an audio track.
    times: float64 [T, F], when each frame came on screen: its timestamp in seconds from the video's start.
    chunk_times: float64 [T], when each chunk starts, in seconds from the span's start: t S / sample_rate, unless the
        chunks are spread.
    video_valid: bool [T, F], false where the file shows nothing at the instant asked for; the nearest frame stands in.
    audio_valid: bool [T * S], false where the file has no sound; there `audio` is 0.
    sample_rate: of `audio`, Hz.
    start, duration: of the span, seconds from the video's start.

    `times` and `video_valid` are None without a video track, `audio_valid` without an audio track.
    """

    video: torch.Tensor | None
    audio: torch.Tensor | None
    times: torch.Tensor | None
    chunk_times: torch.Tensor
    video_valid: torch.Tensor | None
    audio_valid: torch.Tensor | None
    sample_rate: int
    start: float
    duration: float

    def __repr__(self) -> str:
        video, audio = ("None" if track is None else describe(track) for track in (self.video, self.audio))
        span = f"{self.start:g} .. {self.start + self.duration:g} s"
        return f"Clip(video={video}, audio={audio}, {span}, sample_rate={self.sample_rate})"


@dataclass(frozen=True)
class _Request:
    """The arguments of `load`, checked."""

    chunks: int
    frames: int
    size: tuple[int, int]
    samples: int | None
    sample_rate: int
    start: float
    duration: float | None
    spread: bool
    fit: str


def load(
    path: str | PathLike[str] | BinaryIO,
    *,
    chunks: int,
    frames_per_chunk: int,
    size: int | tuple[int, int],
    samples_per_chunk: int | None = None,
    sample_rate: int = 16000,
    start: float = 0.0,
    duration: float | None = None,
    spread: bool = False,
    fit: Literal["crop", "squash"] = "crop",
    threads: int | None = None,
) -> Clip:
    """Read a span of a file as `chunks` equal pieces of time, each with its frames and its sound.

    Time 0 is the start of the video track (of the audio track where there is no video); pictures and sound are placed
    by their timestamps, sound to the nearest sample, as precisely as the container holds them (Matroska: a
    millisecond; AVI has none for reordered frames, which may be off by a frame or two). A piece lasts S / sample_rate
    seconds. Frame f of a piece that starts at s is the one on screen at `s + (f + 1/2) / F * S / sample_rate`; the
    sound of a piece is all of that piece's time, never stretched.

    The pieces follow each other, piece t from `start + t S / sample_rate` on. With `spread` they lie evenly over the
    span, the first at its start and the last at its end: piece t starts at
    `start + t (duration - S / sample_rate) / (T - 1)`, a single one in the middle, at
    `start + (duration - S / sample_rate) / 2`. In a span shorter than T pieces they follow each other all the same,
    from `start` to beyond the span's end.

    A track that cannot be decoded is passed over for the next one of its kind that can be, or for none, with a warning.
    Nothing but the file itself is opened: no playlist, no network, whatever the file or its name says. Memory is that
    of the result and of what one decoder holds; limits on what a file may claim keep that below 1 GB, with the default
    of `threads`.

    Args:
        path: a media file in one of the containers of `mirasol.media.source.FORMATS`. Its first video track (cover
            pictures aside) and first audio track are used. Or a binary file that is open and can be sought, as the
            bytes of such a file in memory or in an archive are; its `name` is told in errors, and it stays open.
        chunks: T.
        frames_per_chunk: F.
        size: pixels of the result, H = W or (H, W).
        samples_per_chunk: S; default: the piece's duration times `sample_rate`, rounded. Required with `spread`.
        sample_rate: Hz; the sound is resampled and mixed to mono, with weights that sum to 1.
        start: seconds, at least 0.
        duration: of the span, seconds. Default: T S / sample_rate where S is given and the pieces are not spread, else
            to the end of the file. Unless the pieces are spread, it is rounded so that each has whole samples.
        spread: lay the pieces apart, over the whole span.
        fit: "crop" keeps the largest part in the middle of the picture that has the shape of `size`, to the nearest
            pixel; "squash" keeps all of it. Either is then resized by
            `torch.nn.functional.interpolate(mode="bilinear", antialias=True)` on uint8 RGB, after the rotation that
            the file asks for. Pixels are taken as square.
        threads: of the video decoder. Default: 1 in a worker of `torch.utils.data.DataLoader`, else a thread a core
            (at most 16), and fewer for pictures so large that the threads would fill the memory.
    Returns:
        A `Clip`. Past the end of a track the last frame is repeated and the sound is 0; the masks tell.
    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: no such file.
        ValueError: an argument out of range; `samples_per_chunk` that is not the duration's; a file that FFmpeg cannot
            read, that is none of those containers, has neither track, holds pictures of more than 2^24 pixels, 2^14 a
            side or 32 MiB, holds nothing in the span, does not tell its duration where it is needed, or says that it
            is longer than 2^26 samples of sound where S is not given. The message names the file.
    Warns:
        UserWarning: a track is passed over; names the file, the track, its codec and why.
    """
    for name, value in (("chunks", chunks), ("frames_per_chunk", frames_per_chunk), ("sample_rate", sample_rate)):
        expect_int(name, value)
    height_width = _size(size)
    expect(_is_time(start) and start >= 0, "start", "be a finite number of seconds, at least 0", start)
    expect(fit in ("crop", "squash"), "fit", 'be "crop" or "squash"', fit)
    for name, optional in (("threads", threads), ("samples_per_chunk", samples_per_chunk)):
        if optional is not None:
            expect_int(name, optional)
    must = "be a positive, finite number of seconds"
    expect(duration is None or (_is_time(duration) and duration > 0), "duration", must, duration)
    expect(not spread or samples_per_chunk is not None, "samples_per_chunk", "be given with spread", samples_per_chunk)
    file = Path(fspath(path)) if isinstance(path, str | PathLike) else path
    if isinstance(file, Path) and not file.is_file():
        raise FileNotFoundError(f"path must be a file, was {str(file)!r}: no such file")

    request = _Request(
        chunks, frames_per_chunk, height_width, samples_per_chunk, sample_rate, start, duration, spread, fit
    )
    with open_source(file, threads) as source:
        while True:
            try:
                clip = _load(source, request)
                break
            except TrackFailure as failure:
                source.leave_out(failure)
        for reason in source.left_out:
            warnings.warn(f"{source.path}: {reason}", stacklevel=2)
    return clip


def _load(source: Source, request: _Request) -> Clip:
    """The clip from the tracks that the source has chosen."""
    samples, duration = _plan(source, request)
    chunks, frames, rate = request.chunks, request.frames, request.sample_rate
    piece = samples / rate
    spread = request.spread and duration > chunks * piece
    starts = _starts(request.start, duration - piece, chunks) if spread else [request.start]
    frames_each = chunks * frames // len(starts)  # of the one long piece that contiguous chunks are, or of each chunk
    samples_each = chunks * samples // len(starts)
    sampler, tracks, audio, audio_valid = None, [], None, None
    if source.video is not None:
        instants = [[start + instant(frame, piece, frames) for frame in range(frames_each)] for start in starts]
        pictures = torch.empty(3, chunks * frames, *request.size, dtype=torch.uint8)
        sampler = FrameSampler(
            source, request.start, instants, pictures, lambda frame: make_picture(frame, request.size, request.fit)
        )
    if source.audio is not None:
        audio, audio_valid = torch.zeros(chunks * samples), torch.zeros(chunks * samples, dtype=torch.bool)
        pieces = zip(starts, audio.split(samples_each), audio_valid.split(samples_each), strict=True)
        tracks = [SoundTrack(source, start, rate, part, valid) for start, part, valid in pieces]
    Reader(source, starts, samples_each / rate, sampler, tracks).read()

    shows = (sampler is not None and sampler.shows) or (audio_valid is not None and bool(audio_valid.any()))
    expect(shows, "start", f"lie before the end of {source.path.name}", request.start)
    shape = (chunks, frames)
    chunk_times = torch.arange(chunks, dtype=torch.float64) * samples / rate
    return Clip(
        video=sampler.pictures if sampler is not None else None,
        audio=audio,
        times=torch.tensor(sampler.times, dtype=torch.float64).view(shape) if sampler is not None else None,
        chunk_times=torch.tensor(starts, dtype=torch.float64) - request.start if spread else chunk_times,
        video_valid=torch.tensor(sampler.valid).view(shape) if sampler is not None else None,
        audio_valid=audio_valid,
        sample_rate=rate,
        start=float(request.start),
        duration=duration if spread else chunks * piece,
    )


def _starts(start: float, way: float, chunks: int) -> list[float]:
    """Where chunks start that are spread, in seconds; the last one `way` after the first, a single one halfway."""
    if chunks == 1:
        return [start + way / 2]
    return [start + t * way / (chunks - 1) for t in range(chunks)]


def _plan(source: Source, request: _Request) -> tuple[int, float]:
    """(samples of a chunk, seconds of the span)."""
    samples, rate, chunks, start = request.samples, request.sample_rate, request.chunks, request.start
    if samples is not None and not request.spread and request.duration is None:
        return samples, chunks * samples / rate
    duration = request.duration
    name = source.path.name
    if duration is None:
        whole = source.duration()
        if whole is None:
            raise ValueError(f"duration must be given, for {name} does not tell its own, was None")
        expect(start < whole, "start", f"lie before the end of {name} at {whole:.3f} s", start)
        duration = whole - start
        if samples is None and source.audio is not None:
            must = f"be given, for {name} says that it lasts {whole:.0f} s: more than {MAX_TOLD_SAMPLES} samples"
            expect(duration * rate <= MAX_TOLD_SAMPLES, "samples_per_chunk", must, None)
    if samples is not None and request.spread:
        return samples, duration
    rounded = round(duration / chunks * rate)
    expect(rounded > 0, "duration", f"give each of {chunks} chunks of {name} a sample at {rate} Hz", duration)
    if samples is not None:
        must = f"be duration / chunks * sample_rate = {rounded} (or leave duration out)"
        expect(samples == rounded, "samples_per_chunk", must, samples)
    return rounded, duration


def _size(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    expect(len(pair) == 2, "size", "be an int or (H, W)", size)
    for side in pair:
        expect_int("size", side)
    return pair[0], pair[1]


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
