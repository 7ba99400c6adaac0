"""Sound of a span, placed by timestamps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from .source import Source, TrackFailure

JUMP = 0.005
"""Seconds by which timestamps may leave the count of samples (some containers round them to milliseconds) before they
are taken at their word and what follows is placed anew."""

FULL_SCALE = 2.0**31

RESAMPLER_MEMORY = 0.1
"""Seconds before and after the span that are fed to the resampler too, so that it gives all of the span."""

RATES = (1000, 384_000)
"""Hz that are resampled: below, a short file would be hours of sound; above, the filter alone would fill the memory."""

BLOCK = 2**16
"""Samples that are resampled at once."""


class SoundTrack:
    """Mono sound from `start` (seconds) on, at `sample_rate`, written over `samples` and `valid`.

    samples: float32 [length], 0 where the file is silent or has no sound. valid: bool [length], true where it has.
    """

    def __init__(
        self, source: Source, start: float, sample_rate: int, samples: torch.Tensor, valid: torch.Tensor
    ) -> None:
        self._source, self._start, self._rate = source, start, sample_rate
        self._end = start + len(samples) / sample_rate
        self.samples, self.valid = samples, valid
        self.begin(after_seek=False)

    def begin(self, after_seek: bool) -> None:
        """Start over; what is placed already may stay, for the same time gives the same sound."""
        self.done = self.late = False
        self._after_seek = after_seek
        self._resampler: Any = None
        self._kind: tuple[str, str, int] | None = None
        self._next = 0.0
        self._position = 0

    def offer(self, frame: Any) -> None:
        """The next frame of samples in order of time. Without a timestamp it follows the one before.

        Raises:
            TrackFailure: a sample rate outside `RATES`.
        """
        if not RATES[0] <= frame.sample_rate <= RATES[1]:
            raise TrackFailure("audio", f"{frame.sample_rate} Hz are not resampled, {RATES[0]} .. {RATES[1]} Hz are")
        time = self._source.time_of(frame)
        if time is None:
            self.late = self._after_seek and self._kind is None
            time = self._next
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._kind or abs(time - self._next) > JUMP:
            self.finish()
            self._kind, self._next = kind, time
        for block in _blocks(frame):
            begin, self._next = self._next, self._next + block.samples / frame.sample_rate
            if begin >= self._end + RESAMPLER_MEMORY:
                self.done = True
                return
            if self._next > self._start - RESAMPLER_MEMORY:
                self._feed(block, begin)

    def finish(self) -> None:
        """No frame follows the ones given: place what the resampler still holds."""
        if self._resampler is not None:
            self._place(self._resampler.resample(None))
            self._resampler = None

    def _feed(self, block: Any, begin: float) -> None:
        from av.audio.resampler import AudioResampler

        if self._resampler is None:
            # Into whole numbers FFmpeg mixes with weights that sum to 1; into floating point it would exceed 1.
            self._resampler = AudioResampler(format="s32", layout="mono", rate=self._rate)
            self._position = math.floor((begin - self._start) * self._rate + 0.5)
        self._place(self._resampler.resample(block))

    def _place(self, frames: list[Any]) -> None:
        for frame in frames:
            if frame is None:  # how PyAV answers the flush of a resampler that has nothing to do
                continue
            piece = torch.from_numpy(frame.to_ndarray()).view(-1) / FULL_SCALE
            first, last = max(self._position, 0), min(self._position + len(piece), len(self.samples))
            if first < last:
                self.samples[first:last] = piece[first - self._position : last - self._position]
                self.valid[first:last] = True
            self._position += len(piece)


def _blocks(frame: Any) -> Iterator[Any]:
    """A frame in parts of at most `BLOCK` samples."""
    if frame.samples <= BLOCK:
        yield frame
        return
    samples = frame.to_ndarray()  # [channels, samples], or [1, samples * channels] where they are interleaved
    step = BLOCK * samples.shape[1] // frame.samples
    for first in range(0, samples.shape[1], step):
        part = samples[:, first : first + step].copy()
        block = type(frame).from_ndarray(part, format=frame.format.name, layout=frame.layout.name)
        block.sample_rate, block.time_base = frame.sample_rate, frame.time_base
        yield block
