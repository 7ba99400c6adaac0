"""The tracks of an open container through PyAV: which are read, their clock, one demultiplexing for both."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch.utils.data

MAX_PIXELS, MAX_SIDE = 2**24, 2**14
"""Of a decoded picture: 4096 x 4096, or 5760 x 2880."""

MAX_PICTURE_BYTES = 32 * 2**20
"""Of a decoded picture. A decoder holds up to 17, and a third more in what it notes of them."""

LATE_TRACKS = 1000
"""That may turn up in the middle of a file, as every damaged packet of a transport stream may seem to be one."""

PACKETS_BEYOND = 25
"""In a row, that show that a pass has come to its end."""

THREADS_BYTES = 64 * 2**20
"""Of the pictures that the decoder's threads hold on top, one each."""


class Unreadable(ValueError):
    """A file that cannot be read as a clip: the message names it and says why."""


class TrackFailure(Exception):
    """A track that gives nothing; the file may hold another."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class Tracks:
    """Those of a container that is open. Times are seconds from the start of its video track, or of its audio track
    without one.

    name: what errors call it; left_out: why tracks were passed over, one sentence each; faults: the last error of each
    kind of track; ended_by: what ended the last demultiplexing before the end, if anything did.
    """

    argument = "path"
    container: Any
    video: Any
    audio: Any
    origin: float

    def __init__(self, name: str, threads: int | None) -> None:
        self.name = name
        self._av = _import_av()
        if threads is None and torch.utils.data.get_worker_info() is not None:
            threads = 1
        self._threads = threads
        self._passed_over: set[int] = set()
        self.left_out: list[str] = []
        self.faults: dict[str, str] = {}
        self.ended_by: Exception | None = None

    def close(self) -> None:
        self.container.close()

    def decode(self, wanted: Callable[[str], bool], until: float) -> Iterator[tuple[str, Any]]:
        """Frames of both tracks as ("video" | "audio", frame), in the order of the file.

        Packets that are broken are passed over (`faults` keeps the last error of each kind), and those of a kind that
        is not `wanted` any more are not decoded. What cannot be demultiplexed ends the file, and so do packets later
        than `until` (seconds), once a few have come in a row: a single one may be damaged.
        """
        self.faults, self.ended_by = {}, None
        tracks = self._tracks()
        packets, beyond = self._demux(tracks), 0
        while beyond < PACKETS_BEYOND:
            try:
                packet = next(packets, None)
            except Exception as error:
                if isinstance(error, OSError) and not isinstance(error, self._av.error.FFmpegError):
                    raise Unreadable(
                        f"{self.argument} must be a file to read, was {self.name!r}: {told(error)}"
                    ) from error
                self.ended_by = error
                self.faults = {stream.type: told(error) for stream in tracks}
                break
            if packet is None:
                return
            time = None if packet.dts is None else float(packet.dts * packet.stream.time_base) - self.origin
            beyond = beyond + 1 if time is not None and time > until else 0
            if wanted(packet.stream.type):
                yield from self._frames(packet.stream, packet)
        for stream in tracks:
            if wanted(stream.type):
                yield from self._frames(stream, None)

    def _tracks(self) -> list[Any]:
        return [stream for stream in (self.video, self.audio) if stream is not None]

    def _demux(self, tracks: list[Any]) -> Iterator[Any]:
        for _ in range(LATE_TRACKS):
            try:
                yield from self.container.demux(tracks)
                return
            except IndexError:  # PyAV, at the first packet of a track that turns up in the middle of the file
                continue

    def _frames(self, stream: Any, packet: Any) -> Iterator[tuple[str, Any]]:
        """What the decoder gives for a packet, or holds back still, for None."""
        try:
            frames = stream.codec_context.decode(packet)
        except Exception as error:  # PyAV's own beside FFmpeg's: what a broken packet leads to is open-ended
            # FFmpeg does not tell the size of a picture that is too large.
            size = f" (pictures of more than {MAX_PIXELS} pixels are not taken)" if stream is self.video else ""
            self.faults[stream.type] = told(error) + size
            return
        if stream is self.video:
            self._expect_picture(stream.codec_context)
        for frame in frames:
            frame.time_base = stream.time_base
            yield stream.type, frame

    def time_of(self, frame: Any) -> float | None:
        """When a frame comes on screen, or its first sample is heard; None for a frame without a timestamp."""
        stamp = frame.pts if frame.pts is not None else frame.dts
        if stamp is None or not frame.time_base:
            return None
        return float(stamp * frame.time_base) - self.origin

    def _choose(self) -> None:
        """Take the first track of each kind that is not passed over, and its clock."""
        streams = self.container.streams
        for stream in (*streams.video, *streams.audio):
            if stream.codec_context is None and stream.index not in self._passed_over:
                self._pass_over(stream, "there is no decoder for it")
        pictures = [stream for stream in streams.video if not _is_cover(stream)]
        self.video, self.audio = (
            next((stream for stream in tracks if stream.index not in self._passed_over), None)
            for tracks in (pictures, streams.audio)
        )
        main = self.video or self.audio
        if main is None:
            self.close()
            why = "".join(f"; {reason}" for reason in self.left_out)
            must = f"{self.argument} must hold a video or an audio track to decode"
            raise Unreadable(f"{must}, was {self.name!r}{why}")
        timed = [stream for stream in pictures if stream.start_time is not None]
        clock = self.video or (timed[0] if timed else main)  # video that cannot be decoded has its time all the same
        self.origin = float((clock.start_time or 0) * clock.time_base)
        if self.video is not None:
            threads = self._threads or _threads(self.video.codec_context)
            self.video.thread_type = "NONE" if threads == 1 else "AUTO"
            self.video.codec_context.thread_count = threads
            self.video.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            self._accepted: Any = None

    def _pass_over(self, stream: Any, reason: str) -> None:
        self._passed_over.add(stream.index)
        context = stream.codec_context
        codec = "unknown codec" if context is None else context.name
        self.left_out.append(f"{stream.type} track {stream.index} ({codec}) cannot be decoded: {reason}")

    def _expect_picture(self, context: Any) -> None:
        """Refuse pictures of a size that no memory is set aside for. A stream may change its size at any packet."""
        seen = (context.width, context.height, context.pix_fmt)
        if seen == self._accepted:
            return
        width, height, form = seen
        bits = self._av.VideoFormat(form).padded_bits_per_pixel if form else 0
        if max(width, height) > MAX_SIDE or width * height * bits > 8 * MAX_PICTURE_BYTES:
            limits = f"{MAX_PIXELS} pixels, {MAX_SIDE} a side and {MAX_PICTURE_BYTES} bytes"
            raise TrackFailure("video", f"pictures of {width} x {height} pixels are not taken, at most {limits} are")
        self._accepted = seen


def told(error: BaseException) -> str:
    """What an error says, without the name under which FFmpeg knows the file."""
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"


def _threads(context: Any) -> int:
    """As many as there are cores, up to FFmpeg's 16, while their pictures are small."""
    four_bytes_a_pixel = 4 * (context.width * context.height or MAX_PIXELS)
    return max(1, min(os.cpu_count() or 1, 16, THREADS_BYTES // four_bytes_a_pixel))


def _is_cover(stream: Any) -> bool:
    """A still picture attached to a sound file."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def _import_av() -> Any:
    try:
        import av
        import av.error
    except ImportError as error:
        raise ImportError("media files are read by PyAV, which is not installed: pip install -e '.[media]'") from error
    return av
