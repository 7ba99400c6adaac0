"""The clip that the model takes, and how a file becomes one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

import torch

from mirasol.kernels.core.checks import describe, expect, expect_int

from .frames import FrameSampler, make_picture
from .sound import SoundTrack
from .source import Source, open_source

SEEK_MARGINS = (1.0, 10.0)
"""Seconds before the span at which decoding starts: the first covers the decoders' warm-up and what a container leaves
between picture and sound; the second is for files whose index leads to no key frame in time."""


@dataclass(frozen=True, eq=False, repr=False)
class Clip:
    """T chunks of F frames and S samples, cut at the same borders: chunk t lasts from t to t + 1 times S / sample_rate.

    video: uint8 [3, T * F, H, W], RGB; frames t F .. (t + 1) F belong to chunk t. None without a video track.
    audio: float32 [T * S], mono, in -1 .. 1; samples t S .. (t + 1) S belong to chunk t. None without an audio track.
    times: float64 [T, F], when each frame came on screen: its timestamp in seconds from the video's start.
    video_valid: bool [T, F], false where the file shows nothing at the instant asked for; the nearest frame stands in.
    audio_valid: bool [T * S], false where the file has no sound; there `audio` is 0.
    sample_rate: of `audio`, Hz.
    start, duration: of the span, seconds from the video's start.

    `times` and `video_valid` are None without a video track, `audio_valid` without an audio track.
    """

    video: torch.Tensor | None
    audio: torch.Tensor | None
    times: torch.Tensor | None
    video_valid: torch.Tensor | None
    audio_valid: torch.Tensor | None
    sample_rate: int
    start: float
    duration: float

    def __repr__(self) -> str:
        video, audio = ("None" if track is None else describe(track) for track in (self.video, self.audio))
        span = f"{self.start:g} .. {self.start + self.duration:g} s"
        return f"Clip(video={video}, audio={audio}, {span}, sample_rate={self.sample_rate})"


def load(
    path: str | PathLike[str],
    *,
    chunks: int,
    frames_per_chunk: int,
    size: int | tuple[int, int],
    samples_per_chunk: int | None = None,
    sample_rate: int = 16000,
    start: float = 0.0,
    duration: float | None = None,
    fit: Literal["crop", "squash"] = "crop",
    fast_resize: bool = False,
    threads: int | None = None,
) -> Clip:
    """Read a span of a file as `chunks` equal pieces of time, each with its frames and its sound.

    Time 0 is the start of the video track (of the audio track where there is no video); pictures and sound are placed
    by their timestamps, as precisely as the container holds them (Matroska: a millisecond; AVI has none for reordered
    frames, which may be off by a frame or two). Frame f of piece t is the one on screen at
    `start + (t + (f + 1/2) / F) S / sample_rate`; the sound of a piece is all of that piece's time, never stretched.

    Args:
        path: a file that FFmpeg reads. Its first video track (cover pictures aside) and first audio track are used.
        chunks: T.
        frames_per_chunk: F.
        size: pixels of the result, H = W or (H, W).
        samples_per_chunk: S; default: the piece's duration times `sample_rate`, rounded.
        sample_rate: Hz; the sound is resampled and mixed to mono, with weights that sum to 1.
        start: seconds, at least 0.
        duration: seconds. Default: T S / sample_rate where S is given, else to the end of the file. It is rounded so
            that a piece has a whole number of samples.
        fit: "crop" resizes until the picture covers `size` (the shorter side fits) and keeps the centre; "squash" gives
            up the aspect ratio. Either is `torch.nn.functional.interpolate(mode="bilinear", antialias=True)` on uint8
            RGB, after the rotation that the file asks for. Pixels are taken as square.
        fast_resize: resize in FFmpeg's swscale instead, bilinear: quicker for large frames, with other values.
        threads: of the video decoder. Default: 1 in a worker of `torch.utils.data.DataLoader`, else FFmpeg's choice.
    Returns:
        A `Clip`. Past the end of a track the last frame is repeated and the sound is 0; the masks tell.
    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: no such file.
        ValueError: an argument out of range; `samples_per_chunk` that is not the duration's; a file that FFmpeg cannot
            read, has neither track, holds nothing in the span, or does not tell its duration where it is needed.
    """
    for name, value in (("chunks", chunks), ("frames_per_chunk", frames_per_chunk), ("sample_rate", sample_rate)):
        expect_int(name, value)
    height_width = _size(size)
    expect(_is_time(start) and start >= 0, "start", "be a finite number of seconds, at least 0", start)
    expect(fit in ("crop", "squash"), "fit", 'be "crop" or "squash"', fit)
    if threads is not None:
        expect_int("threads", threads)
    file = Path(fspath(path))
    if not file.is_file():
        raise FileNotFoundError(f"path must be a file, was {str(file)!r}: no such file")

    with open_source(file, threads) as source:
        samples = _samples_per_chunk(source, chunks, samples_per_chunk, sample_rate, start, duration)
        piece = samples / sample_rate
        sampler, track = None, None
        if source.video is not None:
            grid = torch.arange(chunks * frames_per_chunk, dtype=torch.float64)
            instants = (start + (grid + 0.5) * (piece / frames_per_chunk)).tolist()
            sampler = FrameSampler(source, instants, lambda frame: make_picture(frame, height_width, fit, fast_resize))
        if source.audio is not None:
            track = SoundTrack(source, start, chunks * samples, sample_rate)
        _read(source, sampler, track, start)

    shape = (chunks, frames_per_chunk)
    clip = Clip(
        video=torch.stack(sampler.pictures, dim=1) if sampler is not None else None,
        audio=track.samples if track is not None else None,
        times=torch.tensor(sampler.times, dtype=torch.float64).view(shape) if sampler is not None else None,
        video_valid=torch.tensor(sampler.valid).view(shape) if sampler is not None else None,
        audio_valid=track.valid if track is not None else None,
        sample_rate=sample_rate,
        start=float(start),
        duration=chunks * piece,
    )
    if not any(valid is not None and valid.any() for valid in (clip.video_valid, clip.audio_valid)):
        raise ValueError(f"start must lie before the end of {file.name}, was {start}")
    return clip


def _read(source: Source, sampler: FrameSampler | None, track: SoundTrack | None, start: float) -> None:
    """Fill sampler and track, from shortly before the span where the file lets us, else from the file's start."""
    for margin in SEEK_MARGINS:
        if start > margin and source.seek(start - margin):
            if _pass(source, sampler, track, after_seek=True):
                return
            source.reopen()
    _pass(source, sampler, track, after_seek=False)


