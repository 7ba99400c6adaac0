"""Which frames are taken, and how a frame becomes a picture."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from .source import Source

INSTANT = 1e-6
"""Seconds by which a frame may come later than the instant it is asked for: rounding of times, far below a frame."""


class FrameSampler:
    """Takes, for each of some rising instants (seconds), the frame on screen then. Holds one decoded frame at a time.

    pictures: what `convert` made of the frames taken; times: their timestamps; valid: whether the track shows anything
    at the instant: not before its first frame nor after the end of its last one. One entry an instant.
    """

    def __init__(self, source: Source, instants: list[float], convert: Callable[[Any], torch.Tensor]) -> None:
        self._source, self._instants, self._convert = source, instants, convert
        self.begin(after_seek=False)

    def begin(self, after_seek: bool) -> None:
        """Start over. After a seek, frames before the first key frame may lack what they were predicted from."""
        self.pictures: list[torch.Tensor] = []
        self.times: list[float] = []
        self.valid: list[bool] = []
        self.late = False
        self._await_key = self._after_seek = after_seek
        self._shown: Any = None
        self._shown_from = self._gap = math.nan

    @property
    def done(self) -> bool:
        return len(self.pictures) == len(self._instants)

    def offer(self, frame: Any) -> None:
        """The next frame in order of time. Frames without a timestamp are passed over."""
        time = self._source.time_of(frame)
        if time is None or self.done or (self._await_key and not frame.key_frame):
            return
        self._await_key = False
        if self._shown is None:
            self.late = self._after_seek and time > self._instants[0] + INSTANT
        else:
            self._take(before=time, end=time)
            self._gap = time - self._shown_from
        self._shown, self._shown_from = frame, time

    def finish(self, required: bool) -> bool:
        """The track has ended: its last frame serves the instants that are left. False where there was no frame.

        Raises:
            ValueError: no frame, where one is required.
        """
        if self._shown is None:
            if required:
                raise ValueError(f"path must hold a video track that can be decoded, was {str(self._source.path)!r}")
            return False
        self._take(before=math.inf, end=self._shown_from + self._shown_for())
        self._shown = None
        return True

    def _take(self, before: float, end: float) -> None:
        picture = None
        while not self.done and self._instants[len(self.pictures)] + INSTANT < before:
            instant = self._instants[len(self.pictures)]
            picture = self._convert(self._shown) if picture is None else picture
            self.pictures.append(picture)
            self.times.append(self._shown_from)
            self.valid.append(self._shown_from <= instant + INSTANT < end + INSTANT)

    def _shown_for(self) -> float:
        """Seconds for which the last frame stays: what it says, else as long as the one before it, else 1 / rate."""
        told = getattr(self._shown, "duration", None)  # PyAV 12 does not tell
        if told:
            return float(told * self._shown.time_base)
        if self._gap > 0:
            return self._gap
        rate = self._source.video.average_rate
        return 1 / float(rate) if rate else 0.0


def make_picture(frame: Any, size: tuple[int, int], fit: str, fast_resize: bool) -> torch.Tensor:
    """A decoded frame as uint8 RGB [3, H, W], rotated, resized and cropped as `load` describes."""
    turns = quarter_turns(_display_matrix(frame))
    upright = (frame.height, frame.width) if turns % 2 == 0 else (frame.width, frame.height)
    height, width = resized(upright, size, fit)
    if fast_resize:
        stored = (height, width) if turns % 2 == 0 else (width, height)
        frame = frame.reformat(height=stored[0], width=stored[1], format="rgb24", interpolation="BILINEAR")
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    picture = torch.rot90(pixels, turns, (1, 2))
    if picture.shape[1:] != (height, width):
        picture = F.interpolate(picture[None], (height, width), mode="bilinear", antialias=True)[0]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return picture[:, top : top + size[0], left : left + size[1]].contiguous()


def resized(upright: tuple[int, int], size: tuple[int, int], fit: str) -> tuple[int, int]:
    """(height, width) to resize to before the crop: `size` itself, or the smallest of the same shape that covers it."""
    if fit == "squash":
        return size
    scale = max(size[0] / upright[0], size[1] / upright[1])
    return max(size[0], round(upright[0] * scale)), max(size[1], round(upright[1] * scale))


def quarter_turns(matrix: bytes | None) -> int:
    """Counterclockwise quarter turns, 0 .. 3, that a display matrix asks for, to the nearest; mirroring is left out.

    Args:
        matrix: nine int32 in the machine's order [a b u; c d v; x y w], as FFmpeg keeps the matrix of an MP4 track
            header; None for no rotation.
    """
    if matrix is None:
        return 0
    a, b, _, c, d = struct.unpack_from("=5i", matrix)
    scale_x, scale_y = math.hypot(a, c), math.hypot(b, d)
    if scale_x == 0 or scale_y == 0:
        return 0
    return round(-math.atan2(b / scale_y, a / scale_x) / (math.pi / 2)) % 4


def _display_matrix(frame: Any) -> bytes | None:
    data = frame.side_data.get("DISPLAYMATRIX")
    return None if data is None else bytes(data)
