"""The span of an example as tensors: as many chunks as it lasts, up to a limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mirasol.config import Config
from mirasol.kernels.core.checks import expect, expect_int
from mirasol.media import load
from mirasol.media.source import Source, open_source
from mirasol.media.timing import SLACK
from mirasol.media.tracks import _import_av

from .table import Example


@dataclass(frozen=True, eq=False)
class ClipTensors:
    """One clip of T chunks, as the model takes it in, without the dimension of the batch.

    Attributes:
        times: float32 [T], when each chunk begins, in seconds from the span's start.
        video: uint8 [3, T * F, H, W]; None where there is none.
        audio: float32 [T * S]; None where there is none.
        video_features: [T, n_v, encoder_dim] in place of video; likewise audio_features [T, n_a, encoder_dim].
        video_present, audio_present: whether the span has any; default: whether there is a tensor of it. To be said
            with features, for encoders give some where nothing is, too.
    """

    times: Tensor
    video: Tensor | None = None
    audio: Tensor | None = None
    video_features: Tensor | None = None
    audio_features: Tensor | None = None
    video_present: bool | None = None
    audio_present: bool | None = None

    def __post_init__(self) -> None:
        for name in ("video", "audio"):
            given = getattr(self, name) is not None or getattr(self, f"{name}_features") is not None
            if getattr(self, f"{name}_present") is None:
                object.__setattr__(self, f"{name}_present", given)

    @property
    def chunks(self) -> int:
        """T."""
        return len(self.times)


class ClipSource(Protocol):
    """What makes tensors of an example's clip: `load_clip`, `Shards`, `FeatureCache` or any function like it.

    It raises OSError or ValueError where the clip cannot be read.
    """

    def __call__(self, example: Example, config: Config, max_chunks: int) -> ClipTensors: ...


def clip_chunks(span_seconds: float, config: Config, max_chunks: int) -> int:
    """T = ceil(span / seconds a chunk), from 1 to `max_chunks`; less than a millisecond more makes no further chunk."""
    expect_int("max_chunks", max_chunks)
    expect(math.isfinite(span_seconds) and span_seconds > 0, "span_seconds", "be positive and finite", span_seconds)
    return min(max(math.ceil((span_seconds - SLACK) / config.seconds_per_chunk), 1), max_chunks)


def load_clip(example: Example, config: Config, max_chunks: int) -> ClipTensors:
    """Read the span of an example from its media file.

    A span of up to `max_chunks` chunks is read from its start on; behind its end the last frame is repeated and the
    sound is 0. Of a longer span `max_chunks` chunks are taken that lie spread over it, each with the sound of its own
    time. An image is one chunk that stands still, without sound; its `start` and `end` mean nothing.

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: no such file.
        ValueError: a file that FFmpeg cannot read, or with nothing to see or hear in the span.
    """
    path = Path(example.clip)
    if not path.is_file():
        raise FileNotFoundError(f"clip must be a media file, was {example.clip!r}: no such file")
    return read_span(path, example, config, max_chunks)


def read_span(media: Any, example: Example, config: Config, max_chunks: int) -> ClipTensors:
    """`load_clip` of what `mirasol.media.load` opens."""
    errors = _import_av().error
    try:
        return _read_span(media, example, config, max_chunks)
    except (
        errors.FFmpegError,
        UnicodeDecodeError,
    ) as error:  # some are neither OSError nor ValueError, or name no file
        raise ValueError(f"clip must be readable, was {example.clip!r}: {error}") from error


def _read_span(media: Any, example: Example, config: Config, max_chunks: int) -> ClipTensors:
    with open_source(media, None) as source:
        still, seconds = _is_image(source), source.duration()
        if seconds is None:
            seconds = source.measure()
    settings: dict[str, Any] = dict(size=config.image_size, sample_rate=config.sample_rate)
    if still:
        picture = load(media, chunks=1, frames_per_chunk=1, samples_per_chunk=1, **settings).video
        assert picture is not None
        return ClipTensors(torch.zeros(1), picture.repeat(1, config.frames_per_chunk, 1, 1))
    start = example.start or 0.0
    end = seconds if example.end is None else min(example.end, seconds)
    expect(start < end, "start", f"lie before the end of {example.clip} at {seconds:.3f} s", start)
    chunks, span = clip_chunks(end - start, config, max_chunks), end - start
    piece = config.seconds_per_chunk
    if span <= chunks * piece + SLACK:
        span = min(span, chunks * piece)
    settings |= dict(frames_per_chunk=config.frames_per_chunk, samples_per_chunk=config.samples_per_chunk)
    clip = load(media, chunks=chunks, start=start, duration=span, spread=True, **settings)
    video, audio, seen, heard = clip.video, clip.audio, False, False
    inside = min(span, chunks * piece)
    if video is not None and clip.video_valid is not None:
        frames = min(max(math.ceil(inside / piece * config.frames_per_chunk - 0.5), 1), video.shape[1])
        video[:, frames:] = video[:, frames - 1 : frames]
        seen = bool(clip.video_valid.flatten()[:frames].any())
    if audio is not None and clip.audio_valid is not None:
        samples = math.ceil(inside * config.sample_rate)
        audio[samples:] = 0
        heard = bool(clip.audio_valid[:samples].any())
    expect(seen or heard, "clip", f"show or sound something from {start:g} to {end:g} s", example.clip)
    return ClipTensors(clip.chunk_times.float(), video if seen else None, audio if heard else None)


def _is_image(source: Source) -> bool:
    name = source.container.format.name
    return name == "image2" or name.endswith("_pipe")
