"""Pictures and sound as they come: from a file of any length, a camera, a server, a pipe."""

from __future__ import annotations

import math
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

from mirasol.kernels.core.checks import expect, expect_int, expect_number

from .backlog import Backlog, Items, Live, Picture, Sound, paced
from .feeds import (
    SCHEMES,
    Feed,
    Pipe,
    camera_options,
    microphone_options,
    pipe_options,
    public,
    url_options,
    url_scheme,
)
from .frames import make_picture
from .sound import Mono
from .source import Source
from .tracks import TrackFailure, Tracks, Unreadable, told

__all__ = ["Live", "Picture", "Sound", "open_live"]

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each try to reach a server again."""


@contextmanager
def open_live(
    source: str | Path | BinaryIO,
    *,
    size: int,
    sample_rate: int,
    fit: Literal["crop", "squash"] = "crop",
    real_time: bool = False,
    microphone: str | None = None,
    backlog: float = 10.0,
    timeout: float = 10.0,
    options: Mapping[str, str] | None = None,
) -> Iterator[Live]:
    """Open a source; what comes is iterated over, and through `mirasol.streaming.Cutter` becomes the chunks that `load`
    makes of a file.

    Files and pipes wait for the one who reads, and are read in bounded memory. All others happen whether anybody looks:
    a thread reads them, and drops what is not taken in time (`Live.dropped`, `Live.skipped`); so do files and pipes
    with `real_time`. Times are seconds from the start of the video track, or of the only track.

    Args:
        source: a media file, in a container of `mirasol.media.source.FORMATS`; "-" or an open binary file for a pipe
            (standard input), as from ffmpeg; a camera (/dev/video0); or a URL of one of `mirasol.media.feeds.SCHEMES`.
            A server that is lost is looked for again, a few times, and time goes on meanwhile. Playlists (HLS, DASH)
            are not followed: let ffmpeg write them into a pipe.
        size: pixels of the pictures, H = W; made as `load` makes them, with `fit`.
        sample_rate: Hz of the sound, mixed to mono.
        real_time: give a file or a pipe at the pace of its timestamps.
        microphone: sound for a camera: the name of an ALSA device that gives two channels, as "default" and "plughw:1"
            do, or "pulse:NAME".
        backlog: seconds after which what was not taken is dropped.
        timeout: seconds for which a server may be silent.
        options: FFmpeg's, of a camera or URL, such as {"video_size": "640x480", "framerate": "30"}.
    Raises:
        ImportError: PyAV is not installed. FileNotFoundError: no such file or device.
        ConnectionError, TimeoutError: a device or server that cannot be opened, or was lost.
        ValueError: an argument out of range; what FFmpeg cannot read; neither picture nor sound in it.
    Warns:
        UserWarning: a track is passed over.
    """
    expect_int("size", size)
    expect_int("sample_rate", sample_rate)
    expect(fit in ("crop", "squash"), "fit", 'be "crop" or "squash"', fit)
    for name, value in (("backlog", backlog), ("timeout", timeout)):
        expect(expect_number(name, value) > 0, name, "be positive seconds", value)

    def items(tracks: Tracks) -> Items:
        return _items(tracks, size, sample_rate, fit)

    scheme = url_scheme(source) if isinstance(source, str) else None
    camera = isinstance(source, str) and source.startswith("/dev/video")
    expect(camera or microphone is None, "microphone", "be left out, unless source is a camera", microphone)
    expect(camera or scheme is not None or not options, "options", "be left out for files and pipes", options)
    stop = threading.Event()
    feeds: list[Items] = []
    if camera:
        feeds = [items(feed) for feed in _open_camera(str(source), microphone, options or {})]
    elif scheme is not None:
        server = _Server(str(source), url_options(scheme, timeout, options or {}), scheme.startswith("http"), stop)
        feeds = [paced(server.items(items), stop)]
    elif real_time:
        feeds = [paced(items(_open_file(source)), stop)]
    live: Live
    if feeds:
        live = Backlog(feeds, stop, backlog)
    else:
        tracks = _open_file(source)
        live = Live(items(tracks), tracks.close)
    try:
        yield live
    finally:
        live.close(timeout=1.0)


def _items(tracks: Tracks, size: int, sample_rate: int, fit: str) -> Items:
    """All that the tracks give, which are closed in the end. Tracks of a file that turn out to give nothing are passed
    over for others, as `load` does, before anything is given."""
    given = False
    with closing(tracks):
        while True:
            try:
                for item in _decoded(tracks, size, sample_rate, fit):
                    given = True
                    yield item
                break
            except TrackFailure as failure:
                if given or not isinstance(tracks, Source):
                    must = f"source must be media that can be decoded, was {tracks.name!r}"
                    raise Unreadable(f"{must}: {failure.kind}: {failure.reason}") from failure
                tracks.leave_out(failure)
        for reason in tracks.left_out:
            warnings.warn(f"{tracks.name}: {reason}", stacklevel=2)
        if isinstance(tracks, Feed) and tracks.live:
            if tracks.ended_by is not None:
                reason = told(tracks.ended_by)
                raise ConnectionError(f"source must go on, was {tracks.name!r}: {reason}") from tracks.ended_by
        elif not given:
            why = "".join(f"; {kind}: {fault}" for kind, fault in tracks.faults.items())
            if isinstance(tracks, Feed) and "mp4" in tracks.container_name:
                why += "; an MP4 comes through a pipe only in fragments (ffmpeg -movflags frag_keyframe)"
            raise Unreadable(f"source must show or sound something, was {tracks.name!r}{why}")


def _decoded(tracks: Tracks, size: int, sample_rate: int, fit: str) -> Items:
    sound = Mono(tracks, sample_rate, since=0.0)
    for kind, frame in tracks.decode(lambda kind: True, math.inf):
        try:
            if kind == "audio":
                for begin, after, samples in sound.offer(frame):
                    yield Sound(begin + after / sample_rate, samples)
            elif (time := tracks.time_of(frame)) is not None:
                yield Picture(time, make_picture(frame, (size, size), fit))
        except TrackFailure:
            raise
        except Exception as error:  # what can be decoded but not converted
            raise TrackFailure(kind, told(error)) from error
    for begin, after, samples in sound.finish():
        yield Sound(begin + after / sample_rate, samples)


def _open_file(source: str | Path | BinaryIO) -> Tracks:
    if isinstance(source, str | Path) and str(source) != "-":
        path = Path(source)
        if path.is_fifo():
            return Feed(Pipe(path.open("rb"), own=True), str(path), pipe_options())
        if path.is_file():
            return Source(path, None)
        must = f"source must be a file, a camera (/dev/video0), - or a URL of {', '.join(SCHEMES)}"
        raise FileNotFoundError(f"{must}, was {str(source)!r}: no such file")
    file: Any = sys.stdin.buffer if isinstance(source, str | Path) else source
    return Feed(Pipe(file, own=False), str(getattr(file, "name", "pipe")), pipe_options())


def _open_camera(device: str, microphone: str | None, options: Mapping[str, str]) -> list[Tracks]:
    if not Path(device).exists():
        raise FileNotFoundError(f"source must be a camera that is there, was {device!r}: no such device")
    camera = Feed(device, device, camera_options(options), live=True)
    if microphone is None:
        return [camera]
    name, how = microphone_options(microphone)
    try:
        return [camera, Feed(name, microphone, how, origin=camera.origin, live=True)]
    except Exception:
        camera.close()
        raise


class _Server:
    """A URL that is opened, and opened again where it is lost."""

    def __init__(self, url: str, how: Mapping[str, Any], ends: bool, stop: threading.Event) -> None:
        self._url, self._how, self._ends, self._stop = url, how, ends, stop
        self._name, self._begun = public(url), time.monotonic()
        self._first = self._open(0.0)

    def _open(self, offset: float) -> Feed:
        return Feed(self._url, self._name, self._how, offset=offset, live=True)

    def items(self, read: Callable[[Tracks], Items]) -> Items:
        """What it gives, each time that it is reached."""
        feed, tries = self._first, 0
        while True:
            lost: ConnectionError | None = None
            try:
                for item in read(feed):
                    tries = 0
                    yield item
            except ConnectionError as error:
                lost = error
            if feed.told_duration or (lost is None and self._ends):  # from its start again would be no way on
                if lost is not None:
                    raise lost
                return
            again: Feed | None = None
            while again is None:
                if tries == len(PAUSES) and lost is not None:
                    raise lost
                if tries == len(PAUSES) or self._stop.wait(PAUSES[tries]):
                    return
                tries += 1
                with suppress(OSError, ValueError):
                    again = self._open(time.monotonic() - self._begun)
            feed = again
