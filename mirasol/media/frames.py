"""Which frames are taken, and how a frame becomes a picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from .source import Source
from .timing import INSTANT


class FrameSampler:
    """Takes, for each of some rising instants (seconds), the frame on screen then. Holds one decoded frame at a time.

    Args:
        pieces: the instants of each piece of time, in order of time.
        pictures: where the frames go, [3, N, H, W] for N instants in all.
        convert: a decoded frame as [3, H, W].

    times: timestamps of the frames taken; valid: whether the track shows anything at the instant: not before its first
    frame nor after the end of its last one. One entry an instant. shows: whether a frame was on screen at or after
    `start` (seconds).
    """

    def __init__(
        self,
        source: Source,
        start: float,
        pieces: list[list[float]],
        pictures: torch.Tensor,
        convert: Callable[[Any], torch.Tensor],
    ) -> None:
        self._source, self._start, self._convert = source, start, convert
        self._instants = [instant for piece in pieces for instant in piece]
        self._borders = [0, *itertools.accumulate(map(len, pieces))]
        self.pictures, self.shows = pictures, False
        self.times, self.valid = [math.nan] * len(self._instants), [False] * len(self._instants)
        self.begin(0, len(pieces), after_seek=False)

    def begin(self, first: int, last: int, after_seek: bool) -> None:
        """Take the pieces first .. last next. After a seek, frames before the first key frame may lack what they were
        predicted from."""
        self._next, self._end = self._borders[first], self._borders[last]
        self.late = False
        self._await_key = self._after_seek = after_seek
        self._shown: Any = None
        self._shown_from = self._gap = math.nan

    @property
    def done(self) -> bool:
        return self._next == self._end

    def offer(self, frame: Any) -> None:
        """The next frame in order of time. Frames without a timestamp are passed over."""
        time = self._source.time_of(frame)
        if time is None or self.done or (self._await_key and not frame.key_frame):
            return
        self._await_key = False
        if self._shown is None:
            self.late = self._after_seek and time > self._instants[self._next] + INSTANT
        else:
            self._take(before=time, end=time)
            self._gap = time - self._shown_from
        self._shown, self._shown_from = frame, time

    def finish(self) -> bool:
        """The track has ended: its last frame serves the instants that are left. False where there was no frame."""
        if self._shown is None:
            return False
        self._take(before=math.inf, end=self._shown_from + self._shown_for())
        self._shown = None
        return True

    def _take(self, before: float, end: float) -> None:
        self.shows |= end > self._start or self._shown_from >= self._start
        picture = None
        while not self.done and self._instants[self._next] + INSTANT < before:
            instant = self._instants[self._next]
            picture = self._convert(self._shown) if picture is None else picture
            self.pictures[:, self._next] = picture
            self.times[self._next] = self._shown_from
            self.valid[self._next] = self._shown_from <= instant + INSTANT < end + INSTANT
            self._next += 1

    def _shown_for(self) -> float:
        """Seconds for which the last frame stays: what it says, else as long as the one before it, else 1 / rate."""
        if self._shown.duration:
            return float(self._shown.duration * self._shown.time_base)
        if self._gap > 0:
            return self._gap
        rate = self._source.video.average_rate
        return 1 / float(rate) if rate else 0.0


def make_picture(frame: Any, size: tuple[int, int], fit: str) -> torch.Tensor:
    """A decoded frame as uint8 RGB [3, H, W], rotated, cropped and resized as `load` describes."""
    stored = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    picture = torch.rot90(stored, quarter_turns(frame.rotation), (1, 2))
    if fit == "crop":
        top, left, height, width = centre(picture.shape[1:], size)
        picture = picture[:, top : top + height, left : left + width]
    if picture.shape[1:] != size:
        picture = F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
    return picture


def centre(upright: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest middle part that has the shape of `size`, to the nearest pixel."""
    height = max(1, min(upright[0], round(upright[1] * size[0] / size[1])))
    width = max(1, min(upright[1], round(upright[0] * size[1] / size[0])))
    return (upright[0] - height) // 2, (upright[1] - width) // 2, height, width


def quarter_turns(degrees: int) -> int:
    """Quarter turns, 0 .. 3, nearest to a rotation in degrees; FFmpeg's is out of range where a file's makes no sense.

    The rotation is what a frame's side data is read for, and never the side data itself: PyAV ties it to its frame in
    a circle, and the picture then stays in memory until the garbage collector comes by.
    """
    return round(degrees / 90) % 4 if abs(degrees) <= 180 else 0
