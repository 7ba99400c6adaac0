"""Sound of a span, placed by timestamps."""

from __future__ import annotations

import math
from typing import Any

import torch

from .source import Source

JUMP = 0.005
"""Seconds by which timestamps may leave the count of samples (some containers round them to milliseconds) before they
are taken at their word and what follows is placed anew."""

FULL_SCALE = 2.0**31

RESAMPLER_MEMORY = 0.1
"""Seconds after the span that are still fed to the resampler, so that it gives all of the span."""


class SoundTrack:
    """Mono sound of the span of `length` samples at `sample_rate` from `start` (seconds).

    samples: float32 [length], 0 where the file is silent or has no sound. valid: bool [length], true where it has.
    """

    def __init__(self, source: Source, start: float, length: int, sample_rate: int) -> None:
        self._source, self._start, self._rate = source, start, sample_rate
        self._end = start + length / sample_rate
        self.samples = torch.zeros(length)
        self.valid = torch.zeros(length, dtype=torch.bool)
        self.begin()

    def begin(self) -> None:
        """Start over; what is placed already may stay, for the same time gives the same sound."""
        self.done = False
        self._resampler: Any = None
        self._kind: tuple[str, str, int] | None = None
        self._anchor = self._fed = 0.0
        self._position = 0

    def offer(self, frame: Any) -> None:
        """The next frame of samples in order of time."""
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        expected = self._anchor + self._fed
        time = self._source.time_of(frame)
        if time is None:
            time = expected if self._kind is not None else 0.0
        if time >= self._end + RESAMPLER_MEMORY:
            self.done = True
            return
        if kind != self._kind or abs(time - expected) > JUMP:
            self.finish()
            self._restart(kind, time)
        self._fed += frame.samples / frame.sample_rate
        self._place(self._resampler.resample(frame))

    def finish(self) -> None:
        """No frame follows the ones given: place what the resampler still holds."""
        if self._resampler is not None:
            self._place(self._resampler.resample(None))
            self._resampler = None

    def _restart(self, kind: tuple[str, str, int], time: float) -> None:
        from av.audio.resampler import AudioResampler

        # Into whole numbers FFmpeg mixes with weights that sum to 1; into floating point it would exceed full scale.
        self._resampler = AudioResampler(format="s32", layout="mono", rate=self._rate)
        self._kind, self._anchor, self._fed = kind, time, 0.0
        self._position = math.floor((time - self._start) * self._rate + 0.5)

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
