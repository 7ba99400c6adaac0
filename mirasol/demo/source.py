"""What a visitor watches: a clip at its own pace, or what a browser records, as a file that is read while it grows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from mirasol.config import Config
from mirasol.media.live import Picture, Sound, open_live

MOST = 2**22
"""Bytes that may wait to be read: some 20 s of what browsers record."""


class Recording:
    """Bytes that one thread writes and another reads, in bounded memory."""

    def __init__(self) -> None:
        self._bytes, self._closed = bytearray(), False
        self._changed = threading.Condition()

    def write(self, data: bytes) -> bool:
        """Hand on a piece; False where it is wanted no longer: after `close`, or when too much waits to be read."""
        with self._changed:
            if self._closed or len(self._bytes) + len(data) > MOST:
                return False
            self._bytes += data
            self._changed.notify_all()
            return True

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes as soon as there are any; none after `close`, when all were read."""
        with self._changed:
            self._changed.wait_for(lambda: self._bytes or self._closed)
            piece = bytes(self._bytes[:size] if size >= 0 else self._bytes)
            del self._bytes[: len(piece)]
            return piece

    def close(self) -> None:
        """The end of the file."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Watched:
    """Pictures and sound of a clip or a recording, opened by who asks for the first, for a recording is waited for.

    real_time: both come at the pace at which they happen; a recording does so by itself.
    skipped: seconds that were left out so far, as `mirasol.media.live.Live` tells them.
    """

    real_time = True
    skipped = 0.0

    def __init__(self, source: str | Path | Recording, config: Config) -> None:
        self._source, self._config = source, config

    def __iter__(self) -> Iterator[Picture | Sound]:
        paced, source = not isinstance(self._source, Recording), cast(Any, self._source)
        size, sample_rate = self._config.image_size, self._config.sample_rate
        with open_live(source, size=size, sample_rate=sample_rate, real_time=paced) as items:
            for item in items:
                self.skipped = items.skipped
                yield item
