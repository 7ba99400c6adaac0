"""The rules by which pictures and sound belong to pieces of time, for files and for streams."""

from __future__ import annotations

import math

INSTANT = 1e-6
"""Seconds by which a frame may come later than the instant it is asked for: rounding of times, far below a frame."""

JUMP = 0.005
"""Seconds by which timestamps may leave the count of samples (some containers round them to milliseconds) before they
are taken at their word and what follows is placed anew."""

SLACK = 1e-3
"""Seconds, a tick of a coarse container: a remainder below this is no chunk of its own."""


def instant(frame: int, piece: float, frames: int) -> float:
    """Seconds after which a frame is looked at, where each `piece` (seconds) has so many `frames`: in the middle of its
    share, `(frame + 1/2) / frames * piece`. `frame` may lie beyond the first piece."""
    return (frame + 0.5) * (piece / frames)


def nearest_sample(seconds: float, sample_rate: int) -> int:
    """The sample at which what begins so many seconds from the start is placed; halves go up."""
    return math.floor(seconds * sample_rate + 0.5)
