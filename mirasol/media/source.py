"""A media file through PyAV, from its own bytes alone."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .boxes import claimed_samples
from .tracks import MAX_PIXELS, TrackFailure, Tracks, Unreadable, told

FORMATS = (
    "mov,matroska,webm,avi,asf,flv,mpegts,mpeg,ogg,gif,apng,ivf,yuv4mpegpipe,wav,aiff,au,caf,flac,mp3,aac,ac3,eac3,amr,"
    "png_pipe,jpeg_pipe,bmp_pipe,webp_pipe"
)
"""Containers, by FFmpeg's names, that hold all that they show: no playlist, no pattern of file names, no device."""

HEADERLESS = ("mpegts", "mpeg", "flv", "ogg")
"""Formats that tell of tracks while they are read. FFmpeg decodes the first pictures of such a track before it can be
told how large a picture may be, unless it is given no decoder at all; and PyAV up to 17.0 crashes where it is told."""

MAX_SAMPLES = 2**22
"""Of an MP4, in all its tracks: ten hours of 60 frames a second with sound. FFmpeg takes some 70 bytes for each."""


@contextmanager
def open_source(media: Path | BinaryIO, threads: int | None) -> Iterator[Source]:
    """Open a file for reading and close it in the end; arguments and errors as in `load`."""
    source = Source(media, threads)
    try:
        yield source
    finally:
        source.close()


class Source(Tracks):
    """The tracks of a file that can be sought."""

    def __init__(self, media: Path | BinaryIO, threads: int | None) -> None:
        self._media = media
        self.path = _path(media)
        super().__init__(str(self.path), threads)
        self._expect_samples()
        self._open()

    def close(self) -> None:
        super().close()
        self._file.close()

    def reopen(self) -> None:
        """Go back to the start of the file, with fresh decoders."""
        self.close()
        self._open()

    def leave_out(self, failure: TrackFailure) -> None:
        """Go on, from the start of the file, with the next track of that kind, or without one.

        Raises:
            Unreadable: no track is left.
        """
        self._pass_over(getattr(self, failure.kind), failure.reason)
        self.reopen()

    def duration(self) -> float | None:
        """Seconds from the origin to the end of the track that sets it; None where the file does not say."""
        main = self.video or self.audio
        if main.duration and main.duration > 0:
            return float(main.duration * main.time_base)
        if self.container.duration and self.container.duration > 0:
            microseconds = (self.container.start_time or 0) + self.container.duration
            return float(microseconds / 1e6 - self.origin)
        return None

    def measure(self) -> float:
        """Seconds from the origin to the end of the last packet, to be told by reading the file to its end."""
        end = 0.0
        with suppress(self._av.error.FFmpegError):  # the rest of the file is lost
            for packet in self._demux(self._tracks()):
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base) - self.origin)
        return end

    def seek(self, time: float) -> bool:
        """Go to a key frame at or before a time; false, at the start of the file, where the file does not allow it."""
        main = self.video or self.audio
        try:
            self.container.seek(int((time + self.origin) / main.time_base), stream=main, backward=True)
        except (self._av.error.FFmpegError, ArithmeticError):
            self.reopen()
            return False
        return True

    def _expect_samples(self) -> None:
        """Refuse an MP4 whose index would fill the memory, before FFmpeg makes it."""
        with closing(_Bytes(self._media)) as file:
            claimed = claimed_samples(file)
        if claimed > MAX_SAMPLES:
            must = f"path must be a file of at most {MAX_SAMPLES} samples (frames, packets of sound)"
            raise Unreadable(f"{must}, was {str(self.path)!r}, which claims {claimed}")

    def _open(self) -> None:
        self._file = _Bytes(self._media)
        try:
            self.container = self._open_container({}, codec_whitelist="none")
            if self.container.format.name not in HEADERLESS:
                self.container.close()
                self._file.seek(0)
                self.container = self._open_container({"max_pixels": str(MAX_PIXELS)})
        except Exception as error:
            self._file.close()
            must = f"path must be a file that FFmpeg reads, in a container of its own ({FORMATS})"
            raise Unreadable(f"{must}, was {str(self.path)!r}: {told(error)}") from error
        self._choose()

    def _open_container(self, decoder: dict[str, str], **options: str) -> Any:
        return self._av.open(
            self._file,
            options=decoder,
            container_options={"format_whitelist": FORMATS, "protocol_whitelist": "none", **options},
            metadata_errors="replace",
        )


class _Bytes:
    """What PyAV needs of a file. A name like `12:30.mp4` or `%03d.png` means nothing but a file here: FFmpeg sees the
    suffix alone, which some formats are known by."""

    def __init__(self, media: Path | BinaryIO) -> None:
        suffix = _path(media).suffix
        self._own = isinstance(media, Path)
        self._file = open(media, "rb") if isinstance(media, Path) else media  # noqa: SIM115 - `close` closes it
        self._file.seek(0)
        self.read, self.tell = self._file.read, self._file.tell
        self.name = "media" + (suffix if re.fullmatch(r"\.\w+", suffix, re.ASCII) else "")

    def close(self) -> None:
        """Close the file, unless it was given open."""
        if self._own:
            self._file.close()

    def seek(self, offset: int, whence: int = 0) -> int:
        """The new position; negative, as FFmpeg has it, where a damaged file leads to a place that is none."""
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError):
            return -errno.EINVAL


def _path(media: Path | BinaryIO) -> Path:
    """Of a file; of one that is given open, its name where it has one."""
    return media if isinstance(media, Path) else Path(str(getattr(media, "name", "<file>")))
