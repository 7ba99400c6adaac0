"""Sound of a track: mono pieces at one rate, and those of a span placed by their timestamps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .timing import JUMP, nearest_sample
from .tracks import TrackFailure, Tracks

FULL_SCALE = 2.0**31

RESAMPLER_MEMORY = 0.1
"""Seconds before and after the span that are fed to the resampler too, so that it gives all of the span."""

RATES = (1000, 384_000)
"""Hz that are resampled: below, a short file would be hours of sound; above, the filter alone would fill the memory."""

BLOCK = 2**16
"""Samples that are resampled at once."""


class Resampled(NamedTuple):
    """Samples float32 [N], mono, that come `after` so many others from a time on (seconds)."""

    begin: float
    after: int
    samples: torch.Tensor


class Mono:
    """Decoded sound of a track as pieces at `sample_rate`, each with the time from which its samples are counted.

    Args:
        since: seconds; of what ends before (the resampler's memory aside) nothing is given.
        until: seconds; likewise of what begins after.
        after_seek: the track is not read from its start: times have to be told.

    done: nothing more will be given; late: after a seek, the first frame did not tell its time.
    """

    def __init__(
        self, tracks: Tracks, sample_rate: int, since: float, until: float = math.inf, after_seek: bool = False
    ) -> None:
        self._tracks, self._rate = tracks, sample_rate
        self._since, self._until = since - RESAMPLER_MEMORY, until + RESAMPLER_MEMORY
        self.done = self.late = False
        self._after_seek = after_seek
        self._resampler: Any = None
        self._kind: tuple[str, str, int] | None = None
        self._next = self._begin = 0.0
        self._count = 0

    def offer(self, frame: Any) -> Iterator[Resampled]:
        """The next frame of samples in order of time. Without a timestamp it follows the one before.

        Raises:
            TrackFailure: a sample rate outside `RATES`.
        """
        if not RATES[0] <= frame.sample_rate <= RATES[1]:
            raise TrackFailure("audio", f"{frame.sample_rate} Hz are not resampled, {RATES[0]} .. {RATES[1]} Hz are")
        time = self._tracks.time_of(frame)
        if time is None:
            self.late = self._after_seek and self._kind is None
            time = self._next
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._kind or abs(time - self._next) > JUMP:
            yield from self.finish()
            self._kind, self._next = kind, time
        for block in _blocks(frame):
            begin, self._next = self._next, self._next + block.samples / frame.sample_rate
            if begin >= self._until:
                self.done = True
                return
            if self._next > self._since:
                self._since = -math.inf  # what comes from now on is wanted, whatever its clock says
                yield from self._feed(block, begin)

    def finish(self) -> Iterator[Resampled]:
        """No frame follows the ones given: what the resampler still holds."""
        if self._resampler is not None:
            yield from self._given(self._resampler.resample(None))
            self._resampler = None

    def _feed(self, block: Any, begin: float) -> Iterator[Resampled]:
        from av.audio.resampler import AudioResampler

        if self._resampler is None:
            # Into whole numbers FFmpeg mixes with weights that sum to 1; into floating point it would exceed 1.
            self._resampler = AudioResampler(format="s32", layout="mono", rate=self._rate)
            self._begin, self._count = begin, 0
        yield from self._given(self._resampler.resample(block))

    def _given(self, frames: list[Any]) -> Iterator[Resampled]:
        for frame in frames:
            if frame is None:  # how PyAV answers the flush of a resampler that has nothing to do
                continue
            samples = torch.from_numpy(frame.to_ndarray()).view(-1) / FULL_SCALE
            yield Resampled(self._begin, self._count, samples)
            self._count += len(samples)


class SoundTrack:
    """Mono sound from `start` (seconds) on, at `sample_rate`, written over `samples` and `valid`.

    samples: float32 [length], 0 where the file is silent or has no sound. valid: bool [length], true where it has.
    """

    def __init__(
        self, tracks: Tracks, start: float, sample_rate: int, samples: torch.Tensor, valid: torch.Tensor
    ) -> None:
        self._tracks, self._start, self._rate = tracks, start, sample_rate
        self.samples, self.valid = samples, valid
        self.begin(after_seek=False)

    def begin(self, after_seek: bool) -> None:
        """Start over; what is placed already may stay, for the same time gives the same sound."""
        end = self._start + len(self.samples) / self._rate
        self._sound = Mono(self._tracks, self._rate, self._start, end, after_seek)

    @property
    def done(self) -> bool:
        return self._sound.done

    @property
    def late(self) -> bool:
        return self._sound.late

    def offer(self, frame: Any) -> None:
        """The next frame of samples in order of time; as `Mono.offer`."""
        self._place(self._sound.offer(frame))

    def finish(self) -> None:
        """No frame follows the ones given: place what the resampler still holds."""
        self._place(self._sound.finish())

    def _place(self, pieces: Iterator[Resampled]) -> None:
        for begin, after, piece in pieces:
            position = nearest_sample(begin - self._start, self._rate) + after
            first, last = max(position, 0), min(position + len(piece), len(self.samples))
            if first < last:
                self.samples[first:last] = piece[first - position : last - position]
                self.valid[first:last] = True


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
