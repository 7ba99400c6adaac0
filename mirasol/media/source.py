"""A media file through PyAV: its tracks, its clock, one demultiplexing for both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.utils.data


@contextmanager
def open_source(path: Path, threads: int | None) -> Iterator[Source]:
    """Open a file for reading and close it in the end; arguments and errors as in `load`."""
    source = Source(path, threads)
    try:
        yield source
    finally:
        source.container.close()


class Source:
    """A file that is open. Times are seconds from the start of its video track, or of its audio track without one."""

    container: Any
    video: Any
    audio: Any
    origin: float

    def __init__(self, path: Path, threads: int | None) -> None:
        self.path = path
        self._av = _import_av()
        if threads is None and torch.utils.data.get_worker_info() is not None:
            threads = 1
        self._threads = threads
        self._open()

    def reopen(self) -> None:
        """Go back to the start of the file, with fresh decoders."""
        self.container.close()
        self._open()

    def duration(self) -> float | None:
        """Seconds from the origin to the end of the track that sets it; None where the file does not say."""
        main = self.video or self.audio
        if main.duration:
            return float(main.duration * main.time_base)
        if self.container.duration:
            microseconds = (self.container.start_time or 0) + self.container.duration
            return float(microseconds / 1e6 - self.origin)
        return None

    def seek(self, time: float) -> bool:
        """Go to a key frame at or before a time; false where the file does not allow it."""
        main = self.video or self.audio
        try:
            self.container.seek(int((time + self.origin) / main.time_base), stream=main, backward=True)
        except self._av.error.FFmpegError:
            self.reopen()
            return False
        return True

    def decode(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Any]]:
        """Frames of both tracks as ("video" | "audio", frame), in the order of the file.

        Packets that are broken are passed over, and those of a kind that is not `wanted` any more are not decoded.
        """
        invalid = self._av.error.InvalidDataError
        packets = self.container.demux([stream for stream in (self.video, self.audio) if stream is not None])
        while True:
            try:
                packet = next(packets, None)
            except invalid:  # the rest of the file is lost
                return
            if packet is None:
                return
            if not wanted(packet.stream.type):
                continue
            try:
                frames = packet.decode()
            except invalid:
                continue
            for frame in frames:
                yield packet.stream.type, frame

    def time_of(self, frame: Any) -> float | None:
        """When a frame comes on screen, or its first sample is heard; None for a frame without a timestamp."""
        stamp = frame.pts if frame.pts is not None else frame.dts
        return None if stamp is None else float(stamp * frame.time_base) - self.origin

    def _open(self) -> None:
        try:
            self.container = self._av.open(str(self.path))
        except self._av.error.FFmpegError as error:
            raise ValueError(f"path must be a file that FFmpeg reads, was {str(self.path)!r}: {error}") from error
        pictures = [stream for stream in self.container.streams.video if not _is_cover(stream)]
        self.video = pictures[0] if pictures else None
        self.audio = next(iter(self.container.streams.audio), None)
        main = self.video or self.audio
        if main is None:
            self.container.close()
            raise ValueError(f"path must hold a video or an audio track, was {str(self.path)!r}")
        self.origin = float((main.start_time or 0) * main.time_base)
        if self.video is not None:
            self.video.thread_type = "NONE" if self._threads == 1 else "AUTO"
            self.video.codec_context.thread_count = self._threads or 0


def _is_cover(stream: Any) -> bool:
    """A still picture attached to a sound file."""
    disposition = getattr(stream, "disposition", None)  # PyAV 12 does not tell
    return disposition is not None and bool(disposition & type(disposition).attached_pic)


def _import_av() -> Any:
    try:
        import av
        import av.error
    except ImportError as error:
        raise ImportError("media files are read by PyAV, which is not installed: pip install -e '.[media]'") from error
    return av
