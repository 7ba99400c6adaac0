"""Pieces of a file's time into frames and samples: where to seek, what to decode, which track to fall back on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .frames import FrameSampler
from .sound import SoundTrack
from .source import Source
from .tracks import TrackFailure, told

SEEK_MARGINS = (1.0, 10.0)
"""Seconds before a piece at which decoding starts: the first covers the decoders' warm-up and what a container leaves
between picture and sound; the second is for files whose index leads to no key frame in time."""

LONG_GAP = 5.0
"""Seconds between two pieces from which on it is quicker to seek than to decode what lies between, as a rule."""


INTERLEAVING = 30.0
"""Seconds by which one track may lie behind the other in a file."""


class Reader:
    """Fills a sampler and sound tracks, one a piece, from a source. The pieces follow each other in time.

    Args:
        starts, length: of the pieces, seconds. Piece i has instants i F .. (i + 1) F of the sampler, and track i.
        sampler: None without a video track; tracks: empty without an audio track.
    """

    def __init__(
        self, source: Source, starts: list[float], length: float, sampler: FrameSampler | None, tracks: list[SoundTrack]
    ) -> None:
        self._source, self._starts, self._length = source, starts, length
        self._sampler, self._tracks = sampler, tracks

    def read(self) -> None:
        """Read every piece, sought where a long gap lies before it.

        Raises:
            TrackFailure: a track of the file gives no frame.
        """
        count, first = len(self._starts), 0
        while first < count:
            last = first + 1
            while last < count and self._starts[last] - self._starts[last - 1] - self._length < LONG_GAP:
                last += 1
            if self._starts[first] <= SEEK_MARGINS[0]:
                self._pass(first, last, after_seek=False)
            elif not self._seek_and_pass(first, last):
                self._pass(first, count, after_seek=False)
                return
            first = last

    def _seek_and_pass(self, first: int, last: int) -> bool:
        """False, at the start of the file, where seeking does not lead to a place from which the pieces can be read."""
        for margin in SEEK_MARGINS:
            time = self._starts[first] - margin
            if time > 0 and self._source.seek(time):
                if self._pass(first, last, after_seek=True):
                    return True
                self._source.reopen()
        return False

    def _pass(self, first: int, last: int, *, after_seek: bool) -> bool:
        """One demultiplexing, from where the source is, for pieces first .. last.

        False where, after a seek, that gives less than the whole file would: no key frame before the first instant,
        sound that does not tell its time, a track without any frame.
        """
        tracks = self._tracks[first:last]
        takers: dict[str, list[Any]] = {}
        if self._sampler is not None:
            self._sampler.begin(first, last, after_seek)
            takers["video"] = [self._sampler]
        if tracks:
            takers["audio"] = list(tracks)
            for track in tracks:
                track.begin(after_seek)
        given = dict.fromkeys(takers, False)
        until = self._starts[last - 1] + self._length + INTERLEAVING
        for kind, frame in self._source.decode(lambda kind: bool(takers[kind]), until):
            given[kind] = True
            for taker in takers[kind]:
                _convert(kind, taker.offer, frame)
                if taker.late:
                    return False
            takers[kind] = [taker for taker in takers[kind] if not taker.done]
            if not any(takers.values()):
                break
        for track in tracks:
            _convert("audio", track.finish)
        if self._sampler is not None and not _convert("video", self._sampler.finish):
            if after_seek:
                return False
            no_stamp = "its frames have no timestamps" if given["video"] else "there is no picture in it"
            raise TrackFailure("video", self._source.faults.get("video", no_stamp))
        if tracks and not given["audio"] and "audio" in self._source.faults:
            if after_seek:
                return False
            raise TrackFailure("audio", self._source.faults["audio"])
        return True


def _convert(kind: str, take: Callable[..., Any], *frame: Any) -> Any:
    """Hand a frame on. What can be decoded but not converted fails here."""
    try:
        return take(*frame)
    except TrackFailure:
        raise
    except Exception as error:
        raise TrackFailure(kind, told(error)) from error