def _pass(source: Source, sampler: FrameSampler | None, track: SoundTrack | None, *, after_seek: bool) -> bool:
    """One demultiplexing of both tracks; false where, after a seek, no key frame came before the first instant."""
    takers: dict[str, Any] = {}
    if sampler is not None:
        takers["video"] = sampler
        sampler.begin(after_seek)
    if track is not None:
        takers["audio"] = track
        track.begin()
    for kind, frame in source.decode(lambda kind: not takers[kind].done):
        takers[kind].offer(frame)
        if sampler is not None and sampler.late:
            return False
        if all(taker.done for taker in takers.values()):
            break
    if track is not None:
        track.finish()
    return sampler is None or sampler.finish(required=not after_seek)


def _samples_per_chunk(
    source: Source, chunks: int, samples: int | None, sample_rate: int, start: float, duration: float | None
) -> int:
    if samples is not None:
        expect_int("samples_per_chunk", samples)
        if duration is None:
            return samples
    if duration is None:
        whole = source.duration()
        if whole is None:
            raise ValueError(f"duration must be given, for {source.path.name} does not tell its own, was None")
        expect(start < whole, "start", f"lie before the end of {source.path.name} at {whole:.3f} s", start)
        duration = whole - start
    expect(_is_time(duration) and duration > 0, "duration", "be a positive, finite number of seconds", duration)
    rounded = round(duration / chunks * sample_rate)
    expect(rounded > 0, "duration", f"give each of {chunks} chunks a sample at {sample_rate} Hz", duration)
    if samples is not None:
        must = f"be duration / chunks * sample_rate = {rounded} (or leave duration out)"
        expect(samples == rounded, "samples_per_chunk", must, samples)
    return rounded


def _size(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    expect(len(pair) == 2, "size", "be an int or (H, W)", size)
    for side in pair:
        expect_int("size", side)
    return pair[0], pair[1]


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
