"""What cannot be sought, through PyAV: the stream of a server, a camera or microphone, a pipe."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .source import FORMATS
from .tracks import Tracks, told

SCHEMES = {
    "rtsp": "rtsp,rtp,udp,tcp",
    "rtsps": "rtsp,rtp,udp,tcp,tls",
    "rtmp": "rtmp,tcp",
    "rtmps": "rtmps,tls,tcp",
    "http": "http,https,tls,tcp",
    "https": "http,https,tls,tcp",
    "srt": "srt",
    "tcp": "tcp",
    "udp": "udp",
}
"""Of URLs that are opened, with the protocols of FFmpeg that each may use. `srt` is not in every build of FFmpeg."""

LIVE_FORMATS = f"{FORMATS},rtsp,mpjpeg,mjpeg"
"""No playlist (HLS, DASH): it would open what nobody named."""

UNTIMED = ("mpjpeg", "mjpeg")
"""Formats of cameras whose pictures have no time: they are taken to be of the moment at which they come."""

PROBED = {"analyzeduration": "2000000"}
"""Microseconds of what comes that FFmpeg looks at before it says what there is; of a transport stream it takes 7 s."""

ALSA_CONFIGURATION = Path("/usr/share/alsa/alsa.conf")
"""Where systems have it; the library inside PyAV's wheels looks for it where it was built."""


class Feed(Tracks):
    """Tracks that are read as they come. Times are seconds from the start of the video track on, plus `offset`.

    Args:
        media: a URL, the name of a device, or a file of which `read` alone is asked.
        name: what errors call it.
        how: keyword arguments of `av.open`.
        live: it happens whether anybody reads or not: decoders hold nothing back.
        origin: seconds of the timestamps that are time 0; default: the first of the video track, or of the only one.
        offset: seconds that are added to all times.
    Raises:
        ValueError: it has no track that can be decoded. ConnectionError, TimeoutError: it cannot be opened.
    """

    argument = "source"

    def __init__(
        self,
        media: Any,
        name: str,
        how: Mapping[str, Any],
        *,
        live: bool = False,
        origin: float | None = None,
        offset: float = 0.0,
    ) -> None:
        super().__init__(name, None)
        self._media, begun = media, time.monotonic()
        try:
            self.container = self._av.open(media, metadata_errors="replace", **how)
        except Exception as error:
            if isinstance(media, Pipe):
                media.close()
            waited = time.monotonic() - begun
            if waited >= how.get("timeout", (math.inf,))[0]:  # whatever it is told, FFmpeg was to give up
                must = f"source must answer, was {name!r}: nothing came for {waited:.0f} s"
                raise TimeoutError(must) from error
            raise ConnectionError(f"source must be a stream that can be read, was {name!r}: {told(error)}") from error
        self._choose()
        self.container_name: str = self.container.format.name
        self.told_duration = self.container.duration is not None
        self.live, self._begun, self._offset = live, begun, offset
        self._untimed = live and self.container_name in UNTIMED
        clock = self.video or self.audio
        self._origin_told = origin is not None or clock.start_time is not None
        self.origin = (self.origin if origin is None else origin) - offset
        if self.video is not None and live:
            self.video.thread_type = "SLICE"  # threads of whole frames hold back as many

    def close(self) -> None:
        super().close()
        if isinstance(self._media, Pipe):
            self._media.close()

    def time_of(self, frame: Any) -> float | None:
        """As of all tracks. RTSP knows no time until the server has told how its clocks relate: a few frames have
        none."""
        if self._untimed:
            return time.monotonic() - self._begun + self._offset
        found = super().time_of(frame)
        if found is None:
            return None
        if not self._origin_told:
            self._origin_told, self.origin = True, self.origin + found - self._offset
            found = self._offset
        return found


class Pipe:
    """What PyAV needs of a file that is read as it is written; FFmpeg takes it for one that cannot be sought."""

    name = "pipe"

    def __init__(self, file: BinaryIO, own: bool) -> None:
        self._file, self._own = file, own
        self._read = getattr(file, "read1", file.read)  # not to wait until a whole buffer has come

    def read(self, size: int) -> bytes:
        return self._read(size) or b""

    def close(self) -> None:
        """Close the file, unless it was given open."""
        if self._own:
            self._file.close()


def pipe_options() -> dict[str, Any]:
    """How a pipe is opened: from its own bytes alone."""
    allowed = {"format_whitelist": FORMATS, "protocol_whitelist": "none", "codec_whitelist": "none"}
    return {"container_options": {**PROBED, **allowed}}


def url_scheme(source: str) -> str | None:
    """Of a URL that is one of `SCHEMES`.

    Raises:
        ValueError: a URL of another scheme.
    """
    found = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://", source)
    if found is None:
        return None
    scheme = found[1].lower()
    if scheme not in SCHEMES:
        raise ValueError(f"source must be a file, a device, - or a URL of {', '.join(SCHEMES)}, was {public(source)!r}")
    return scheme


def url_options(scheme: str, timeout: float, options: Mapping[str, str]) -> dict[str, Any]:
    """How a URL is opened: by its own scheme, waiting for at most so many seconds."""
    allowed = {
        "protocol_whitelist": SCHEMES[scheme],
        "format_whitelist": LIVE_FORMATS,
        "codec_whitelist": "none",
    }
    more = {"rtsp": {"rtsp_flags": "prefer_tcp"}, "http": {"reconnect": "1", "reconnect_delay_max": "4"}}
    more["rtsps"], more["https"] = more["rtsp"], more["http"]
    return {
        "container_options": {**PROBED, **more.get(scheme, {}), **options, **allowed},
        "timeout": (timeout, timeout),
    }


def camera_options(options: Mapping[str, str]) -> dict[str, Any]:
    """How a camera is opened: with times of the wall clock, which microphones have too."""
    return {"format": "v4l2", "container_options": {"timestamps": "abs", **options}}


def microphone_options(name: str) -> tuple[str, dict[str, Any]]:
    """The name of a device, and how it is opened: one of ALSA, or `pulse:NAME` where FFmpeg knows PulseAudio."""
    if name.startswith("pulse:"):
        return name.removeprefix("pulse:"), {"format": "pulse"}
    if ALSA_CONFIGURATION.is_file():
        os.environ.setdefault("ALSA_CONFIG_PATH", str(ALSA_CONFIGURATION))
    return name, {"format": "alsa"}


def public(source: str) -> str:
    """A URL without name and password."""
    return re.sub(r"//[^/@]*@", "//", source)
