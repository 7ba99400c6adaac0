"""One clock for pictures and sound whose timestamps may start anywhere, stop, leap and start over."""

from __future__ import annotations

import math

LEAP = 60.0
"""Seconds by which timestamps may run ahead of all that came before: a stream that paused for less has a hole."""


class Clock:
    """Takes timestamps to seconds from the stream's start, for two kinds: 0 is pictures, 1 is sound.

    The start is 0 of the timestamps where they begin less than `near` seconds after 0, or before it by up to `LEAP`:
    so files count, from the start of their video track. Else it is the first timestamp that comes.

    A timestamp that lies more than `patience` before the one that its kind has reached, or more than `LEAP` ahead of
    both kinds, is of a clock that was set anew, as that of a camera that restarts is: it is taken on the other kind's
    clock if it fits there, else as following what came last.

    offsets: of both kinds, seconds that the start lies from 0 of their timestamps; NaN until one has come.
    """

    def __init__(self, near: float, patience: float) -> None:
        self._near, self._patience = near, patience
        self.offsets = [math.nan, math.nan]

    def time(self, kind: int, stamp: float, reached: float | None, latest: float) -> float:
        """Seconds from the stream's start.

        Args:
            stamp: seconds, finite.
            reached: where this kind has come to; None if it never came.
            latest: where the kind that is ahead has come to.
        """
        if all(map(math.isnan, self.offsets)):
            self.offsets[kind] = 0.0 if -LEAP <= stamp < self._near else stamp
        earliest = latest - LEAP if reached is None else reached - self._patience
        for offset in (self.offsets[kind], self.offsets[1 - kind]):  # comparisons with NaN are false
            if earliest <= stamp - offset <= latest + LEAP:
                self.offsets[kind] = offset
                return stamp - offset
        self.offsets[kind] = stamp - latest
        return latest
